"""Judging whole data files before training: check, the cleaned copy, statistics."""
