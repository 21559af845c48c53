"""The fleet key, and the handshake in which both sides of a link prove it and agree on their limits.

Owns the key (from KVLITE_FLEET_KEY or made by the launcher, never on a command line, never printed) and three messages
of fixed length: hello of the side that connects, hello and proof of the side that listens, proof of the first. Both
nonces and every field are under each proof and under the session keys, so nothing of an old handshake can be used
again. Pure: bytes in, bytes out. Called by links.py; the launcher makes keys.
"""

from __future__ import annotations

import hmac
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b, sha256

from kvlite.errors import ConfigError
from kvlite.fleet.messages import OWNER
from kvlite.fleet.wire import VERSION, Limits, LinkError

KEY_VARIABLE = "KVLITE_FLEET_KEY"
KEY_BYTES_MIN = 32
KEY_BYTES_MAX = 1024
ANYBODY = -2
"""Peer number of a side that listens: it learns who called."""
FINGERPRINT_BYTES = 32
MAGIC = b"kvlh"
_PREFIX = struct.Struct("<4sH")
_HELLO = struct.Struct("<4sHiiB32s32sQQQQ")
"""magic, version, engine, peer it wants, shares memory, nonce, fingerprint, block bytes, limits (3)."""
HELLO_BYTES = _HELLO.size
PROOF_BYTES = 32


class HandshakeError(LinkError):
    """The other side is nobody to talk to; the message says why."""


class WrongKeyError(HandshakeError):
    """It does not have this fleet's key."""


class MismatchError(HandshakeError):
    """It has the key, but `field` differs from what this side needs."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class FleetKey:
    """The secret that all processes of a fleet share: 32 bytes or more."""

    def __init__(self, secret: bytes) -> None:
        if not KEY_BYTES_MIN <= len(secret) <= KEY_BYTES_MAX:
            allowed = f"must have {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes, written as hexadecimal digits"
            raise ConfigError(KEY_VARIABLE, f"has {len(secret)} bytes, {allowed}")
        self._secret = secret

    def __repr__(self) -> str:
        return "FleetKey(secret)"

    @classmethod
    def generate(cls) -> FleetKey:
        """A new one from the system's source of randomness."""
        return cls(secrets.token_bytes(KEY_BYTES_MIN))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> FleetKey | None:
        """The one in KVLITE_FLEET_KEY; None when that is not set. Raises ConfigError, without the value."""
        text = (os.environ if environ is None else environ).get(KEY_VARIABLE)
        if text is None:
            return None
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(KEY_VARIABLE, "is not a string of hexadecimal digits") from None

    def to_env(self) -> dict[str, str]:
        """For the environment of a child process."""
        return {KEY_VARIABLE: self._secret.hex()}

    def sign(self, label: str, *parts: bytes) -> bytes:
        """HMAC-SHA256 over label and parts, lengths included."""
        mac = hmac.new(self._secret, digestmod=sha256)
        for part in (label.encode(), *parts):
            mac.update(struct.pack("<I", len(part)) + part)
        return mac.digest()


def fingerprint(*parts: str | int) -> bytes:
    """Digest of what must be equal on engines that exchange KV: model digest, number format, block size, ..."""
    mac = blake2b(digest_size=FINGERPRINT_BYTES, person=b"kvlite fleet")
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        mac.update(struct.pack("<I", len(text)) + text)
    return mac.digest()


@dataclass(frozen=True)
class Identity:
    """What one side says of itself. `fingerprint` of a front-end is 32 zeros: it holds no model."""

    engine: int
    wants: int
    shares_memory: bool
    fingerprint: bytes
    block_bytes: int
    limits: Limits

    def hello(self, nonce: bytes) -> bytes:
        """HELLO_BYTES long; `nonce` has 32 bytes and is used once."""
        sizes = (self.block_bytes, self.limits.frame, self.limits.payload, self.limits.window)
        shared = int(self.shares_memory)
        return _HELLO.pack(MAGIC, VERSION, self.engine, self.wants, shared, nonce, self.fingerprint, *sizes)


def read_hello(data: bytes) -> Identity:
    """Raises HandshakeError (not our protocol, malformed) or MismatchError (version)."""
    magic, version = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise HandshakeError(f"a hello begins with {magic!r}, must be {MAGIC!r}: the other side is no kvlite fleet")
    if version != VERSION:
        raise MismatchError("version", f"the other side speaks version {version}, this one {VERSION}")
    _, _, engine, wants, shared, _nonce, digest, block_bytes, *sizes = _HELLO.unpack(data)
    if engine < OWNER or wants < ANYBODY or shared > 1:
        raise HandshakeError(f"a hello of engine {engine} to {wants}, memory {shared}: out of range")
    return Identity(engine, wants, bool(shared), digest, block_bytes, Limits(*sizes))


def agree(own: Identity, other: Identity) -> Limits:
    """Limits of the link, the smaller of both sides'. Raises MismatchError; call it once the other's proof is right."""
    if own.wants not in (ANYBODY, other.engine):
        raise MismatchError("engine", f"this is engine {other.engine}, not {own.wants}")
    if other.wants not in (ANYBODY, own.engine):
        raise MismatchError("engine", f"engine {other.engine} looks for engine {other.wants}, this one is {own.engine}")
    if own.engine == other.engine:
        raise MismatchError("engine", f"both sides say that they are engine {own.engine}")
    if own.shares_memory != other.shares_memory:
        raise MismatchError("shared memory", "one side wants it and the other does not")
    if OWNER not in (own.engine, other.engine):
        if own.fingerprint != other.fingerprint:
            mine, theirs = own.fingerprint.hex()[:12], other.fingerprint.hex()[:12]
            raise MismatchError(
                "model", f"engine {other.engine} has {theirs}, this one {mine}: weights or format differ"
            )
        if own.block_bytes != other.block_bytes:
            raise MismatchError("block bytes", f"engine {other.engine} has {other.block_bytes}, not {own.block_bytes}")
    window = min(own.limits.window, other.limits.window)
    frame = min(own.limits.frame, other.limits.frame)
    return Limits(frame, min(own.limits.payload, other.limits.payload, window // 2), window)


@dataclass(frozen=True)
class Transcript:
    """Both hellos of a handshake, and what follows from them and the key."""

    key: FleetKey
    caller: bytes
    listener: bytes

    def proof(self, caller: bool) -> bytes:
        """What a side sends to show that it has the key."""
        return self.key.sign("kvlite caller" if caller else "kvlite listener", self.caller, self.listener)

    def check(self, proof: bytes, caller: bool) -> None:
        """Raises WrongKeyError unless `proof` is that side's."""
        if not hmac.compare_digest(self.proof(caller), proof):
            raise WrongKeyError("the other side has another fleet key")

    def session_key(self, caller: bool) -> bytes:
        """Key of everything that side sends; each direction has its own, so nothing can be sent back to its author."""
        return self.key.sign("kvlite from caller" if caller else "kvlite from listener", self.caller, self.listener)
