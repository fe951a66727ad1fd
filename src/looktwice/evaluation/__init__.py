"""How often a model is right, and what its crops are worth."""
