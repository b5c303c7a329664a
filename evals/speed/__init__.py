"""Speed, stage by stage: `python -m evals.speed --suite NAME --out FILE.json`."""
