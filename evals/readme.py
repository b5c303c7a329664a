"""The earlier name of `python -m evals.report.documents`, which commands in result files use."""

from evals.report.documents import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
