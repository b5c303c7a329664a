"""Streams, measured: `python -m evals.stream --out FILE.json`, and what their archive survives."""
