"""Score a model on examples, and draw conclusions from the scores."""
