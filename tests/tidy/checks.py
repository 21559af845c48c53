"""The style rules as functions from a path and its text to findings; a finding is one sentence that names the place.

Pure: they see text only, so that the tests can feed them small bad inputs. Run over the repository by test_style.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.tidy.sources import blank_rust, rust_block_end

FILE_LIMIT = 400
FUNCTION_LIMIT = 70
KERNEL_FUNCTION_LIMIT = 120

FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "dill", "cloudpickle", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("joblib", "load")}


def too_long_file(path: Path, text: str) -> list[str]:
    """A file has fewer than FILE_LIMIT lines."""
    lines = text.count("\n")
    return [f"{path}: {lines} lines, the limit is {FILE_LIMIT}"] if lines >= FILE_LIMIT else []


def too_long_functions(path: Path, text: str) -> list[str]:
    """A function has fewer than FUNCTION_LIMIT lines, in kernels/ fewer than KERNEL_FUNCTION_LIMIT."""
    limit = KERNEL_FUNCTION_LIMIT if path.parts[0] == "kernels" else FUNCTION_LIMIT
    spans = _python_functions(text) if path.suffix == ".py" else _rust_functions(text)
    return [
        f"{path}:{line} {name}: {length} lines, the limit is {limit}" for name, line, length in spans if length >= limit
    ]


def _python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def _rust_functions(text: str) -> Iterator[tuple[str, int, int]]:
    blanked = blank_rust(text)
    for found in re.finditer(r"\bfn\s+(\w+)", blanked):
        end = rust_block_end(blanked, found.end())
        if end is not None:
            first = blanked.count("\n", 0, found.start()) + 1
            yield found[1], first, blanked.count("\n", 0, end) + 2 - first


def missing_header(path: Path, text: str) -> list[str]:
    """A module begins by saying what it is: a docstring in Python, `//!` in Rust. An empty package file needs none."""
    if path.suffix == ".rs":
        first = next((line for line in text.splitlines() if line.strip()), "")
        return [] if first.startswith("//!") and len(first) > 20 else [f"{path}: no `//!` header on its first line"]
    if path.name == "__init__.py" and not text.strip():
        return []
    header = ast.get_docstring(ast.parse(text))
    return [] if header and len(header) > 20 else [f"{path}: no module docstring"]


def forbidden_calls(path: Path, text: str) -> list[str]:
    """Nothing that runs code out of bytes: pickle and its kin, torch.load, eval, exec, yaml.load."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        name = ""
        if isinstance(node, ast.Import):
            name = next((alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES), "")
        elif isinstance(node, ast.ImportFrom):
            pairs = {(node.module or "", alias.name) for alias in node.names}
            name = next((f"{a}.{b}" for a, b in pairs if a.split(".")[0] in FORBIDDEN_MODULES), "")
            name = name or next((f"{a}.{b}" for a, b in pairs & FORBIDDEN_ATTRIBUTES), "")
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            name = ".".join(pair) if pair in FORBIDDEN_ATTRIBUTES else ""
        if name:
            found.append(f"{path}:{node.lineno} {name}: runs code that came as bytes")  # type: ignore[attr-defined]
    return found


def swallowed_errors(path: Path, text: str) -> list[str]:
    """No bare `except:` and no `except Exception` whose body only passes."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
        )
        only_passes = all(
            isinstance(part, ast.Pass | ast.Continue)
            or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            for part in node.body
        )
        if node.type is None or (broad and only_passes):
            found.append(f"{path}:{node.lineno} an error is swallowed unseen")
    return found


def prints(path: Path, text: str) -> list[str]:
    """The package never calls print; the command line writes through typer, rich or sys.stdout."""
    return [
        f"{path}:{node.lineno} print"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def unfinished(path: Path, text: str) -> list[str]:
    """No marker of unfinished work in a comment or text."""
    marker = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    return [f"{path}:{n} {hit[0]}" for n, line in enumerate(text.splitlines(), 1) if (hit := marker.search(line))]


def machine_paths(path: Path, text: str) -> list[str]:
    """No absolute path of somebody's machine."""
    home = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users|farm|mnt)/\w")
    return [f"{path}:{n} {line.strip()[:60]}" for n, line in enumerate(text.splitlines(), 1) if home.search(line)]


def tests_without_claim(path: Path, text: str) -> list[str]:
    """A test can fail: it asserts, expects an error, or calls a checker that says so by its name."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            body = ast.unparse(node)
            if not re.search(r"\bassert|raises|\bassert_\w+|\bcheck\w*\(|\bexpect\w*\(|\bverify\w*\(", body):
                found.append(f"{path}:{node.lineno} {node.name}: asserts nothing")
    return found
