"""`python -m launchers.report`: rows as one HTML page."""

from launchers.results.report import main

if __name__ == "__main__":
    main()
