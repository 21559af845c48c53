"""Scatter of new keys and values into the paged cache. See README.md."""
