"""Runs the command line: `python -m leukoflow` is the command `leukoflow`."""

from leukoflow.apps.cli.main import main

if __name__ == "__main__":
    main()
