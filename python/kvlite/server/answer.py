"""One whole answer of a call, put together from the deltas of its prompts.

Owns the envelope of a body and which ends are no answer. Knows neither HTTP nor how deltas come: stream.py feeds it
from an event loop, kvlite.batch from an engine's own loop.
"""

from __future__ import annotations

from kvlite.errors import EngineClosedError, EngineError
from kvlite.server.failures import RequestTimeoutError
from kvlite.server.usage import usage_fields
from kvlite.server.wire import Call, Chunk, Gathered, Wire
from kvlite.types import Delta, FinishReason


def check_end(delta: Delta) -> None:
    """Raise for an end that is no answer."""
    if delta.finish_reason is FinishReason.ERROR:
        raise EngineError(delta.error or "the request failed inside the engine")
    if delta.finish_reason is FinishReason.TIMEOUT:
        raise RequestTimeoutError
    if delta.finish_reason is FinishReason.CANCELLED:
        raise EngineClosedError("the request was cancelled because the server shuts down")


def envelope(call: Call, object: str) -> Chunk:
    """What every body or chunk of an answer begins with."""
    return {"id": call.id, "object": object, "created": call.created, "model": call.model}


class Answer:
    """The choices of one call as they grow."""

    def __init__(self, call: Call, wire: Wire) -> None:
        self._call = call
        self._wire = wire
        self._choices = [Gathered() for _ in range(len(call.prompts) * call.params.n)]
        self.ends: list[Delta] = []
        """The last delta of each prompt that has ended."""

    def add(self, number: int, delta: Delta) -> bool:
        """Takes the next delta of prompt `number`; True when it was the last of all. Raises as `check_end`."""
        check_end(delta)
        self._choices[number * self._call.params.n + delta.index].add(delta)
        if delta.usage is not None:
            self.ends.append(delta)
        return len(self.ends) == len(self._call.prompts)

    def body(self) -> Chunk:
        """The answer, once every prompt has ended."""
        body = envelope(self._call, self._wire.object)
        body["choices"] = [self._wire.whole(index, choice) for index, choice in enumerate(self._choices)]
        body |= usage_fields(self._call, self.ends)
        if self._call.options.warnings:
            body["warnings"] = self._call.options.warnings
        return body
