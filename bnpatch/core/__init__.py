"""What everything else is made of: the formula, a patch as a value, recipes, errors, files."""
