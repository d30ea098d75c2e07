"""`python -m launchers.sweep`."""

from launchers.sweep.command import main

main()
