"""`python -m coserve`: the command without its script."""

from coserve.cli.main import main

if __name__ == "__main__":
    main()
