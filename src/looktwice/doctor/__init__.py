"""What a person with a problem runs first: what is installed and usable here, and whether all ways compute alike."""
