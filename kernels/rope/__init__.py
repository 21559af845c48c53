"""Rotary position embedding, in place. See README.md."""
