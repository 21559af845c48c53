"""Paged attention: prefill, chunked prefill and decode under one position-exact contract. See README.md."""
