"""bnpatch fixes the normalization layers of vision models that are already trained."""

__version__ = "0.1.0"
