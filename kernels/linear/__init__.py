"""Rows times a weight matrix. See README.md."""
