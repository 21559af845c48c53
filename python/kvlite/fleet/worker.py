"""`Worker`: one engine of a fleet, in a process of its own: `python -m kvlite.fleet.worker`.

Owns the engine, the link to the front-end and what hangs on both: live requests, moves, orders about documents.
Settings come as one line on standard input, the fleet key in the environment. It lives as long as the front-end's
link: when that ends, so does it, and whatever it was doing is replayed elsewhere. Started by launcher.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from kvlite import _core
from kvlite.async_engine import AsyncEngine
from kvlite.config import EngineConfig
from kvlite.engine import Engine
from kvlite.errors import ConfigError, EngineError, KvliteError
from kvlite.fleet.auth import FleetKey, fingerprint
from kvlite.fleet.copier import KVCopier
from kvlite.fleet.dial import connect, listen
from kvlite.fleet.exporter import Exporter
from kvlite.fleet.importer import Importer
from kvlite.fleet.link_config import LinkConfig
from kvlite.fleet.links import Link
from kvlite.fleet.live import LiveRequests
from kvlite.fleet.messages import (
    OWNER,
    PROTOCOL,
    STATS_S,
    Abort,
    Add,
    Finish,
    FromOwner,
    Hello,
    MessageError,
    Peers,
    Setup,
    Shutdown,
    Stats,
    decode_from_owner,
    decode_setup,
)
from kvlite.fleet.mover import Mover
from kvlite.fleet.orders import Orders
from kvlite.fleet.pace import Pace
from kvlite.fleet.peers import Peers as PeerLinks
from kvlite.fleet.speed import Speed, measure
from kvlite.fleet.uplink import Uplink
from kvlite.fleet.wire import Channel, LinkClosedError, LinkDownError, LinkError

SETUP_BYTES_MAX = 1 << 20
FAREWELL_S = 2.0
"""To write what is left to be said at the end."""

log = logging.getLogger("kvlite.fleet")


class Worker:
    """An engine that is loaded, until `serve` returns."""

    def __init__(self, setup: Setup, key: FleetKey, engine: Engine, speed: Speed) -> None:
        """Takes `engine` over. From within the event loop that serves."""
        self._setup = setup
        self._speed = speed
        self._startup = engine.startup
        self._migration = engine.migration
        self._copier = KVCopier(engine.migration.pool)
        self._engine = AsyncEngine(engine)
        config = engine.config
        self._config = LinkConfig(
            engine=setup.engine,
            key=key,
            fingerprint=fingerprint(
                self._startup.model_digest, self._startup.dtype, config.block_size, int(config.deterministic)
            ),
            block_bytes=self._copier.block_bytes,
            heartbeat_s=setup.heartbeat_s,
            timeout_s=setup.silence_s,
            bytes_per_s_limit=setup.bytes_per_s_limit,
        )

    @property
    def engine(self) -> AsyncEngine:
        """For whoever looks on: tests and measurements."""
        return self._engine

    async def serve(self) -> None:
        """Until the front-end says shutdown or its link ends. Raises EngineError when the engine breaks, LinkError when
        the front-end cannot be reached, OSError or ConfigError when nobody can listen at `setup.listen`.
        """
        link = self._link = await connect(self._setup.owner, self._owner_config(), OWNER)
        uplink = self._uplink = Uplink(link)
        self._live = LiveRequests(self._engine, uplink)
        self._peers = PeerLinks(
            self._config,
            on_frame=lambda peer, frame: self._mover.frame(peer, frame),
            on_blocks=lambda peer, frame, payload: self._mover.blocks(peer, frame, payload),
            on_down=lambda peer: self._mover.link_down(peer),
        )
        self._mover = self._make_mover(uplink)
        self._live.ended = self._mover.ended
        self._orders = Orders(self._engine, uplink)
        listener = await listen(self._setup.listen, self._config, self._peers.accept, _refused)
        uplink.post(self._hello(listener.address))
        tasks = [asyncio.ensure_future(work) for work in (self._hear(link), uplink.run(), self._report(uplink))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            _raise_fault(tasks)
            if link.ended is None:
                await self._shut(uplink, link)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            listener.close()
            for part in (self._mover, self._orders, self._live, self._peers):
                part.close()
            link.close()
            await asyncio.to_thread(self._engine.close)

    async def _shut(self, uplink: Uplink, link: Link) -> None:
        """Every request ends, and the front-end hears of it, if it still listens."""
        await asyncio.to_thread(self._engine.close)
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._live.idle()
                await uplink.flushed()
                await link.finish(FAREWELL_S)
        except (TimeoutError, LinkError) as error:
            log.info("the front-end did not wait for the end: %s", error)

    def _owner_config(self) -> LinkConfig:
        """No KV goes to the front-end, and it has no model to compare."""
        setup = self._setup
        return LinkConfig(
            engine=setup.engine,
            key=self._config.key,
            window_bytes=0,
            heartbeat_s=setup.heartbeat_s,
            timeout_s=setup.silence_s,
        )

    def _make_mover(self, uplink: Uplink) -> Mover:
        setup = self._setup
        machine = _core.Mover(
            setup.engine,
            max_moves=setup.max_moves,
            max_inflight_bytes=setup.max_inflight_bytes,
            block_bytes=self._copier.block_bytes,
            max_stages=setup.max_stages,
            reserve_ms=_ms(setup.reserve_s),
            ack_ms=_ms(setup.ack_s),
            freeze_ms=_ms(setup.freeze_s),
            claim_ms=_ms(setup.claim_s),
        )
        pace = Pace(setup.copy_share if self._startup.device == "cpu" else 1.0)
        exporter = Exporter(self._engine, self._migration, self._copier, self._live, self._peers, pace)
        importer = Importer(self._engine, self._migration, self._copier, self._live)
        return Mover(machine, exporter, importer, self._peers, uplink)

    def _hello(self, address: str) -> Hello:
        startup, limits = self._startup, self._engine.limits
        return Hello(
            engine=self._setup.engine,
            pid=os.getpid(),
            protocol=PROTOCOL,
            address=address,
            model_digest=startup.model_digest,
            dtype=startup.dtype,
            device=startup.device,
            deterministic=startup.deterministic,
            vocab_size=limits.vocab_size,
            num_layers=limits.num_layers,
            max_model_len=limits.max_model_len,
            block_size=startup.block_size,
            block_bytes=self._copier.block_bytes,
            num_blocks=startup.num_blocks,
            pool_tokens=limits.pool_tokens,
            max_num_seqs=limits.config.max_num_seqs,
            max_num_waiting=limits.config.max_num_waiting,
            prefill_tokens_per_s=self._speed.prefill_tokens_per_s,
            step_s=self._speed.step_s,
        )

    async def _hear(self, link: Link) -> None:
        """What the front-end says, until it says no more."""
        try:
            async for channel, frame, _payload in link:
                if channel is Channel.MIGRATION:
                    self._mover.frame(OWNER, frame)
                    continue
                for message in decode_from_owner(frame):
                    if isinstance(message, Shutdown):
                        return
                    self._obey(message)
        except LinkDownError as error:
            log.warning("engine %d: the front-end is gone: %s", self._setup.engine, error)
        except _core.FrameError as error:
            raise MessageError(f"the front-end sent a frame that it may not send: {error}") from None

    def _obey(self, message: FromOwner) -> None:
        match message:
            case Add():
                self._live.add(message)
            case Abort():
                self._live.abort(message)
            case Finish():
                self._live.finish(message)
            case Peers():
                own = self._setup.engine
                self._peers.update({id: address for id, address in message.addresses.items() if id != own})
            case Shutdown():
                raise AssertionError("handled by who reads")
            case _:
                self._orders.obey(message)

    async def _report(self, uplink: Uplink) -> None:
        """Statistics, until the engine breaks. Raises EngineError."""
        while True:
            uplink.post(
                Stats(
                    stats=self._speed.without(self._engine.stats()),
                    healthy=self._engine.healthy,
                    draining=self._engine.draining,
                    moves_out=self._mover.num_leaving,
                    moves_in=self._mover.num_arriving,
                    link_bytes_per_s=self._peers.rates(),
                )
            )
            if not self._engine.healthy:
                raise EngineError("the engine does not work any more")
            await asyncio.sleep(STATS_S)


def _raise_fault(tasks: list[asyncio.Task[None]]) -> None:
    """Raises what ended a task, unless that is the end of the front-end's link."""
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, LinkError):
            level = logging.INFO if isinstance(error, LinkClosedError) else logging.WARNING
            log.log(level, "the link to the front-end ended: %s", error)
        elif error is not None:
            raise error


def _refused(error: LinkError) -> None:
    log.warning("somebody who called was sent away: %s", error)


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 1)


async def _main(setup: Setup, key: FleetKey, engine: Engine, speed: Speed) -> None:
    await Worker(setup, key, engine, speed).serve()


def main() -> int:
    """Exit status: 0 when the front-end ended it, 1 for anything else, with the reason on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        setup = decode_setup(sys.stdin.buffer.readline(SETUP_BYTES_MAX))
        key = FleetKey.from_env()
        if key is None:
            raise ConfigError("KVLITE_FLEET_KEY", "is not set: a worker needs the key of its fleet")
        try:
            config = EngineConfig(**setup.config)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise MessageError(f"the setup of a worker has settings that it does not know: {error}") from None
        engine = Engine(config, progress=False)
        asyncio.run(_main(setup, key, engine, measure(engine)))
    except (KvliteError, OSError) as error:
        sys.stderr.write(f"kvlite: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
