"""Accuracy, paired: `python -m evals.accuracy --task NAME --out FILE.jsonl --summary FILE.json`."""
