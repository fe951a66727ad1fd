"""Feeding training: what a sample is, what can be wrong with one, its length, the order of all, their examples."""
