"""Steps of an installation: what a failed one says, what a second run does, what another version removes."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from kvlite.bench import install_peers
from kvlite.bench.errors import BenchError
from kvlite.bench.install_peers import Steps, install, main, unpack


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_peers, "PEERS", tmp_path)


def test_a_step_that_fails_names_itself_its_status_and_its_last_lines() -> None:
    steps = Steps("one")
    code = "print('[3/9] a.o'); print('no such compiler'); raise SystemExit(7)"
    with pytest.raises(BenchError, match=r"(?s)one: compile failed with status 7.*no such compiler"):
        steps.run("compile", [sys.executable, "-c", code])
    assert "no such compiler" in steps.log.read_text()
    with pytest.raises(BenchError, match="one: configure: /no/cmake: No such file"):
        steps.run("configure", ["/no/cmake"])


def test_a_complete_peer_is_left_alone_and_another_version_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def note(steps: Steps) -> None:
        seen.append(sorted(path.name for path in steps.home.iterdir()))
        (steps.home / "program").touch()

    for version in ("x==1", "x==1", "x==2"):
        monkeypatch.setattr(install_peers, "INSTALLERS", {"x": (version, note)})
        install("x")
    assert seen == [["version"], ["version"]], "the second run did nothing, the third found an empty folder"
    assert (tmp_path / "x/version").read_text() == "x==2"


def test_an_interrupted_peer_goes_on_with_what_it_has_and_the_others_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(steps: Steps) -> None:
        (steps.home / "half").touch()
        raise BenchError("no disk")

    monkeypatch.setattr(install_peers, "INSTALLERS", {"a": ("a==1", fail), "b": ("b==1", lambda steps: None)})
    with pytest.raises(BenchError, match="not installed: a; run it again"):
        main([])
    assert (tmp_path / "b/complete").exists()
    assert (tmp_path / "a/half").exists()
    assert not (tmp_path / "a/complete").exists()


def test_an_unknown_peer_is_refused_by_name() -> None:
    with pytest.raises(BenchError, match="'sglang' is no peer to install: vllm, llamacpp"):
        main(["sglang"])


def test_the_sources_come_out_of_the_sdist_whole(tmp_path: Path) -> None:
    archive = tmp_path / "s.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in ("s-1/vendor/llama.cpp/CMakeLists.txt", "s-1/setup.py"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    (tmp_path / "source.partial").mkdir()
    unpack(archive, tmp_path / "source")
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["CMakeLists.txt"]
    assert not (tmp_path / "source.partial").exists()
