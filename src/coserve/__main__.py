"""`python -m coserve`: the command without its script."""

from coserve.cli import main

if __name__ == "__main__":
    main()
