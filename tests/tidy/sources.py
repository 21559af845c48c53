"""What belongs to the repository, and text without strings and comments: shared by the tidy tests and `make lines`.

Knows git only through `ls-files` (tracked files and new ones that are not ignored), so build outputs never count.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUST_NOISE = re.compile(
    r'//[^\n]*|/\*.*?\*/|\bb?r(?P<hash>#*)".*?"(?P=hash)|\bb?"(?:\\.|[^"\\])*"|"(?:\\.|[^"\\])*"|b?\'(?:\\[^\n]+?|[^\'\\\n])\'',
    re.DOTALL,
)


@cache
def repository_files() -> tuple[Path, ...]:
    """Paths relative to ROOT, sorted. Symbolic links are listed as themselves, never followed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {Path(name) for name in listed.split("\0") if name}
    return tuple(sorted(path for path in paths if (ROOT / path).exists()))


def sources(*suffixes: str, under: str = "") -> list[Path]:
    """Files of our own with one of `suffixes`, below the folder `under`."""
    return [path for path in repository_files() if path.suffix in suffixes and path.as_posix().startswith(under)]


def read(path: Path) -> str:
    """Text of a repository file."""
    return (ROOT / path).read_text(encoding="utf-8")


def blank_rust(text: str) -> str:
    """Rust source with comments, strings and character literals blanked; lines stay where they are."""
    return RUST_NOISE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


def rust_block_end(blanked: str, start: int) -> int | None:
    """Index of the brace that closes the first `{` at or after `start`; None if a `;` ends the item before it."""
    depth = 0
    for found in re.finditer(r"[{};()\[\]]", blanked[start:]):
        token = found.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
            if token == "}" and depth == 0:
                return start + found.start()
        elif depth == 0:
            return None
    return None


def without_rust_tests(blanked: str) -> str:
    """Blanked Rust source without its `#[cfg(test)]` items."""
    while (found := re.search(r"#\[cfg\(test\)\]", blanked)) is not None:
        end = rust_block_end(blanked, found.end())
        rest = blanked[end + 1 :] if end is not None else blanked[blanked.index(";", found.end()) + 1 :]
        blanked = blanked[: found.start()] + rest
    return blanked
