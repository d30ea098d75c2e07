"""`python -m launchers.pareto`: accuracy against stored bytes."""

from launchers.results.pareto import main

if __name__ == "__main__":
    main()
