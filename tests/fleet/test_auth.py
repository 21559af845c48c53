"""The fleet key and the handshake: who has another key, version, model or limit is sent away by name."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from kvlite.errors import ConfigError
from kvlite.fleet import auth, dial, shared_memory
from kvlite.fleet.auth import (
    HELLO_BYTES,
    KEY_VARIABLE,
    PROOF_BYTES,
    FleetKey,
    HandshakeError,
    Identity,
    MismatchError,
    Transcript,
    WrongKeyError,
    agree,
    fingerprint,
    read_hello,
)
from kvlite.fleet.dial import connect, listen, shake_hands
from kvlite.fleet.links import Link
from kvlite.fleet.messages import OWNER
from kvlite.fleet.wire import VERSION, Limits, LinkDownError, LinkError
from tests.fleet.link_pairs import KEY, KINDS, MODEL, bare, config, free_address, pair, run, stream_pair

LIMITS = Limits(1 << 20, 1 << 20, 1 << 16)


def identity(engine: int = 0, wants: int = auth.ANYBODY, **changes: Any) -> Identity:
    fields = {"shares_memory": False, "fingerprint": MODEL, "block_bytes": 64, "limits": LIMITS} | changes
    return Identity(engine, wants, **fields)


def test_a_key_comes_from_the_environment_and_is_never_shown() -> None:
    key = FleetKey.generate()
    variables = key.to_env()
    again = FleetKey.from_env(variables)
    assert again is not None and again.sign("x") == key.sign("x") != FleetKey.generate().sign("x")
    assert FleetKey.from_env({}) is None
    assert variables[KEY_VARIABLE] not in repr(key) + str(config(0, key=key))


@pytest.mark.parametrize("text", ["", "00" * 31, "xy" * 32, "00" * 1025])
def test_a_short_or_unreadable_key_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match=KEY_VARIABLE) as raised:
        FleetKey.from_env({KEY_VARIABLE: text})
    assert not text or text not in str(raised.value)


def test_what_is_signed_cannot_be_cut_differently() -> None:
    signed = {KEY.sign("a", b"bc"), KEY.sign("ab", b"c"), KEY.sign("a", b"b", b"c"), KEY.sign("a", b"bc", b"")}
    assert len(signed) == 4
    assert fingerprint("1", 1) != fingerprint(1, "1") != fingerprint("11")


def test_a_hello_says_what_was_put_in_and_has_its_length() -> None:
    said = identity(7, 3, shares_memory=True)
    assert len(said.hello(bytes(32))) == HELLO_BYTES
    assert read_hello(said.hello(bytes(32))) == said


def test_both_directions_and_every_handshake_have_their_own_session_keys() -> None:
    one = Transcript(KEY, identity().hello(bytes(32)), identity(1).hello(bytes(32)))
    two = Transcript(KEY, identity().hello(b"\1" * 32), identity(1).hello(bytes(32)))
    keys = [script.session_key(caller) for script in (one, two) for caller in (True, False)]
    proofs = [script.proof(caller) for script in (one, two) for caller in (True, False)]
    assert len({*keys, *proofs}) == 8
    with pytest.raises(WrongKeyError):
        one.check(one.proof(caller=True), caller=False)


def test_limits_are_the_smaller_of_both_and_a_payload_has_half_the_window() -> None:
    other = identity(1, limits=Limits(1 << 10, 1 << 30, 1 << 12))
    assert agree(identity(), other) == agree(other, identity()) == Limits(1 << 10, 1 << 11, 1 << 12)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"fingerprint": fingerprint("other")}, "model"),
        ({"block_bytes": 65}, "block bytes"),
        ({"engine": 0}, "engine"),
        ({"wants": 5}, "engine"),
        ({"shares_memory": True}, "shared memory"),
    ],
)
def test_who_differs_in_what_must_be_equal_is_told_the_field(changes: dict[str, Any], field: str) -> None:
    other = identity(**({"engine": 1} | changes))
    for one, two in ((identity(), other), (other, identity())):
        with pytest.raises(MismatchError, match=field) as raised:
            agree(one, two)
        assert raised.value.field == field
    with pytest.raises(MismatchError, match="not 4"):
        agree(identity(0, 4), identity(1))


def test_a_front_end_needs_no_model() -> None:
    front_end = identity(OWNER, fingerprint=bytes(32), block_bytes=0)
    assert agree(front_end, identity(1)) == agree(identity(1), front_end)
    with pytest.raises(MismatchError, match="model"):
        agree(identity(0, fingerprint=bytes(32)), identity(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"key": FleetKey(bytes(32))}, WrongKeyError, "another fleet key"),
        ({"fingerprint": fingerprint("other")}, MismatchError, "weights or format differ"),
        ({"block_bytes": 128}, MismatchError, "block bytes"),
        ({"engine": 1}, MismatchError, "both sides say"),
    ],
)
def test_a_stranger_is_refused_by_both_sides(
    kind: str, changes: dict[str, Any], error: type[LinkError], text: str, tmp_path: Path
) -> None:
    async def main() -> None:
        refused: asyncio.Queue[LinkError] = asyncio.Queue()
        up: list[Link] = []
        listener = await listen(free_address(kind, tmp_path), config(1), up.append, refused.put_nowait)
        with pytest.raises(error, match=text):
            await connect(listener.address, config(**({"engine": 0} | changes)))
        assert isinstance(await refused.get(), HandshakeError)
        assert not up
        link = await connect(listener.address, config(0), peer=1)
        assert link.peer == 1
        link.close()
        listener.close()
        for other in up:
            other.close()

    run(main())


def test_another_version_is_named(tmp_path: Path) -> None:
    hello = bytearray(identity().hello(bytes(32)))
    hello[4:6] = struct.pack("<H", 9)
    with pytest.raises(MismatchError, match=f"speaks version 9, this one {VERSION}"):
        read_hello(bytes(hello))


@pytest.mark.parametrize("caller", [True, False])
def test_no_bit_of_a_handshake_may_change_on_the_way(caller: bool) -> None:
    """Every byte of either side's hello and proof, flipped by somebody between them, refuses both."""

    async def flipped(at: int) -> tuple[object, object]:
        (one, one_far), (two, two_far) = stream_pair("tcp"), stream_pair("tcp")
        ends = (bare(one_far), bare(two_far))

        async def pump(source: int) -> None:
            done = 0
            for length in (HELLO_BYTES, PROOF_BYTES):
                data = bytearray(await ends[source].read_exactly(length))
                if (source == 0) is caller and done <= at < done + length:
                    data[at - done] ^= 1
                done += length
                await ends[1 - source].write([bytes(data)])

        pumps = [asyncio.ensure_future(pump(source)) for source in (0, 1)]
        shaken = [
            asyncio.ensure_future(shake_hands(one, config(0), caller=True)),
            asyncio.ensure_future(shake_hands(two, config(1), caller=False)),
        ]
        await asyncio.wait(shaken, return_when=asyncio.FIRST_EXCEPTION)
        for end in ends:
            end.close()
        found = await asyncio.gather(*shaken, return_exceptions=True)
        for pumping in pumps:
            pumping.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for link in found:
            if isinstance(link, Link):
                link.close()
        return found[0], found[1]

    async def main() -> None:
        for at in range(HELLO_BYTES + PROOF_BYTES):
            one, two = await flipped(at)
            judge = two if caller else one
            assert isinstance(judge, LinkError), at
            # The last message of a handshake is the caller's proof: the caller cannot know how it fared.
            if at < HELLO_BYTES:
                assert isinstance(one, LinkError) and isinstance(two, LinkError), at

    run(main())


