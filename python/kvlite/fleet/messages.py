"""Control messages between the front-end and its workers: requests in, tokens and ends out, documents, statistics.

Owns their shapes, and `encode` and `decode_*`: one frame is a msgpack list of tagged messages, so that the tokens of
a step are one frame. Decoding is strict: an unknown tag or field, a wrong type, a number out of range or a list too
long raises MessageError, and whoever reads closes the link. The movers' own frames are `_core`'s and
travel beside these on another channel. Called by worker.py and frontend.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from kvlite.checks import INT32_MAX
from kvlite.documents import DocumentInfo
from kvlite.errors import CapacityError, EngineClosedError, EngineError, InvalidRequestError, KvliteError
from kvlite.reuse_types import ReuseReport
from kvlite.types import N_CEILING, EngineStats, FinishReason

PROTOCOL = 1
"""Version of these messages; both sides must have the same."""
MESSAGES_MAX = 4096
"""In one frame."""
OWNER = -1
"""The front-end's number among the peers of a worker; engines count from 0."""

Id: TypeAlias = Annotated[int, Meta(ge=0)]
"""A fleet request (front-end's number), an order, an epoch."""
EngineId: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 16)]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Choice: TypeAlias = Annotated[int, Meta(ge=0, lt=N_CEILING)]
Position: TypeAlias = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TokenIds: TypeAlias = Annotated[list[TokenId], Meta(max_length=1 << 24)]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Rate: TypeAlias = Annotated[float, Meta(ge=0)]


class MessageError(KvliteError):
    """A frame of the control channel that is not what this version sends."""


class _Message(Struct, frozen=True, tag=True, array_like=False, forbid_unknown_fields=True):
    """Tagged with the name of its class."""


# At start


