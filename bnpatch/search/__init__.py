"""The search: how weights are found and judged."""