def test_a_recorded_handshake_opens_nothing() -> None:
    async def main() -> None:
        sent: list[bytes] = []
        one, two = stream_pair("tcp")
        far = asyncio.ensure_future(shake_hands(two, config(1), caller=False))
        caller = bare(one)
        mine = identity(wants=1).hello(bytes(32))
        await caller.write([mine])
        theirs = await caller.read_exactly(HELLO_BYTES)
        await caller.read_exactly(PROOF_BYTES)
        sent += [mine, Transcript(KEY, mine, theirs).proof(caller=True)]
        await caller.write(sent[1:])
        (await far).close()
        caller.close()
        one, two = stream_pair("tcp")
        far = asyncio.ensure_future(shake_hands(two, config(1), caller=False))
        again = bare(one)
        await again.write(sent)
        with pytest.raises(WrongKeyError):
            await far
        again.close()

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_that_say_nothing_are_bounded_in_number_and_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "STRANGERS_MAX", 2)

    async def main() -> None:
        refused: asyncio.Queue[LinkError] = asyncio.Queue()
        up: asyncio.Queue[Link] = asyncio.Queue()
        silent = config(1, handshake_s=1.0)
        listener = await listen(free_address(kind, tmp_path), silent, up.put_nowait, refused.put_nowait)
        family, where = await dial._resolve(listener.address)
        socks = [dial.socket.socket(family, dial.socket.SOCK_STREAM) for _ in range(3)]
        for sock in socks:
            sock.connect(where)
        texts = [str(await refused.get()) for _ in socks]
        assert sum("too many" in text for text in texts) == 1
        assert sum("took longer than 1 s" in text for text in texts) == 2
        for sock in socks:
            sock.close()
        (await connect(listener.address, config(0))).close()
        (await up.get()).close()
        listener.close()

    run(main())


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" + b" " * HELLO_BYTES, os.urandom(HELLO_BYTES), b"kvlh"])
def test_what_is_no_hello_is_refused(data: bytes) -> None:
    async def main() -> None:
        one, two = stream_pair("tcp")
        one.sendall(data)
        one.shutdown(dial.socket.SHUT_WR)
        with pytest.raises(HandshakeError, match=r"no kvlite fleet|left during"):
            await shake_hands(two, config(1), caller=False)
        assert two.fileno() == -1
        one.close()

    run(main())


