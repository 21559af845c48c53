"""The file tree in README.md is the disk: nothing listed is missing, nothing at a listed level is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.tidy.sources import read, repository_files

HEADING = "## The tree"


def tree_block(text: str) -> str:
    """The fenced block under HEADING."""
    found = re.search(re.escape(HEADING) + r"\n.*?```\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no fenced block under {HEADING!r}"
    return found[1]


def listed_paths(block: str) -> list[str]:
    """Paths of the tree, folders with a slash at their end. Indentation nests; two spaces end the names of a line."""
    stack: list[tuple[int, str]] = [(-1, "")]
    paths: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        while stack[-1][0] >= indent:
            stack.pop()
        names = re.split(r"\s{2,}", line.strip(), maxsplit=1)[0].split(" ")
        paths += [stack[-1][1] + name for name in names]
        stack.append((indent, stack[-1][1] + names[0]))
    return paths


def disagreements(paths: list[str], files: Iterable[str]) -> list[str]:
    """What the tree and the disk do not agree on. A folder with no entries below it is shown closed."""
    on_disk: dict[str, set[str]] = {}
    for name in files:
        parts = name.split("/")
        for depth in range(len(parts)):
            parent = "".join(part + "/" for part in parts[:depth])
            on_disk.setdefault(parent, set()).add(parent + parts[depth] + ("/" if depth + 1 < len(parts) else ""))
    listed: dict[str, set[str]] = {"": set()}
    for path in paths:
        listed.setdefault(re.sub(r"[^/]+/?$", "", path), set()).add(path)
    found = [f"listed twice: {path}" for path in sorted(set(paths)) if paths.count(path) > 1]
    for parent, entries in listed.items():
        found += [f"not on disk: {path}" for path in sorted(entries - on_disk.get(parent, set()))]
        found += [f"not in the tree: {path}" for path in sorted(on_disk.get(parent, set()) - entries)]
    return found


def test_the_tree_in_the_readme_is_the_disk() -> None:
    paths = listed_paths(tree_block(read(Path("README.md"))))
    found = disagreements(paths, [path.as_posix() for path in repository_files()])
    assert not found, "\n".join(["", *found])


def test_a_missing_an_unlisted_and_a_doubled_file_are_caught() -> None:
    block = "README.md    what it is\nsrc/    code\n  a.py b.py    two names\ntests/    closed\n"
    paths = listed_paths(block)
    assert paths == ["README.md", "src/", "src/a.py", "src/b.py", "tests/"]
    disk = ["README.md", "src/a.py", "src/b.py", "tests/x/test_a.py"]
    assert disagreements(paths, disk) == []
    assert disagreements(paths, [*disk, "src/c.py"]) == ["not in the tree: src/c.py"]
    assert disagreements(paths, [*disk, "Makefile"]) == ["not in the tree: Makefile"]
    assert disagreements(paths, disk[:2] + disk[3:]) == ["not on disk: src/b.py"]
    assert disagreements([*paths, "src/a.py"], disk) == ["listed twice: src/a.py"]
