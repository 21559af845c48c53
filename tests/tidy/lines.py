"""`make lines`: lines of code by part, beside its budget. Blank lines, comments, docstrings and tests do not count."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tidy.sources import blank_rust, read, sources, without_rust_tests

BUDGET = {
    "rust/kvlite-core/src": 5000,
    "rust/kvlite-cpu/src": 2000,
    "rust/kvlite-py/src": 600,
    "python/kvlite": 8000,
    "kernels": 1500,
    "bench": 3000,
}


def code_lines(path: Path) -> int:
    """Lines of `path` that hold code."""
    if path.suffix == ".rs":
        return sum(bool(line.strip()) for line in without_rust_tests(blank_rust(read(path))).splitlines())
    text = read(path)
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(number not in docs and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


def count() -> dict[str, int]:
    """Code lines of every part that has a budget."""
    return {part: sum(map(code_lines, sources(".py", ".rs", under=part + "/"))) for part in BUDGET}


def main() -> None:
    """Writes the table; a part over its budget is marked."""
    rows = count()
    for part, lines in rows.items():
        over = "  over" if lines > BUDGET[part] else ""
        sys.stdout.write(f"{part:22} {lines:6} of {BUDGET[part]:5}{over}\n")
    sys.stdout.write(f"{'together':22} {sum(rows.values()):6} of {sum(BUDGET.values()):5}\n")
    tests = sum(map(code_lines, sources(".py", ".rs", under="tests/")))
    tests += sum(code_lines(path) for path in sources(".rs", under="rust/") if "tests" in path.parts)
    sys.stdout.write(f"{'tests':22} {tests:6}\n")


if __name__ == "__main__":
    main()
