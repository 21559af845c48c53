"""`kvlite demo` as a user runs it."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kvlite.demo import Answer, Console, DemoError, Pair, read_script, verdict, wait_until_ready


def test_the_demo_answers_from_the_documents_and_shows_both_kinds_of_reuse():
    code = "from kvlite.cli import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    script = read_script()
    for text in (*script.documents, *(question.question for question in script.questions)):
        assert text.split()[-1] in done.stdout
    prefix, blend = done.stdout.split("known to the server")
    assert len(re.findall(r"\bright\b", prefix)) == len(script.questions), "every answer is right"
    assert "prefix hit, median of 7" in prefix
    assert len(re.findall(r"exact .*\bright\b", blend)) == len(script.reordered), "the orders keep the answers"
    assert len(re.findall(r"blended .*\bright\b", blend)) > len(script.reordered) // 2
    assert f"median of {len(script.reordered)}" in blend
    assert "stopped on SIGTERM with status 0" in done.stdout


def test_the_orders_of_the_demo_are_orders():
    script = read_script()
    numbers = set(range(1, len(script.documents) + 1))
    assert all(set(item.order) == numbers and len(item.order) == len(numbers) for item in script.reordered)
    assert len({item.order[:2] for item in script.reordered}) == len(script.reordered), "no prefix hit among them"


COLD, HIT = Answer("x", 1.0, 100, 0), Answer("x", 0.1, 100, 90)
BLENDED = Answer("x", 0.1, 100, 80, {"blended_tokens": 80})


@pytest.mark.parametrize(
    ("answers", "blended", "status", "says"),
    [
        ([Answer("", 1.0, 100, 0), HIT], BLENDED, 0, "an answer is empty"),
        ([COLD, HIT], replace(BLENDED, text=" "), 0, "an answer is empty"),
        ([COLD, COLD], BLENDED, 0, "did not find the documents in the cache"),
        ([COLD, HIT], replace(BLENDED, reuse={"blended_tokens": 0}), 0, "did not find the documents in the store"),
        ([COLD, HIT], BLENDED, 1, "ended with status 1"),
    ],
)
def test_the_demo_fails_when_a_promise_is_broken(answers: list[Answer], blended: Answer, status: int, says: str):
    console = Console(record=True)
    pairs = [Pair(read_script().questions[0], (1, 2), blended, COLD)]
    assert verdict(console, answers, pairs, status) == 1
    assert says in console.export_text()


def test_a_server_that_ends_before_it_is_ready_is_reported_at_once():
    server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DemoError, match="ended with status 3"):
        wait_until_ready(server, 9, within_s=60)
