"""The two stages, each a loop to read from top to bottom, and what they share."""
