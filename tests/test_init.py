"""What `import kvlite` gives and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import kvlite
from kvlite.async_engine import AsyncEngine
from kvlite.engine import Engine

SERVER_ONLY = ("fastapi", "uvicorn", "typer", "rich", "prometheus_client", "msgspec", "jinja2", "transformers")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys, json\n{code}\nprint(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_an_engine_runs_without_the_servers_packages() -> None:
    code = (
        "from kvlite import Engine, SamplingParams\n"
        "with Engine(kv_cache_bytes=1 << 20, num_threads=1) as engine:\n"
        "    assert len(engine.generate([5, 6], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2"
    )
    assert loaded_by(code).isdisjoint(SERVER_ONLY)


def test_the_package_alone_loads_nothing_heavy() -> None:
    assert loaded_by("import kvlite").isdisjoint({"torch", "numpy", "tokenizers", *SERVER_ONLY})


def test_every_public_name_is_there_and_unknown_ones_are_not() -> None:
    assert all(getattr(kvlite, name) is not None for name in kvlite.__all__)
    assert (kvlite.Engine, kvlite.AsyncEngine) == (Engine, AsyncEngine)
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = kvlite.Motor
