"""What an experiment sweeps: read, checked, handed out."""
