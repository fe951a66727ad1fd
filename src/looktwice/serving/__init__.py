"""Files that run where looktwice is not installed."""
