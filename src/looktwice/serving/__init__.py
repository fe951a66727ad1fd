"""Files that other programs run, from a saved folder or by their own python."""
