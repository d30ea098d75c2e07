"""A sweep as it runs: `python -m launchers.live`."""

LISTED = "rows.json"  # in a job's folder: the row files it makes or finds, its own first
ENDED = "ended"  # in a job's folder: the job is over, however it went
