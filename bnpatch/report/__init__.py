"""The files that a search writes for users: report, charts, tables, recipe and patched model."""
