"""A model that can be patched and asked for predictions, from wherever it comes."""
