"""Everything that a GPU is asked in one run: `python -m evals.gpu --out FOLDER`."""
