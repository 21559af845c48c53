"""`kvlite chat`: a conversation in the terminal, on an Engine in this process.

Owns the conversation and its commands; knows the engine by its public face. Ctrl-C ends an answer between two tokens,
never inside a step. Called by cli.py.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import cast

from kvlite.config import EngineConfig
from kvlite.engine import Engine
from kvlite.errors import ConfigError, InvalidRequestError
from kvlite.reuse_types import TITLE_CEILING, Document
from kvlite.types import Delta, FinishReason

HELP = """\
/doc TEXT   add a document that later questions are about
/reset      forget the conversation and its documents
/help       this list
/quit       end (so does Ctrl-D); Ctrl-C stops an answer"""

Write = Callable[[str], object]


def chat(config: EngineConfig, paths: Sequence[str] = ()) -> None:
    """Read lines and answer them until /quit or the end of input. The files in `paths` are documents, there for good.

    Raises ConfigError for a file that cannot be one.
    """
    documents = [read_document(path) for path in paths]
    with Engine(config) as engine:
        engine.tokenizer.compile_templates()
        write = _to_terminal
        write(f"{engine.startup.model}\n{HELP}\n")
        conversation = Conversation(engine, write, documents)
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            if not conversation.say(line):
                return


def read_document(path: str) -> Document:
    """The text of a file. Raises ConfigError when it cannot be read, or is empty."""
    try:
        return Document(Path(path).read_text("utf-8"), title=Path(path).stem[:TITLE_CEILING])
    except (OSError, UnicodeDecodeError, InvalidRequestError) as error:
        raise ConfigError("--document", f"{path} is no document: {error}") from None


class Conversation:
    """Messages so far, and what one more line does to them."""

    def __init__(self, engine: Engine, write: Write, documents: Sequence[Document] = ()) -> None:
        self._engine = engine
        self._write = write
        self._documents = documents
        self.messages: list[dict[str, str]] = []

    def say(self, line: str) -> bool:
        """Carry out a command or answer a question; False when the conversation is over."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.messages.clear()
            case "/help":
                self._write(HELP + "\n")
            case "/doc":
                self.messages.append({"role": "document", "content": rest.strip()})
            case _ if command.startswith("/"):
                self._write(f"unknown command {command}\n{HELP}\n")
            case _:
                self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        parts: list[str] = []
        try:
            stream = self._engine.stream(self._engine.tokenizer.encode_chat(asked, self._documents))
        except InvalidRequestError as error:
            self._write(f"{error}\n/reset starts over\n")
            return
        # The engine gives a generator; closing it is how an answer is stopped.
        deltas = cast("Generator[Delta]", stream)
        with closing(deltas), _interruptible() as interrupted:
            for delta in deltas:
                parts.append(delta.text)
                self._write(delta.text)
                if delta.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT):
                    self._write(f" [{delta.error or delta.finish_reason}]\n")
                    return
                if interrupted():
                    self._write(" [stopped]")
                    break
        self._write("\n")
        self.messages = [*asked, {"role": "assistant", "content": "".join(parts).strip()}]


@contextmanager
def _interruptible() -> Generator[Callable[[], bool]]:
    """Ctrl-C sets a flag instead of raising in the middle of a step; gives the way to read it."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _to_terminal(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