def test_nobody_at_the_address_and_no_address_are_errors_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(LinkDownError, match="cannot be reached"):
            await connect(f"unix:{tmp_path}/nobody", config(0))
        for address in ("unix:", "unix:" + "x" * 104, "tcp:host", "tcp:host:70000", "udp:host:1", ""):
            with pytest.raises(ConfigError, match="address"):
                await connect(address, config(0))

    run(main())


def test_a_unix_socket_is_the_users_own_and_goes_with_its_listener(tmp_path: Path) -> None:
    async def main() -> None:
        listener = await listen(f"unix:{tmp_path}/s", config(1), lambda link: None, lambda error: None)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        with pytest.raises(OSError):
            await listen(f"unix:{tmp_path}/s", config(1), lambda link: None, lambda error: None)
        listener.close()
        listener.close()
        assert not (tmp_path / "s").exists()

    run(main())


def test_another_users_process_is_refused_before_anything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial.os, "getuid", lambda: 54321)

    async def main() -> None:
        one, two = stream_pair("unix")
        with pytest.raises(HandshakeError, match="must be 54321"):
            await shake_hands(one, config(0), caller=True)
        two.setblocking(False)
        assert two.recv(1) == b""
        two.close()

    run(main())


def test_a_ring_that_could_shrink_or_has_another_size_is_refused(tmp_path: Path) -> None:
    fd = shared_memory.create_memory(8192)
    with pytest.raises(HandshakeError, match="4096 bytes but has 8192"):
        shared_memory.map_memory(fd, 4096)
    memory = shared_memory.map_memory(fd, 8192)
    with pytest.raises(OSError):
        os.ftruncate(fd, 100)
    os.close(fd)
    with pytest.raises(TypeError):
        memory[0] = 1
    if hasattr(os, "memfd_create"):
        with (tmp_path / "file").open("wb+") as file:
            file.truncate(8192)
            with pytest.raises(HandshakeError, match="not sealed"):
                shared_memory.map_memory(file.fileno(), 8192)
    receiving, sending = os.pipe()
    with pytest.raises(HandshakeError, match="no memory"):
        shared_memory.map_memory(receiving, 4096)
    os.close(receiving)
    os.close(sending)


@pytest.mark.parametrize("kind", KINDS)
def test_opening_and_closing_links_leaves_no_descriptor(kind: str, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    async def main() -> None:
        async with pair(kind, tmp_path):
            pass
        gc.collect()  # of tests before this one
        before = descriptors()
        for _ in range(5):
            async with pair(kind, tmp_path) as (one, two):
                assert one.ended is None and two.ended is None
        assert descriptors() == before

    run(main())
