"""Attention received per key, summed over chosen rows and heads. See README.md."""
