"""`python -m launchers.show`: one run explained."""

from launchers.results.show import main

if __name__ == "__main__":
    main()
