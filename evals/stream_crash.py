"""The earlier name of `python -m evals.stream.crash`, which commands in result files use."""

from evals.stream.crash import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
