"""`kvlite demo`: a real server process, real documents, questions over HTTP, and what reuse of their KV saved.

Owns the demonstration: the same documents in the same order (prefix hits, exact), then in orders never seen (blended).
Speaks OpenAI's wire format through the standard library, as any client would, and knows nothing of the engine. Fails
when an answer is empty, when nothing was reused, or when the server does not stop cleanly. Called by cli.py.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvlite.errors import KvliteError

HOST = "127.0.0.1"
READY_WITHIN_S = 180.0
STOP_WITHIN_S = 60.0
POLL_S = 0.05
REQUEST_TIMEOUT_S = 120.0
EXIT_FAILED = 1


class DemoError(KvliteError):
    """The demonstration could not be given; the message says why."""


@dataclass(frozen=True)
class Question:
    """One question with its known answer and where that answer comes from."""

    question: str
    answer: str
    why: str


@dataclass(frozen=True)
class Reordered:
    """A question over the same documents in an order of its own."""

    question: int
    """Its number, from 1."""
    order: tuple[int, ...]
    """Numbers of the documents, from 1."""


@dataclass(frozen=True)
class Script:
    """What demo_documents.json holds."""

    system: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    reordered: tuple[Reordered, ...]

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation: system, every document, the question."""
        documents = [{"role": "document", "content": text} for text in self.documents]
        return [{"role": "system", "content": self.system}, *documents, {"role": "user", "content": question}]


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    text: str
    first_token_s: float
    prompt_tokens: int
    cached_tokens: int
    reuse: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The answer's `kvlite` block."""


@dataclass(frozen=True)
class Pair:
    """One question over reordered documents, blended and exact."""

    question: Question
    order: tuple[int, ...]
    blended: Answer
    exact: Answer


def demo() -> int:
    """Give the demonstration on stdout. Returns the exit status. Raises DemoError when the server does not start."""
    console = Console()
    script = read_script()
    port = free_port()
    command = [sys.executable, "-m", "kvlite.server", "--port", str(port)]
    console.print("[bold]Starting[/bold]  kvlite serve --port", port)
    with running(command, port) as server:
        show_documents(console, script)
        # A first request pays for threads and memory that the process touches once: not what is shown here.
        ask(port, Script(script.system, script.documents[::-1], (), ()).messages("Where does Elsa live?"))
        answers = [ask(port, script.messages(question.question)) for question in script.questions]
        show_answers(console, script.questions, answers)
        show_saving(console, answers)
        show_precomputed(console, *precompute(port, script.documents))
        ask_blended(port, script, Reordered(1, tuple(range(len(script.documents), 0, -1))))
        pairs = [ask_blended(port, script, reordered) for reordered in script.reordered]
        show_blending(console, pairs)
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the server did not stop within {STOP_WITHIN_S:g} s of SIGTERM") from None
    return verdict(console, answers, pairs, status)


def read_script() -> Script:
    """The documents and questions that ship with the package."""
    raw: dict[str, Any] = json.loads(Path(__file__).with_name("demo_documents.json").read_text("utf-8"))
    questions = tuple(Question(**entry) for entry in raw["questions"])
    reordered = tuple(Reordered(entry["question"], tuple(entry["order"])) for entry in raw["reordered"])
    return Script(raw["system"], tuple(raw["documents"]), questions, reordered)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int) -> Generator[subprocess.Popen[bytes]]:
    """The server, ready to answer; killed at the end when it still runs."""
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, port)
        yield server
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def wait_until_ready(
    server: subprocess.Popen[bytes], port: int, within_s: float = READY_WITHIN_S, key: str | None = None
) -> None:
    """Poll /ready until it says 200. Raises DemoError when the process ends or time is up."""
    deadline = time.monotonic() + within_s
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server ended with status {server.returncode} before it was ready")
        connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.request("GET", "/ready", headers=headers)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # nobody listens yet
        finally:
            connection.close()
        time.sleep(POLL_S)
    raise DemoError(f"the server was not ready after {within_s:g} s")


