"""Layers: the few modules a decoder is stacked from, each writing into a buffer that the caller owns.

Knows shapes and `kvlite.ops`; knows neither model families, files, requests nor the scheduler. Called by
`kvlite.models`.
"""
