"""The earlier name of `python -m evals.accuracy.tables`, which commands in result files use."""

from evals.accuracy.tables import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
