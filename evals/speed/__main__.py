from evals.speed.suites import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
