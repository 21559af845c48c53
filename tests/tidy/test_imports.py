"""The import direction of ARCHITECTURE.md: each unit of the package may import only the units below it.

A unit is a module or folder directly under python/kvlite. Rust's walls are read from Cargo.toml and the sources.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests.tidy.sources import ROOT, blank_rust, read, sources, without_rust_tests

LEAVES = {"errors", "checks", "memory", "reuse_types", "types", "config", "progress"}
COMPUTE = LEAVES | {"_core", "ops"}
REQUEST = LEAVES | {
    "model_files",
    "chat_environment",
    "chat_template",
    "tokenizer",
    "request",
    "reuse",
    "documents",
    "library",
}
ENGINE = REQUEST | {"engine"}
SERVING = ENGINE | {"async_engine"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "reuse_types": {"errors", "checks"},
    "types": {"errors", "checks", "reuse_types"},
    "config": {"errors"},
    "memory": set(),
    "progress": set(),
    "ops": LEAVES | {"_core", "kernels"},
    "layers": LEAVES | {"ops"},
    "models": LEAVES | {"ops", "layers"},
    "reuse": LEAVES | {"ops", "models"},
    "runner": COMPUTE | {"layers", "models", "reuse"},
    "chat_environment": set(),
    "chat_template": LEAVES | {"chat_environment"},
    "model_files": LEAVES,
    "tokenizer": LEAVES | {"chat_template", "model_files"},
    "documents": {"checks", "errors", "reuse_types"},
    "request": LEAVES | {"reuse", "documents"},
    "library": LEAVES | {"_core", "documents", "inflight", "request", "tokenizer"},
    "agreement": set(),
    "twins": LEAVES | {"agreement", "request"},
    "output": REQUEST | {"runner"},
    "startup": COMPUTE | REQUEST | {"models", "runner"},
    "inflight": REQUEST | {"output", "runner"},
    "interrupts": set(),
    "engine_stream": {"request", "types"},
    "prompts": {"documents", "errors", "request", "reuse_types", "tokenizer", "types"},
    "migration": COMPUTE | REQUEST | {"inflight", "interrupts", "runner", "twins"},
    "loop": COMPUTE | REQUEST | {"agreement", "documents", "inflight", "migration", "runner", "startup", "twins"},
    "workload": LEAVES | {"interrupts", "loop", "request", "startup"},
    "engine": COMPUTE
    | REQUEST
    | {"documents", "engine_stream", "interrupts", "library", "migration", "output", "prompts", "startup", "workload"},
    "readers": {"errors", "types"},
    "async_engine": ENGINE | {"documents", "output", "prompts", "readers"},
    "fleet": COMPUTE | SERVING | {"inflight", "loop", "migration", "output", "readers", "prompts", "runner", "startup"},
    "server": SERVING | {"fleet", "prompts"},
    "batch": ENGINE | {"interrupts", "output", "server", "startup", "workload"},
    "chat": SERVING,
    "demo": SERVING | {"server"},
    "cli": SERVING | {"server", "batch", "chat", "demo", "fleet", "bench"},
    "__init__": SERVING,
    "__main__": {"cli", *SERVING, "server", "fleet"},
}


def unit_of(path: Path) -> str:
    """Unit of a file under python/kvlite; an entry point (`python -m ...`) is `__main__` wherever it lies."""
    name = path.name if path.name == "__main__.py" else path.relative_to("python/kvlite").parts[0]
    return name.removesuffix(".py")


def imported_units(path: Path, text: str) -> set[tuple[int, str]]:
    """(line, unit) of every import of ours in the file, relative ones resolved; `kvlite` itself is `__init__`."""
    package = ("kvlite", *path.relative_to("python/kvlite").parts[:-1])
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "kvlite" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "kvlite":
                found.add((node.lineno, parts[1] if len(parts) > 1 else "__init__"))  # type: ignore[attr-defined]
    return found


def wrong_imports(path: Path, text: str) -> list[str]:
    """Imports that go up or sideways."""
    unit = unit_of(path)
    if unit not in ALLOWED:
        return [f"{path}: unit {unit} has no row in the import table; give it one"]
    allowed = ALLOWED[unit] | {unit}
    return [
        f"{path}:{line} {unit} imports {other}; allowed are {', '.join(sorted(allowed))}"
        for line, other in sorted(imported_units(path, text))
        if other not in allowed
    ]


def test_imports_go_down_only() -> None:
    found = [finding for path in sources(".py", under="python/kvlite/") for finding in wrong_imports(path, read(path))]
    assert not found, "\n".join(["", *found])


def test_kernels_import_nothing_of_the_package_but_kernels() -> None:
    for path in sources(".py", under="kernels/"):
        for node in ast.walk(ast.parse(read(path))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong = [n for n in names if n.split(".")[0] == "kvlite" and not n.startswith("kvlite.kernels")]
            assert not wrong, f"{path}: {wrong}"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("python/kvlite/layers/linear.py", "from kvlite.runner.plan import Plan"),
        ("python/kvlite/layers/linear.py", "from ..runner import plan"),
        ("python/kvlite/layers/linear.py", "from kvlite import engine"),
        ("python/kvlite/config.py", "def f():\n    import kvlite.engine"),
        ("python/kvlite/runner/sampler.py", "from kvlite.kernels.sample import sample"),
        ("python/kvlite/engine.py", "from kvlite.server.app import app"),
        ("python/kvlite/surprise.py", "import os"),
    ],
)
def test_a_wrong_import_is_caught(path: str, text: str) -> None:
    assert len(wrong_imports(Path(path), text)) == 1


def test_a_right_import_passes() -> None:
    assert wrong_imports(Path("python/kvlite/runner/plan.py"), "from . import kv_pool\nfrom ..layers import norm") == []
    assert wrong_imports(Path("python/kvlite/engine.py"), "from kvlite._core import Core\nimport torch") == []


# Rust


def rust_code(path: Path) -> str:
    """Source without comments, strings and tests."""
    return without_rust_tests(blank_rust(read(path)))


def _dependencies(crate: str) -> set[str]:
    return set(tomllib.loads(read(Path(f"rust/{crate}/Cargo.toml"))).get("dependencies", {}))


def test_the_core_and_the_cpu_kernels_do_not_know_each_other_or_python() -> None:
    ours = {"kvlite-core", "kvlite-cpu", "pyo3", "numpy"}
    assert not _dependencies("kvlite-core") & ours
    assert not _dependencies("kvlite-cpu") & ours
    assert {"kvlite-core", "kvlite-cpu", "pyo3"} <= _dependencies("kvlite-py")


# (folder, pattern, why)
WALLS = [
    (
        "rust/kvlite-core/src/cache/",
        r"\bsched\b|\bplan::|\bcrate::core\b|\bCore\b",
        "cache never sees sched, plan or core",
    ),
    ("rust/kvlite-core/src/sched/", r"\bCache\b|\bcrate::core\b", "sched sees numbers, never the cache"),
    ("rust/kvlite-core/src/", r"std::time|Instant|SystemTime", "the core has no clock"),
    (
        "rust/kvlite-core/src/",
        r"std::thread|std::net|std::fs|std::env|std::process",
        "the core does no input or output",
    ),
    (
        "rust/kvlite-core/src/",
        r"\bHashMap\b|\bHashSet\b|RandomState|\brand::",
        "no hash order or randomness in decisions",
    ),
    ("rust/kvlite-core/src/", r"\bunsafe\b", "unsafe lives in kvlite-cpu and buffers.rs"),
    ("rust/kvlite-py/src/", r"\bunsafe\b", "unsafe lives in kvlite-cpu and buffers.rs"),
]


@pytest.mark.parametrize(("folder", "pattern", "why"), WALLS)
def test_the_rust_walls_stand(folder: str, pattern: str, why: str) -> None:
    paths = [path for path in sources(".rs", under=folder) if path.name != "buffers.rs"]
    assert paths
    found = [f"{path}: {hit[0]}" for path in paths for hit in re.finditer(pattern, rust_code(path))]
    assert not found, f"{why}: {found}"


def test_comments_strings_and_tests_do_not_count_as_rust_code() -> None:
    text = (
        '// unsafe\nfn f() { "unsafe" }\n#[cfg(test)]\nmod tests { fn g() { unsafe { h() } } }\nfn k() { sched::x() }\n'
    )
    code = without_rust_tests(blank_rust(text))
    assert "unsafe" not in code
    assert "sched::x" in code


def test_the_core_forbids_unsafe_code() -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / "rust/kvlite-core/src/lib.rs").read_text()
