"""The lowest layer: the formula, the patch as a value, recipes, errors and file helpers."""
