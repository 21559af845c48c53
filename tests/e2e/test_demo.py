"""`kvlite demo` as a user runs it."""

import re
import subprocess
import sys

import pytest

from kvlite.demo import Answer, Console, DemoError, read_script, verdict, wait_until_ready


def test_the_demo_answers_from_the_documents_and_shows_the_hit():
    code = "from kvlite.cli import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    script = read_script()
    for text in (*script.documents, *(question.question for question in script.questions)):
        assert text.split()[-1] in done.stdout
    assert len(re.findall(r"\bright\b", done.stdout)) == len(script.questions), "every answer is right"
    assert "prefix hit, median of 7" in done.stdout
    assert "stopped on SIGTERM with status 0" in done.stdout


@pytest.mark.parametrize(
    ("answers", "status", "says"),
    [
        ([Answer("", 1.0, 100, 0), Answer("x", 0.1, 100, 90)], 0, "an answer is empty"),
        ([Answer("x", 1.0, 100, 0), Answer("x", 0.1, 100, 0)], 0, "did not find the documents"),
        ([Answer("x", 1.0, 100, 0), Answer("x", 0.1, 100, 90)], 1, "ended with status 1"),
    ],
)
def test_the_demo_fails_when_a_promise_is_broken(answers: list[Answer], status: int, says: str):
    console = Console(record=True)
    assert verdict(console, answers, status) == 1
    assert says in console.export_text()


def test_a_server_that_ends_before_it_is_ready_is_reported_at_once():
    server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DemoError, match="ended with status 3"):
        wait_until_ready(server, 9, within_s=60)
