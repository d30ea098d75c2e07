"""`python -m launchers.live`."""

from launchers.live.watch import main

main()
