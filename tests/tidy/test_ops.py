"""Every op under kernels/ is whole: README, torch reference, Triton kernel, a test, a line in ops.py."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.tidy.sources import read, repository_files

PARTS = ("README.md", "__init__.py", "reference.py", "kernel.py")
README_LENGTH = 400


def missing_parts(files: Iterable[str], ops_source: str) -> list[str]:
    """What an op lacks; files are repository paths."""
    files = set(files)
    ops = sorted({name.split("/")[1] for name in files if re.fullmatch(r"kernels/[a-z]\w*/[^/]+", name)})
    found: list[str] = []
    for op in ops:
        found += [f"kernels/{op}/{part} is missing" for part in PARTS if f"kernels/{op}/{part}" not in files]
        if not any(re.fullmatch(rf"tests/kernels/(.*/)?test_{op}\w*\.py", name) for name in files):
            found.append(f"tests/kernels/test_{op}.py is missing")
        if not re.search(rf"kernels(\.|/|\s+import\s+(.*\b)?){op}\b", ops_source):
            found.append(f"{op} has no line in ops.py")
    return found


def test_every_op_is_whole() -> None:
    files = [path.as_posix() for path in repository_files()]
    assert sum(name.startswith("kernels/") for name in files) > 6
    found = missing_parts(files, read(Path("python/kvlite/ops.py")))
    assert not found, "\n".join(["", *found])


def test_every_op_explains_itself() -> None:
    short = [
        path for path in repository_files() if path.match("kernels/*/README.md") and len(read(path)) < README_LENGTH
    ]
    assert short == [], "maths, shapes, layout and sources do not fit in so few words"


def test_a_missing_part_is_caught() -> None:
    whole = [f"kernels/rope/{part}" for part in PARTS] + ["tests/kernels/test_rope.py"]
    source = "from kvlite.kernels.rope import reference\n"
    assert missing_parts(whole, source) == []
    assert missing_parts(whole[1:], source) == ["kernels/rope/README.md is missing"]
    assert missing_parts(whole[:-1], source) == ["tests/kernels/test_rope.py is missing"]
    assert missing_parts(whole, "from kvlite.kernels.ropes import x\n") == ["rope has no line in ops.py"]
