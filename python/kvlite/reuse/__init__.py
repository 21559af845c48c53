"""Reuse methods: which rows of reused text are computed again. One small file each.

Knows the model's probes and tensors; knows neither requests, plans nor the cache. Called by `kvlite.runner`, and by
whoever checks what a request asks for.
"""

from kvlite.reuse.base import ReuseMethod, Round, Scope, ScoreEntry, Span, Tools
from kvlite.reuse.links import NUM_LINKS, LinkProbe
from kvlite.reuse.registry import MAX_METHODS, METHODS, MethodTable, resolve

__all__ = [
    "MAX_METHODS",
    "METHODS",
    "NUM_LINKS",
    "LinkProbe",
    "MethodTable",
    "ReuseMethod",
    "Round",
    "Scope",
    "ScoreEntry",
    "Span",
    "Tools",
    "resolve",
]
