"""Every style rule holds over the repository, and every checker catches a small bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tidy import checks
from tests.tidy.sources import read, repository_files, sources

Checker = Callable[[Path, str], list[str]]

# Files and functions that stay over a limit, with the reason. The list may shrink, never grow without one.
RATCHET: dict[str, str] = {}

TEXT_SUFFIXES = {".py", ".rs", ".md", ".toml", ".yml", ".yaml", ".sh", ".pyi", ".txt"}


def _texts() -> list[Path]:
    named = {"Makefile", "run"}
    return [path for path in repository_files() if path.suffix in TEXT_SUFFIXES or path.name in named]


def _code() -> list[Path]:
    return sources(".py", ".rs")


def _package() -> list[Path]:
    return sources(".py", under="python/kvlite/")


RULES: list[tuple[Checker, Callable[[], list[Path]]]] = [
    (checks.too_long_file, _code),
    (checks.too_long_functions, _code),
    (checks.missing_header, _code),
    (checks.unfinished, _code),
    (checks.machine_paths, _texts),
    (checks.forbidden_calls, lambda: sources(".py")),
    (checks.swallowed_errors, lambda: sources(".py")),
    (checks.prints, _package),
    (checks.tests_without_claim, lambda: sources(".py", under="tests/")),
]


def _name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("checker", "files"), RULES, ids=_name)
def test_the_repository_keeps(checker: Checker, files: Callable[[], list[Path]]) -> None:
    paths = files()
    assert paths, "a rule that looks at no file cannot fail"
    found = [finding for path in paths for finding in checker(path, read(path))]
    found = [finding for finding in found if not any(finding.startswith(known) for known in RATCHET)]
    assert not found, "\n".join(["", *found])


def test_the_ratchet_holds_only_what_is_still_needed() -> None:
    rules = RULES if RATCHET else []
    found = [finding for checker, files in rules for path in files() for finding in checker(path, read(path))]
    assert [known for known in RATCHET if not any(finding.startswith(known) for finding in found)] == []


PY, RS, KERNEL = Path("python/kvlite/x.py"), Path("rust/x/src/x.rs"), Path("kernels/x/kernel.py")
BODY = "    pass\n"

BAD: list[tuple[Checker, Path, str]] = [
    (checks.too_long_file, PY, "x = 1\n" * 400),
    (checks.too_long_functions, PY, "def f():\n" + BODY * 69),
    (checks.too_long_functions, PY, "class A:\n    async def f():\n" + ("    " + BODY) * 69),
    (checks.too_long_functions, KERNEL, "def f():\n" + BODY * 119),
    (checks.too_long_functions, RS, "fn f<'a>(x: &'a str) {\n" + "    g(\"}\", '}');\n" * 68 + "}\n"),
    (checks.missing_header, PY, "import os\n"),
    (checks.missing_header, PY.parent / "__init__.py", "import os\n"),
    (checks.missing_header, PY, '"""Too short."""\n'),
    (checks.missing_header, RS, "use std::mem;\n//! Late: the first line is code.\n"),
    (checks.unfinished, PY, "# TO" + "DO: later\n"),
    (checks.unfinished, RS, "// FIX" + "ME later\n"),
    (checks.machine_paths, Path("README.md"), "see /ro" + "ot/notes\n"),
    (checks.machine_paths, PY, 'path = "/ho' + 'me/me/model"\n'),
    (checks.forbidden_calls, PY, "import pickle\n"),
    (checks.forbidden_calls, PY, "from marshal import loads\n"),
    (checks.forbidden_calls, PY, "from torch import load\n"),
    (checks.forbidden_calls, PY, "import torch\nx = torch.load(path)\n"),
    (checks.forbidden_calls, PY, "loader = yaml.load\n"),
    (checks.forbidden_calls, PY, "def f(text):\n    return eval(text)\n"),
    (checks.forbidden_calls, PY, "run = exec\n"),
    (checks.swallowed_errors, PY, "try:\n    f()\nexcept Exception:\n    pass\n"),
    (checks.swallowed_errors, PY, "try:\n    f()\nexcept:\n    g()\n"),
    (checks.swallowed_errors, PY, "for x in y:\n    try:\n        f()\n    except BaseException:\n        continue\n"),
    (checks.prints, PY, "def f():\n    print(1)\n"),
    (checks.tests_without_claim, Path("tests/test_x.py"), "def test_x():\n    f()\n"),
]


@pytest.mark.parametrize(("checker", "path", "text"), BAD, ids=_name)
def test_a_checker_catches(checker: Checker, path: Path, text: str) -> None:
    assert len(checker(path, text)) == 1


GOOD: list[tuple[Checker, Path, str]] = [
    (checks.missing_header, PY.parent / "__init__.py", ""),
    (checks.too_long_file, PY, "x = 1\n" * 399),
    (checks.too_long_functions, PY, "def f():\n" + BODY * 68),
    (checks.too_long_functions, KERNEL, "def f():\n" + BODY * 118),
    (checks.too_long_functions, RS, "fn f() {\n" + "    g(\"{\", '{', b'{'); // {\n" * 67 + "}\n"),
    (checks.too_long_functions, RS, "trait T {\n    fn f(&self, x: [u8; 2]);\n" + "    // later\n" * 99 + "}\n"),
    (checks.unfinished, PY, 'method = "todo_list"\n'),
    (checks.machine_paths, Path("README.md"), "curl http://host/home/x and tests/home/x\n"),
    (checks.forbidden_calls, PY, "import torch\ntorch.save\nmodel.eval()\nregex.compile('x')\n"),
    (checks.swallowed_errors, PY, "try:\n    f()\nexcept KeyError:\n    pass\n"),
    (checks.swallowed_errors, PY, "try:\n    f()\nexcept Exception:\n    log()\n    raise\n"),
    (checks.prints, PY, "console.print(1)\n"),
]


@pytest.mark.parametrize(("checker", "path", "text"), GOOD, ids=_name)
def test_a_checker_lets_pass(checker: Checker, path: Path, text: str) -> None:
    assert checker(path, text) == []
