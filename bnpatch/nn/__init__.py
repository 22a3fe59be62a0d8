"""The patched layer for torch models, and the functions that put it into a model."""
