"""`python -m launchers.table`: rows as a table."""

from launchers.results.table import main

if __name__ == "__main__":
    main()