class Setup(Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker process reads from its standard input, as one line of JSON. The fleet key is no part of it."""

    engine: EngineId
    owner: Text
    """Address of the front-end, which the worker connects to."""
    listen: Text
    """Address at which the worker listens for other workers; `Hello.address` says what it became (TCP port 0)."""
    config: dict[str, str | int | float | bool | None]
    """Fields of EngineConfig."""
    max_moves: Annotated[int, Meta(ge=1, le=4096)] = 16
    """At once, leaving and arriving each."""
    max_inflight_bytes: Annotated[int, Meta(ge=1 << 16)] = 256 << 20
    """Of KV that was sent and not acknowledged, all moves together."""
    copy_share: Annotated[float, Meta(gt=0, le=1)] = 0.015
    """Of a core's time, for copies out of an engine that computes on a CPU while its requests decode on."""
    max_stages: Annotated[int, Meta(ge=1, le=64)] = 8
    """Copies while decoding goes on, before a move freezes its request."""
    reserve_s: Annotated[float, Meta(gt=0)] = 10.0
    """How long a destination keeps room for a move that does not go on."""
    ack_s: Annotated[float, Meta(gt=0)] = 10.0
    """How long a source waits for each answer of a destination."""
    freeze_s: Annotated[float, Meta(gt=0)] = 10.0
    """How long a request stays frozen before its source reclaims it."""
    claim_s: Annotated[float, Meta(gt=0)] = 1.0
    """After which a destination claims again, and a source reclaims again."""
    heartbeat_s: Annotated[float, Meta(gt=0)] = 0.5
    silence_s: Annotated[float, Meta(gt=0)] = 5.0
    """A link that is silent for so long is down."""
    bytes_per_s_limit: Annotated[float, Meta(gt=0)] | None = None
    """Of each link between workers; None: as fast as it goes."""


def encode_setup(setup: Setup) -> bytes:
    """One line."""
    return msgspec.json.encode(setup) + b"\n"


def decode_setup(line: bytes) -> Setup:
    """What the launcher wrote. Raises MessageError."""
    try:
        return msgspec.json.decode(line, type=Setup)
    except (msgspec.DecodeError, ValueError) as error:
        raise MessageError(f"the setup of a worker cannot be read: {error}") from None


# From the front-end


class Add(_Message, frozen=True):
    """Start a request here. `outputs`: replay of one that lived elsewhere."""

    request: Id
    epoch: Id
    spec: bytes
    """`fleet.spec.RequestSpec`, encoded; its seed is set, it has no stop strings."""
    outputs: Annotated[list[bytes | None], Meta(max_length=N_CEILING)] | None = None
    """Per choice: ids that were delivered, int32 little-endian; None for a choice that has ended."""


class Abort(_Message, frozen=True):
    """The client left, or the time is over. Whoever has the request ends it; who does not know it says nothing."""

    request: Id


class Finish(_Message, frozen=True):
    """A stop string ended a choice: it keeps its first `kept_len` output tokens."""

    request: Id
    epoch: Id
    choice: Choice
    kept_len: Position


class Peers(_Message, frozen=True):
    """Where the movers of the living engines listen: {engine: address}. Links to engines not named are closed."""

    addresses: Annotated[dict[EngineId, Text], Meta(max_length=4096)]


class Drain(_Message, frozen=True):
    """Take no new requests; `Reply` when the last has ended, `found` False when some still run after `timeout_s`."""

    order: Id
    timeout_s: Seconds


class Shutdown(_Message, frozen=True):
    """End every request with reason cancelled, and exit."""


class CreateDocument(_Message, frozen=True):
    """Compute a document's KV and keep it by its id. `Reply` has the one document."""

    order: Id
    tenant: Count
    id: Text
    """Of the front-end's choice when the caller gave none, so that every engine has the same."""
    text: str
    title: str | None = None
    public: bool = False
    pinned: bool = False
    ttl_s: Annotated[float, Meta(gt=0)] | None = None


class UpdateDocument(_Message, frozen=True):
    """Pin, unpin (None: leave as it is), set or clear (`keep_ttl` False, `ttl_s` None) the time to live."""

    order: Id
    tenant: Count
    id: Text
    public: bool = False
    pinned: bool | None = None
    keep_ttl: bool = True
    ttl_s: Annotated[float, Meta(gt=0)] | None = None


class DeleteDocument(_Message, frozen=True):
    """Forget a document and its KV. `Reply.found`: whether there was one."""

    order: Id
    tenant: Count
    id: Text
    public: bool = False


class ListDocuments(_Message, frozen=True):
    """What a tenant may see, with the state of the KV on this engine; `id`: that one alone."""

    order: Id
    tenant: Count
    id: Text | None = None


class CancelOrder(_Message, frozen=True):
    """Nobody waits for the answer of `order` any more; it still gets one."""

    order: Id


FromOwner: TypeAlias = (
    Add
    | Abort
    | Finish
    | Peers
    | Drain
    | Shutdown
    | CreateDocument
    | UpdateDocument
    | DeleteDocument
    | ListDocuments
    | CancelOrder
)


# From a worker


class Hello(_Message, frozen=True):
    """First message of a worker: it has loaded, serves, and listens for other movers."""

    engine: EngineId
    pid: Count
    protocol: Count
    address: Text
    """Where other workers connect."""
    model_digest: Id
    """Of shape, number format and weights (startup.py); equal on engines that may exchange KV."""
    dtype: Text
    device: Text
    deterministic: bool
    vocab_size: Count
    num_layers: Count
    max_model_len: Count
    block_size: Count
    block_bytes: Count
    """KV of one block: what a move sends per block."""
    num_blocks: Count
    pool_tokens: Count
    max_num_seqs: Count
    max_num_waiting: Count
    prefill_tokens_per_s: Rate
    """Measured at start, one long prompt alone; 0: not measured."""
    step_s: Seconds
    """Measured at start: one decode step of one sequence."""


class Scores(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probabilities of one position, as `runner.sampler.RawLogprobs`."""

    token_id: TokenId
    logprob: float
    rank: Count
    top_ids: Annotated[tuple[TokenId, ...], Meta(max_length=1024)]
    top_logprobs: Annotated[tuple[float, ...], Meta(max_length=1024)]


class Tokens(_Message, frozen=True):
    """Output tokens of one choice, the first at `position`."""

    request: Id
    epoch: Id
    choice: Choice
    position: Position
    ids: TokenIds
    logprobs: Annotated[list[Scores], Meta(max_length=1 << 24)] | None = None
    """One per id when asked."""
    prompt_logprobs: Annotated[list[Scores | None], Meta(max_length=1 << 24)] | None = None
    """Of every prompt token, the first None; when asked, once, on choice 0 (`ids` may be empty then)."""


class Ended(_Message, frozen=True):
    """A choice ended here after everything that was sent of it."""

    request: Id
    epoch: Id
    choice: Choice
    reason: FinishReason
    num_tokens: Position
    """Output tokens of the choice in all, those of earlier owners included."""
    error: str | None = None
    last: bool = False
    """Of its request."""
    reuse: ReuseReport | None = None
    """On the last; None when the request ended before it was admitted here."""


class Refused(_Message, frozen=True):
    """A request or an order that was not taken; `failure` says whose fault it is."""

    request: Id
    epoch: Id
    failure: Failure


class Failure(Struct, frozen=True, forbid_unknown_fields=True):
    """An error of kvlite's across the link. `kind`: invalid (with `param`), capacity, closed, failed."""

    kind: Text
    message: str
    param: str = ""

    @classmethod
    def of(cls, error: KvliteError) -> Failure:
        """What `error` becomes on the wire."""
        if isinstance(error, InvalidRequestError):
            return cls("invalid", error.message, error.param)
        if isinstance(error, CapacityError):
            return cls("capacity", error.message)
        return cls("closed" if isinstance(error, EngineClosedError) else "failed", str(error))

    def error(self) -> KvliteError:
        """The same error again."""
        if self.kind == "invalid":
            return InvalidRequestError(self.param, self.message)
        if self.kind == "capacity":
            return CapacityError(self.message)
        return EngineClosedError(self.message) if self.kind == "closed" else EngineError(self.message)


class Reply(_Message, frozen=True):
    """The answer to the order of that number."""

    order: Id
    found: bool = True
    documents: Annotated[list[DocumentInfo], Meta(max_length=1 << 20)] = []
    failure: Failure | None = None


class Moved(_Message, frozen=True):
    """A move ended at its source; sent before the mover's own answer to the order. For metrics and the log."""

    request: Id
    epoch: Id
    to: EngineId
    result: Count
    """`fleet.effects.MoveResult`."""
    seconds: Seconds
    """From the order to the end."""
    frozen_s: Seconds
    """From the freeze to the end: about what the client waits."""
    stages: Count
    blocks: Count
    sent_bytes: Count


class Stats(_Message, frozen=True):
    """Each STATS_S seconds, and after a drain."""

    stats: EngineStats
    healthy: bool
    draining: bool
    moves_out: Count
    """Requests that are leaving now."""
    moves_in: Count
    """Requests that are arriving now."""
    link_bytes_per_s: Annotated[dict[EngineId, Rate], Meta(max_length=4096)]
    """Measured with payloads, by destination; an engine that nothing went to yet is absent."""


FromWorker: TypeAlias = Hello | Tokens | Ended | Refused | Reply | Moved | Stats

STATS_S = 0.5

_encoder = msgspec.msgpack.Encoder()
_from_owner = msgspec.msgpack.Decoder(Annotated[list[FromOwner], Meta(max_length=MESSAGES_MAX)])
_from_worker = msgspec.msgpack.Decoder(Annotated[list[FromWorker], Meta(max_length=MESSAGES_MAX)])


def encode(messages: Sequence[FromOwner] | Sequence[FromWorker]) -> bytes:
    """One frame. At most MESSAGES_MAX messages."""
    assert len(messages) <= MESSAGES_MAX, f"{len(messages)} messages, at most {MESSAGES_MAX} fit a frame"
    return _encoder.encode(list(messages))


def decode_from_owner(frame: bytes | memoryview) -> list[FromOwner]:
    """What the front-end sent. Raises MessageError."""
    try:
        return _from_owner.decode(frame)
    except (msgspec.DecodeError, ValueError, KvliteError) as error:
        raise MessageError(f"a control frame of the front-end cannot be read: {error}") from None


def decode_from_worker(frame: bytes | memoryview) -> list[FromWorker]:
    """What a worker sent. Raises MessageError."""
    try:
        return _from_worker.decode(frame)
    except (msgspec.DecodeError, ValueError, KvliteError) as error:
        raise MessageError(f"a control frame of a worker cannot be read: {error}") from None
