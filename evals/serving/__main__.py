from evals.serving.suite import main
from vlmfast.cli.errors import application

if __name__ == "__main__":
    application(main)()
