"""A sweep as it runs: what its files tell, and how that is shown."""
