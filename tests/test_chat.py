"""`kvlite chat`: the conversation grows by question and answer, commands work, Ctrl-C stops one answer."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvlite.chat import Conversation, read_document
from kvlite.errors import ConfigError, InvalidRequestError
from kvlite.types import Delta, FinishReason


class ScriptedEngine:
    """Gives the deltas it was told to; the tokenizer hands the messages through."""

    def __init__(self, *texts: str, interrupt_after: int = -1) -> None:
        self.tokenizer = self
        self.texts = texts
        self.asked: list[Any] = []
        self.closed = 0
        self.fails = False
        self._interrupt_after = interrupt_after

    def encode_chat(self, messages: Any, documents: Any) -> Any:
        self.documents = [document.text for document in documents]
        if messages[-1]["content"] == "too long":
            raise InvalidRequestError("prompt", "has 9 tokens, at most 8 fit")
        return messages

    def stream(self, messages: Any) -> Iterator[Delta]:
        self.asked.append(messages)
        try:
            if self.fails:
                yield Delta(1, 0, "Os", (), finish_reason=FinishReason.ERROR, error="a step failed")
                return
            for n, text in enumerate(self.texts):
                if n == self._interrupt_after:
                    os.kill(os.getpid(), signal.SIGINT)
                yield Delta(1, 0, text, ())
        finally:
            self.closed += 1


def conversation(engine: ScriptedEngine) -> tuple[Conversation, list[str]]:
    written: list[str] = []
    return Conversation(engine, written.append), written  # type: ignore[arg-type]


def test_an_answer_becomes_part_of_the_conversation():
    engine = ScriptedEngine(" Os", "lo")
    talk, written = conversation(engine)
    assert talk.say("/doc Nora lives in Oslo.")
    assert talk.say("Where does Nora live?")
    assert "".join(written) == " Oslo\n"
    assert talk.messages == [
        {"role": "document", "content": "Nora lives in Oslo."},
        {"role": "user", "content": "Where does Nora live?"},
        {"role": "assistant", "content": "Oslo"},
    ]
    talk.say("And Leon?")
    assert engine.asked[1] == [*talk.messages[:3], {"role": "user", "content": "And Leon?"}]


def test_an_answer_that_fails_says_so_and_is_not_part_of_the_conversation():
    engine = ScriptedEngine()
    engine.fails = True
    talk, written = conversation(engine)
    assert talk.say("Where does Nora live?")
    assert "".join(written) == "Os [a step failed]\n"
    assert talk.messages == [] and engine.closed == 1


def test_documents_from_files_go_with_every_question_and_outlive_a_reset(tmp_path: Path):
    (tmp_path / "homes.txt").write_text("Nora lives in Oslo.")
    document = read_document(str(tmp_path / "homes.txt"))
    assert document.title == "homes"
    engine = ScriptedEngine("Oslo")
    talk = Conversation(engine, lambda text: None, [document])  # type: ignore[arg-type]
    talk.say("/reset")
    talk.say("Where does Nora live?")
    assert engine.documents == ["Nora lives in Oslo."]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_file_that_is_no_document_is_named(content: bytes | None, tmp_path: Path):
    path = tmp_path / "notes"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="notes is no document: ") as caught:
        read_document(str(path))
    assert caught.value.field == "--document"


def test_commands_end_reset_and_help():
    talk, written = conversation(ScriptedEngine())
    assert talk.say("/doc x")
    assert talk.say("/reset")
    assert talk.messages == []
    assert talk.say("")
    assert talk.say("/dance")
    assert "unknown command /dance" in written[-1]
    assert not talk.say("/quit")


def test_ctrl_c_stops_the_answer_and_not_the_program():
    engine = ScriptedEngine("a", "b", "c", interrupt_after=1)
    talk, written = conversation(engine)
    handler = signal.getsignal(signal.SIGINT)
    assert talk.say("go on")
    assert "".join(written) == "ab [stopped]\n"
    assert engine.closed == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert talk.messages[-1]["content"] == "ab"


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was():
    talk, written = conversation(ScriptedEngine("x"))
    assert talk.say("too long")
    assert "has 9 tokens" in written[0]
    assert talk.messages == []
