"""The file of requests: every bad line is named before anything runs, and lines that begin alike are fed together."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvlite.batch.source import CHAT_URL, PROBLEMS_SHOWN, Source, feeding_order
from kvlite.errors import ConfigError
from tests.batch.lines import BODY_BYTES, line, source_of, write

GOOD = line("good")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "not JSON at column 2"),
        ("[]", "must be a JSON object"),
        ('{"custom_id": "a", "custom_id": "b"}', 'key "custom_id" appears twice'),
        (GOOD | {"custom_id": ""}, "custom_id: .* 1 to 512 characters"),
        (GOOD | {"custom_id": "x" * 513}, "custom_id: .* at most 512 characters"),
        (GOOD | {"custom_id": 3}, "custom_id: 3 is not allowed"),
        ({**GOOD, "custom_id": None}, "custom_id: null is not allowed"),
        (GOOD, 'custom_id: "good" is that of line 1 already'),
        (line("a") | {"method": "GET"}, 'method: "GET" is not allowed: must be one of POST'),
        (line("a") | {"url": "/v1/embeddings"}, "url: .* must be one of /v1/chat/completions, /v1/completions"),
        (line("a") | {"body": []}, "body: .* must be an object"),
        (line("a") | {"body": None}, "body: .* must be an object"),
        (line("a") | {"priority": 1}, "priority: unknown field: allowed are custom_id, method, url, body"),
        (line("a", "x" * (2 * BODY_BYTES)), "is longer than .* raise --max-body-bytes"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_what_is_wrong(tmp_path: Path, bad: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"1 line is no request, so nothing was run\n  line 2: {says}"):
        source_of(tmp_path / "in.jsonl", GOOD, bad)


def test_the_first_bad_lines_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path / "in.jsonl", *["{"] * (PROBLEMS_SHOWN + 3))
    rows = caught.value.message.splitlines()
    assert rows[0].startswith(f"{PROBLEMS_SHOWN + 3} lines are no request")
    assert [row.strip()[:7] for row in rows[1:]] == [*(f"line {n}:" for n in range(1, PROBLEMS_SHOWN + 1)), "and 3 m"]


def test_a_file_that_is_not_there_or_no_file_is_said(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "missing", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ConfigError, match=says):
            Source(path, BODY_BYTES)


def test_every_line_is_read_again_as_it_was_blank_ones_skipped(tmp_path: Path) -> None:
    lines = [line("ä", "Öl"), line("b", [1, 2]), line("c") | {"url": CHAT_URL, "body": {"messages": []}}]
    with source_of(tmp_path / "in.jsonl", lines[0], "", *lines[1:], "  ") as source:
        assert [entry.number for entry in source.entries] == [1, 3, 4]
        for entry, asked in list(zip(source.entries, lines, strict=True))[::-1]:
            found = source.read(entry)
            assert (found.custom_id, found.url, found.body) == (asked["custom_id"], asked["url"], asked["body"])


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    with source_of(tmp_path / "in.jsonl", line("a", "one")) as source:
        write(tmp_path / "in.jsonl", line("a", "two"))
        with pytest.raises(ConfigError, match="line 1 was changed during the run"):
            source.read(source.entries[0])


def groups_of(order: list[str]) -> int:
    """Runs of neighbours with the same beginning."""
    return sum(a != b for a, b in pairwise(order)) + 1


def test_lines_that_begin_alike_are_fed_one_after_the_other_where_the_queue_binds(tmp_path: Path) -> None:
    documents = {f"{outer}{inner}": f"{outer}" * 700 + f"{inner}" * 700 for outer in "xy" for inner in "ab"}
    lines = [line(f"{name}{n}", text + f" question {n}") for name, text in documents.items() for n in range(10)]
    random.Random(1).shuffle(lines)
    with source_of(tmp_path / "in.jsonl", *lines) as source:
        fed = [entry.custom_id for entry in feeding_order(source.entries, 8)]
        assert sorted(fed) == sorted(entry.custom_id for entry in source.entries)
        assert groups_of([name[:2] for name in fed]) == 4 and groups_of([name[0] for name in fed]) == 2
        assert feeding_order(source.entries, len(lines)) == source.entries, "the core sees all: it decides"
