"""A batch from file to file: what is not answered yet is fed to the engine, and written as it ends.

Owns what one line becomes (prompts, an answer or an error in OpenAI's shape, a seed that is its own) and the summary.
Every decision about order within the queue is the core's. Called by cli.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from kvlite.batch.sink import Sink
from kvlite.batch.source import CHAT_URL, Entry, Line, Source, feeding_order
from kvlite.config import TIMEOUT_S_MAX, EngineConfig
from kvlite.engine import Engine
from kvlite.errors import InvalidRequestError, KvliteError
from kvlite.output import Throughput
from kvlite.progress import Bar
from kvlite.request import ValidatedRequest
from kvlite.server.answer import Answer
from kvlite.server.calls import Calls, model_name
from kvlite.server.failures import error_body, status_of
from kvlite.server.wire import Call, Wire
from kvlite.startup import model_directory
from kvlite.types import Delta, EngineStats
from kvlite.workload import VIEW_TOKENS

OK = 200

Say = Callable[[str], object]


@dataclass(frozen=True)
class Files:
    """Where a batch comes from and goes to."""

    requests: Path
    answers: Path


def run_batch(config: EngineConfig, files: Files, say: Say, *, progress: bool | None = None) -> bool:
    """Answers every line that has no answer yet; False when Ctrl-C ended it, and the same call goes on from there.

    Whatever ends it early, answers that are complete are in the file. `say` gets lines for the user; `progress` is that
    of Bar. Raises ConfigError (a bad line, a file of another batch) before anything runs, OutputError, EngineError and
    what the start of an engine raises.
    """
    config = replace(config, request_timeout_s=TIMEOUT_S_MAX)
    name = model_name(config, model_directory(config.model))
    with Source(files.requests, config.max_body_bytes) as source, Sink(files.answers, source, name) as sink:
        if sink.num_cut_bytes:
            say(f"{sink.path}: cut off {sink.num_cut_bytes} bytes that an interruption had left of unfinished lines")
        # A token has a byte at least: a file of so many bytes is in view as a whole.
        in_view = config.max_num_waiting if files.requests.stat().st_size <= VIEW_TOKENS else 0
        order = feeding_order([entry for entry in source.entries if entry.custom_id not in sink.answered], in_view)
        say(f"{source.path}: {len(source.entries)} lines, {len(sink.answered)} answered before")
        run: _Run | None = None
        try:
            if order:
                with Engine(config, progress=progress) as engine:
                    for what, value in engine.startup.rows():
                        say(f"{what:9} {value}")
                    run = _Run(engine, Calls(engine, name), source, sink)
                    run.answer(order, progress)
        except KeyboardInterrupt:
            say("interrupted")
            return False
        finally:
            say(_summary(source, sink, run))
    return True


def _summary(source: Source, sink: Sink, run: _Run | None) -> str:
    num_done, num_lines = len(sink.answered), len(source.entries)
    failed = {status: count for status, count in sorted(sink.statuses.items()) if status != OK}
    lines = [f"{sink.path}: {num_done} of {num_lines} lines answered"]
    if failed:
        kinds = ", ".join(f"{count} with status {status}" for status, count in failed.items())
        lines[0] += f", {sum(failed.values())} of them with an error ({kinds})"
    if run is not None:
        lines.append(run.pace)
    if num_done < num_lines:
        lines.append("the same command goes on from here")
    return "\n".join(lines)


def _tokens_per_step(before: EngineStats, after: EngineStats) -> float:
    """Rows of the model per step: prompt tokens that were computed, and those drawn."""

    def count(stats: EngineStats) -> int:
        return stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens

    return (count(after) - count(before)) / max(after.num_steps - before.num_steps, 1)


@dataclass
class _Open:
    """A line that was fed and is not answered."""

    entry: Entry
    answer: Answer
    has_ended: bool = False
    """A failed prompt ends the line; what its other prompts still say is dropped."""


class _Run:
    """One engine at work on the lines of one file."""

    def __init__(self, engine: Engine, calls: Calls, source: Source, sink: Sink) -> None:
        self.pace = ""
        """Of `answer`, in words."""
        self._engine = engine
        self._calls = calls
        self._source = source
        self._sink = sink
        self._open: dict[int, tuple[_Open, int]] = {}
        """(line, number of the prompt in it) by number of the request, while it lives."""
        self._num_requests = 0

    def answer(self, order: list[Entry], progress: bool | None) -> None:
        """Feeds the lines in that order and writes each when it has ended."""
        made, done = self._engine.run(self._requests(order), is_workload=True), Throughput()
        before = self._engine.stats()
        try:
            with Bar("answering", unit="lines", wanted=progress) as bar, closing(made) as outcomes:
                for number, outcome in outcomes:
                    self._take(number, outcome, done)
                    self._sink.sync_when_due()
                    bar.update(len(self._sink.answered), len(self._source.entries), done.note)
        finally:
            self.pace = (
                f"{done.seconds:.1f} s, {done.note()}, {_tokens_per_step(before, self._engine.stats()):.0f} a step"
            )

    def _requests(self, order: list[Entry]) -> Iterator[ValidatedRequest]:
        for entry in order:
            asked = self._source.read(entry)
            try:
                call, wire = self._prepare(entry, asked)
            except Exception as error:  # Whatever it is, it ends this line alone; what is no KvliteError is a 500.
                self._refuse(entry, error)
                continue
            line = _Open(entry, Answer(call, wire))
            for n, prompt in enumerate(call.prompts):
                self._open[self._num_requests] = line, n
                self._num_requests += 1
                yield self._seeded(prompt.request, entry, n)

    def _prepare(self, entry: Entry, line: Line) -> tuple[Call, Wire]:
        make = self._calls.chat if line.url == CHAT_URL else self._calls.completion
        call, wire = make(line.body, entry.digest.hex())
        if call.options.stream:
            raise InvalidRequestError("stream", "true is not possible in a batch: leave it out")
        return call, wire

    def _seeded(self, request: ValidatedRequest, entry: Entry, number: int) -> ValidatedRequest:
        """One without a seed gets one from its custom_id, so that neither order nor interruptions change its answer."""
        if request.params.seed is not None:
            return request
        name = f"{self._engine.config.seed}/{number}/{entry.custom_id}".encode()
        seed = int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)
        return replace(request, params=replace(request.params, seed=seed))

    def _take(self, number: int, outcome: Delta | InvalidRequestError, done: Throughput) -> None:
        line, prompt = self._open[number]
        if isinstance(outcome, InvalidRequestError) or outcome.usage is not None:
            del self._open[number]
        if isinstance(outcome, InvalidRequestError):
            error = outcome
        else:
            done.add(outcome)
            error = self._add(line, prompt, outcome)
        if error is not None and not line.has_ended:
            line.has_ended = True
            self._refuse(line.entry, error)

    def _add(self, line: _Open, prompt: int, delta: Delta) -> KvliteError | None:
        """Takes a delta, and writes the line when it was the last; returns why there will be no answer."""
        if line.has_ended:
            return None
        try:
            line.has_ended = line.answer.add(prompt, delta)
        except KvliteError as error:
            return error
        if line.has_ended:
            self._sink.append(line.entry, OK, line.answer.body())
        return None

    def _refuse(self, entry: Entry, error: Exception) -> None:
        self._sink.append(entry, status_of(error), error_body(error))