def ask(port: int, messages: list[dict[str, str]], **more: Any) -> Answer:
    """One streamed chat completion. Raises DemoError on any status but 200."""
    body = {"messages": messages, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **more}
    start = time.perf_counter()
    with posted(port, "/v1/chat/completions", body) as response:
        first: float | None = None
        text: list[str] = []
        last: dict[str, Any] = {}
        for chunk in events(response):
            last = chunk
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    first = time.perf_counter() - start if first is None else first
                    text.append(piece)
    usage = last["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    seconds = first if first is not None else float("nan")
    return Answer("".join(text), seconds, usage["prompt_tokens"], cached, last["kvlite"])


def precompute(port: int, documents: Sequence[str]) -> tuple[list[int], float]:
    """Has the server compute every document alone; their tokens, and the seconds that it took."""
    body = {"documents": [{"id": f"doc-{n}", "text": text} for n, text in enumerate(documents, 1)]}
    start = time.perf_counter()
    with posted(port, "/v1/documents", body) as response:
        made = json.loads(response.read())
    return [document["tokens"] for document in made["data"]], time.perf_counter() - start


def ask_blended(port: int, script: Script, reordered: Reordered) -> Pair:
    """The same question over the same documents, blended first: exact KV is for everybody, blended is not."""
    question = script.questions[reordered.question - 1]
    messages = [{"role": "system", "content": script.system}, {"role": "user", "content": question.question}]
    documents = [{"id": f"doc-{number}"} for number in reordered.order]
    blended = ask(port, messages, documents=documents, reuse="blend")
    exact = ask(port, messages, documents=documents, reuse="prefix")
    return Pair(question, reordered.order, blended, exact)


@contextmanager
def posted(port: int, path: str, body: object) -> Generator[http.client.HTTPResponse]:
    """The answer to one POST. Raises DemoError on any status but 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise DemoError(f"the server answered {response.status}: {response.read(500).decode('utf-8', 'replace')}")
        yield response
    finally:
        connection.close()


def events(response: http.client.HTTPResponse) -> Generator[dict[str, Any]]:
    """The JSON of every server-sent event up to [DONE]. Raises DemoError on an error event."""
    for raw in response:
        line = raw.strip()
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                raise DemoError(f"the stream failed: {chunk['error']['message']}")
            yield chunk
    raise DemoError("the stream ended without [DONE]")


def show_documents(console: Console, script: Script) -> None:
    """The shared documents, numbered."""
    console.print(f"\n[bold]{len(script.documents)} documents[/bold], sent with every question")
    for number, text in enumerate(script.documents, 1):
        console.print(f"[dim]{number:3}[/dim]  {escape(text)}")


def show_answers(console: Console, questions: tuple[Question, ...], answers: list[Answer]) -> None:
    """Questions and answers, and whether each is right."""
    console.print("\n[bold]Questions over the same documents[/bold]")
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        console.print(f"[dim]{number:3}[/dim]  {question.question}  {_marked(question, answer)}")
        console.print(f"     [dim]{question.why}[/dim]")


def _marked(question: Question, answer: Answer) -> str:
    text = answer.text.strip()
    mark = "[green]right[/green]" if text == question.answer else f"[red]wrong, it is {question.answer}[/red]"
    return f"[bold]{escape(text)}[/bold]  {mark}"


def show_saving(console: Console, answers: list[Answer]) -> None:
    """Each question's time to first token and where its prompt came from; cold against hit."""
    table = Table(title="\nWhat the prefix cache saves", title_justify="left")
    table.add_column("question")
    for name in ("first token", "prompt tokens", "cached", "computed"):
        table.add_column(name, justify="right")
    for number, answer in enumerate(answers, 1):
        table.add_row(*_row(f"{number} (cold)" if number == 1 else f"{number} (prefix hit)", answer))
    table.add_section()
    cold, hits = answers[0], answers[1:]
    middle = _median(hits)
    table.add_row(*_row("cold", cold))
    table.add_row(*_row(f"prefix hit, median of {len(hits)}", middle))
    table.add_row("cold / hit", f"{cold.first_token_s / middle.first_token_s:.1f} x", "", "", "")
    console.print(table)
    console.print(f"{sum(answer.cached_tokens for answer in answers)} prompt tokens came from the cache in all.")


def _row(name: str, answer: Answer) -> tuple[str, ...]:
    computed = answer.prompt_tokens - answer.cached_tokens
    numbers = (answer.prompt_tokens, answer.cached_tokens, computed)
    return (name, f"{answer.first_token_s * 1000:.1f} ms", *map(str, numbers))


def show_precomputed(console: Console, tokens: list[int], seconds: float) -> None:
    """What the store holds now."""
    console.print("\n[bold]The same documents, known to the server[/bold] (POST /v1/documents)")
    console.print(f"{len(tokens)} segments of {min(tokens)} to {max(tokens)} tokens, each computed alone", end="")
    console.print(f": {sum(tokens)} tokens in {seconds * 1000:.0f} ms")


def show_blending(console: Console, pairs: list[Pair]) -> None:
    """The questions in orders that no prefix cache has seen, blended and exact, and where each prompt came from."""
    console.print("\n[bold]Questions over them in orders that were never seen[/bold]")
    for pair in pairs:
        console.print(f"     {pair.question.question}  [dim]documents {' '.join(map(str, pair.order))}[/dim]")
        for name, answer in (("blended", pair.blended), ("exact", pair.exact)):
            console.print(f"       {name:7}  {answer.first_token_s * 1000:6.1f} ms  {_marked(pair.question, answer)}")
    table = Table(title=f"\nWhere the prompts came from, median of {len(pairs)}", title_justify="left")
    table.add_column("reuse")
    for name in ("first token", "prompt", "prefix", "blended", "recomputed", "computed"):
        table.add_column(name, justify="right")
    blended, exact = (_median([pair.blended for pair in pairs]), _median([pair.exact for pair in pairs]))
    for name, answer in (("blend", blended), ("prefix", exact)):
        counts = (answer.reuse[f"{source}_tokens"] for source in ("prefix", "blended", "recomputed", "computed"))
        first_token = f"{answer.first_token_s * 1000:.1f} ms"
        table.add_row(name, first_token, str(answer.prompt_tokens), *map(str, counts))
    table.add_row("exact / blend", f"{exact.first_token_s / blended.first_token_s:.1f} x", "", "", "", "", "")
    console.print(table)


def _median(answers: list[Answer]) -> Answer:
    return sorted(answers, key=lambda answer: answer.first_token_s)[len(answers) // 2]


def verdict(console: Console, answers: list[Answer], pairs: list[Pair], status: int) -> int:
    """0 when everything that was promised happened, else 1 with the reasons."""
    faults: list[str] = []
    blended = [pair.blended for pair in pairs]
    if any(not answer.text.strip() for answer in [*answers, *blended]):
        faults.append("an answer is empty")
    if any(2 * answer.cached_tokens < answer.prompt_tokens for answer in answers[1:]):
        faults.append("a later question did not find the documents in the cache")
    if any(2 * answer.reuse["blended_tokens"] < answer.prompt_tokens for answer in blended):
        faults.append("a blended question did not find the documents in the store")
    if status != 0:
        faults.append(f"the server ended with status {status} after SIGTERM")
    for fault in faults:
        console.print(f"[bold]failed:[/bold] {fault}")
    if not faults:
        console.print("The server drained and stopped on SIGTERM with status 0.")
    return EXIT_FAILED if faults else 0
