"""The file of answers: whole lines only, one writer, never another batch's, and nothing lost when the disk is full."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvlite.batch import sink as module
from kvlite.batch.sink import OutputError, Sink
from kvlite.batch.source import Source
from kvlite.errors import ConfigError
from tests.batch.lines import line, read, source_of

MODEL = "m"
IDS = ("a", "b", "c")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    with source_of(tmp_path / "in.jsonl", *(line(id) for id in IDS)) as made:
        yield made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def fill(out: Path, source: Source, *ids: str) -> Sink:
    """Answers those, and gives the closed sink."""
    with Sink(out, source, MODEL) as sink:
        for id in ids:
            sink.append(source.by_custom_id[id], 200, {"model": MODEL, "choices": [id]})
    return sink


def test_a_line_names_its_request_and_is_shaped_as_openai_shapes_it(out: Path, source: Source) -> None:
    fill(out, source, "b")
    value = read(out)["b"]
    assert list(value) == ["id", "custom_id", "response", "error"] and value["error"] is None
    assert value["id"] == source.by_custom_id["b"].id
    assert list(value["response"]) == ["status_code", "request_id", "body"]
    assert value["response"]["body"] == {"model": MODEL, "choices": ["b"]}


def test_an_interruption_at_any_byte_loses_no_whole_line_and_keeps_no_half_one(out: Path, source: Source) -> None:
    fill(out, source, "a", "b")
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        with Sink(out, source, MODEL) as sink:
            kept = first if first <= cut < len(whole) else len(whole) if cut == len(whole) else 0
            assert len(sink.answered) == [0, first, len(whole)].index(kept)
            assert sink.num_cut_bytes == cut - kept
            assert out.read_bytes() == whole[:kept]
            for id in ("a", "b", "c")[len(sink.answered) :]:
                sink.append(source.by_custom_id[id], 200, {"model": MODEL, "choices": [id]})
        assert set(read(out)) == set(IDS)


def test_zeros_where_the_disk_lost_a_page_are_cut_off_with_what_follows(out: Path, source: Source) -> None:
    fill(out, source, "a", "b")
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for damaged in (whole[:first] + bytes(50), whole[:first] + bytes(20) + whole[first + 20 :]):
        out.write_bytes(damaged)
        assert fill(out, source).answered == {"a"}
        assert out.read_bytes() == whole[:first]


@pytest.mark.parametrize("foreign", [b"notes\n", b"{}\n", b"\0" * 64, b'{"id": "other', b"\x93NUMPY" * 9])
def test_a_file_that_is_none_of_ours_is_refused_and_not_touched(out: Path, source: Source, foreign: bytes) -> None:
    out.write_bytes(foreign)
    with pytest.raises(ConfigError, match="line 1 was not written by kvlite batch"):
        Sink(out, source, MODEL)
    assert out.read_bytes() == foreign


def test_a_foreign_line_behind_ours_is_refused_by_its_number(out: Path, source: Source) -> None:
    fill(out, source, "a")
    before = out.read_bytes() + b"notes"
    out.write_bytes(before)
    with pytest.raises(ConfigError, match="line 2 was not written by kvlite batch"):
        Sink(out, source, MODEL)
    assert out.read_bytes() == before


def test_answers_to_another_input_are_refused_even_with_the_same_custom_ids(
    tmp_path: Path, out: Path, source: Source
) -> None:
    fill(out, source, "a", "b")
    before = out.read_bytes()
    for others in ([line("x")], [line("a"), line("b", "another prompt")]):
        with (
            source_of(tmp_path / "other.jsonl", *others) as other,
            pytest.raises(ConfigError, match=r"line \d answers another request than any of .*other.jsonl"),
        ):
            Sink(out, other, MODEL)
    assert out.read_bytes() == before


def test_lines_may_be_added_to_the_input_and_removed_from_the_output(tmp_path: Path, out: Path, source: Source) -> None:
    fill(out, source, "a", "b")
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[1])
    with source_of(tmp_path / "more.jsonl", *(line(id) for id in (*IDS, "d"))) as more:
        assert fill(out, more).answered == {"b"}


def test_a_second_answer_an_unreadable_one_and_one_of_another_model_are_named(out: Path, source: Source) -> None:
    fill(out, source, "a")
    whole = out.read_bytes()
    for bad, says in (
        (whole * 2, "line 2 answers 'a' a second time"),
        (whole + whole[:-3] + b"\n", "line 2 cannot be read: remove it"),
        (whole.replace(b'"model": "m"', b'"model": "n"'), "line 1 was answered by the model 'n', this run has 'm'"),
    ):
        out.write_bytes(bad)
        with pytest.raises(ConfigError, match=says):
            Sink(out, source, MODEL)


def test_one_writer_at_a_time(out: Path, source: Source) -> None:
    with Sink(out, source, MODEL), pytest.raises(OutputError, match="is being written by another run"):
        Sink(out, source, MODEL)
    assert fill(out, source, "a").answered == {"a"}


def test_the_requests_are_no_place_for_the_answers(source: Source) -> None:
    before = source.path.read_bytes()
    with pytest.raises(ConfigError, match="is the file of requests"):
        Sink(source.path, source, MODEL)
    assert source.path.read_bytes() == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes of this process that pass `size` fail, as on a full disk: after a part of them was written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_every_whole_line_and_says_how_to_go_on(out: Path, source: Source) -> None:
    fill(out, source, "a")
    whole = out.read_bytes()
    with (
        file_size_limit(len(whole) + 40),
        pytest.raises(OutputError, match=r"cannot be written: File too large; 1 answers are in it, and the same"),
        Sink(out, source, MODEL) as sink,
    ):
        sink.append(source.by_custom_id["b"], 200, {"model": MODEL})
    assert out.read_bytes() == whole
    assert fill(out, source, "b", "c").answered == set(IDS)
    assert set(read(out)) == set(IDS)


def test_a_disk_that_will_not_keep_what_it_took_is_an_error(
    out: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OutputError, match="Input/output error"), Sink(out, source, MODEL) as sink:
        sink.append(source.by_custom_id["a"], 200, {})
        monkeypatch.setattr(os, "fsync", fail)
        sink.sync()


def test_the_disk_is_asked_once_per_interval_and_at_the_end(
    out: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Sink(out, source, MODEL) as sink:
        monkeypatch.setattr(os, "fsync", lambda _: synced.append(out.read_bytes().count(b"\n")))
        for id, at in (("a", 0.5), ("b", 1.0)):
            now[0] = at
            sink.append(source.by_custom_id[id], 200, {})
            sink.sync_when_due()
        assert synced == [2]
        sink.sync_when_due()
        sink.append(source.by_custom_id["c"], 200, {})
        sink.sync_when_due()
        assert synced == [2], "nothing new, then too early"
    assert synced == [2, 3]
    assert json.loads(out.read_bytes().splitlines()[2])["custom_id"] == "c"
