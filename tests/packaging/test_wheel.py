"""The wheel is whole: installed without its dependencies, far from the source tree, it generates.

Builds once per run with maturin; cargo's target folder is shared with `make build`, so nothing compiles twice. The
fresh environment sees the installed packages through a .pth line, which leaves out the editable kvlite (nested .pth
files are not read).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What importing Engine may not need: the packages of the server and the command line, and those of the tests.
UNNEEDED = (
    "fastapi", "starlette", "uvicorn", "typer", "click", "rich", "prometheus_client", "msgspec", "pydantic", "jinja2",
    "transformers", "huggingface_hub", "httpx", "openai", "pytest",
)  # fmt: skip


def _maturin(*arguments: str) -> None:
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYO3_PYTHON": sys.executable}
    command = [Path(sys.executable).parent / "maturin", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _maturin("build", "--release", "--out", str(out))
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and the installed packages, but neither the source tree nor its editable install."""
    home = tmp_path_factory.mktemp("outside") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, text=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(python: Path, code: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KVLITE_"))}
    code = textwrap.dedent(code)
    done = subprocess.run([python, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_serves_every_python_from_3_11(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_the_wheel_holds_extension_kernels_model_bench_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ops = [path.name for path in (ROOT / "kernels").iterdir() if (path / "kernel.py").exists()]
    assert len(ops) >= 6
    wanted = {f"kvlite/kernels/{op}/{part}" for op in ops for part in ("__init__.py", "kernel.py", "reference.py")}
    wanted |= {f"kvlite/model/{part}" for part in ("model.safetensors", "config.json", "tokenizer.json")}
    wanted |= {"kvlite/_core.abi3.so", "kvlite/_core.pyi", "kvlite/py.typed", "kvlite/bench/core.py"}
    assert wanted - names == set()
    assert [name for name in names if "__pycache__" in name or name.startswith(("kernels/", "bench/", "tests/"))] == []


def test_the_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    _maturin("sdist", "--out", str(tmp_path))
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "rust/kvlite-py/src/lib.rs"}
    wanted |= {
        "rust/kvlite-core/src/plan.rs",
        "rust/kvlite-cpu/src/lib.rs",
        "python/kvlite/kernels/attention/kernel.py",
    }
    wanted |= {"python/kvlite/model/model.safetensors", "python/kvlite/bench/core.py", "python/kvlite/_core.pyi"}
    assert wanted - names == set()


def test_the_installed_wheel_generates_outside_the_source_tree(outside: Path, tmp_path: Path) -> None:
    printed = _run(
        outside,
        """
        import kvlite
        from kvlite import Engine, SamplingParams
        with Engine() as engine:
            output, = engine.generate(["The"], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        print(kvlite.__file__)
        print(len(output.outputs[0].token_ids))
        """,
        tmp_path,
    )
    where, count = printed.splitlines()[-2:]
    assert Path(where).is_relative_to(outside.parents[1])
    assert not Path(where).is_relative_to(ROOT)
    assert int(count) == 8


def test_the_engine_needs_none_of_the_servers_packages(outside: Path, tmp_path: Path) -> None:
    printed = _run(
        outside,
        f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {UNNEEDED!r}:
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, Absent())
        from kvlite import AsyncEngine, Engine, SamplingParams
        import kvlite.bench.core
        with Engine() as engine:
            output, = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
        try:
            import fastapi
        except ModuleNotFoundError:
            print("absent", len(output.outputs[0].token_ids))
        """,
        tmp_path,
    )
    assert printed.splitlines()[-1] == "absent 2"
