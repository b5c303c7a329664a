"""Evaluation commands: speed, accuracy, streams, Pareto curves. They use vlmfast's public API and are not packaged."""
