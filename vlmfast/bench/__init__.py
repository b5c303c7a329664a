"""Measuring honestly: tasks, answers of a model under a plan, paired statistics, timing, result files, and `tune`."""
