"""The earlier name of `python -m evals.speed.random_baseline`, which commands in result files use."""

from evals.speed.random_baseline import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
