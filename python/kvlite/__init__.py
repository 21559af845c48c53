"""kvlite: a minimal LLM serving engine that treats KV cache as the product.

The names that users import. Heavy modules load at the first use, so that `kvlite --help` and the errors stay instant.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvlite.config import EngineConfig
from kvlite.errors import (
    CapacityError,
    ConfigError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    KvliteError,
    ModelLoadError,
    UnknownDocumentError,
)
from kvlite.reuse_types import (
    Document,
    PrecomputeReport,
    Reuse,
    ReuseMode,
    ReuseReport,
    Segment,
    SegmentHit,
    SegmentReport,
    VerifyReport,
)
from kvlite.types import (
    CompletionOutput,
    Delta,
    EngineStats,
    FinishReason,
    Logprob,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from kvlite.async_engine import AsyncEngine
    from kvlite.engine import Engine

__all__ = [
    "AsyncEngine",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "Document",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "FinishReason",
    "InvalidRequestError",
    "KvliteError",
    "Logprob",
    "ModelLoadError",
    "PrecomputeReport",
    "RequestOptions",
    "RequestOutput",
    "Reuse",
    "ReuseMode",
    "ReuseReport",
    "SamplingParams",
    "Segment",
    "SegmentHit",
    "SegmentReport",
    "TokenLogprobs",
    "UnknownDocumentError",
    "Usage",
    "VerifyReport",
]

# OpenMP's threads spin while they wait; beside other busy processes a decode step then takes 50 times as long. Read by
# the runtime when torch is loaded, so it must be set here; whoever has set it knows better.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Some tens of microseconds of it are worth having in GNU's runtime: the products of a layer follow each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_LAZY = {"Engine": "kvlite.engine", "AsyncEngine": "kvlite.async_engine"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvlite' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
