"""`kvlite chat`: the conversation grows by question and answer, commands work, Ctrl-C stops one answer."""

import os
import signal
from collections.abc import Iterator
from typing import Any

from kvlite.chat import Conversation
from kvlite.errors import InvalidRequestError
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

    def apply_chat_template(self, messages: Any) -> Any:
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
