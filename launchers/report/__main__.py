"""`python -m launchers.report`."""

from launchers.report.html import main

main()
