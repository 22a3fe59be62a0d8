"""A model over examples: scores, and what can be said of them."""
