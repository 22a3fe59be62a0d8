"""The search for weights, and the verdict on them."""
