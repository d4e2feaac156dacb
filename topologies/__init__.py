"""Experiment files and graphs that come with the package: data, no code."""
