"""A thousand forced moves under load, with faults of every link and dying engines among them: no token changes.

KVLITE_MOVES says how many moves (`make soak`: 10,000), KVLITE_SEED which. Half of them over TCP, half over shared
memory. What happened is written to standard output (pytest -s).
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter

import pytest

from kvlite.fleet.moves import MoveHow
from tests.fleet.asks import config, oracle, subject
from tests.fleet.faults import CONTROL, Ask, Client, Passing, Yard, yard
from tests.fleet.proxy import Fault
from tests.fleet.scenarios import NUM_MOVES, SEED, check, others

MOVES = NUM_MOVES or 1000
STREAMS = 8
DIFFERENT = 16
"""Requests beside the neighbours' that are asked again and again."""
DELAYED = 0.1
"""Share of frames that are held for a moment."""
LONGEST_S = 0.01
FAULTS_PER_FRAME = 1 / 800
"""Of frames between engines."""
DEATHS = 2
"""Per run."""
FAULTS = (Fault.DROP, Fault.DOUBLE, Fault.SWAP, Fault.FLIP_FRAME, Fault.CUT)


class Storm:
    """Streams that come and go, moved again and again, and what becomes of it."""

    def __init__(self, made: Yard, asks: list[Ask], num_moves: int, seed: int) -> None:
        self.results: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._made = made
        self._asks = asks
        self._num_moves = num_moves
        self._draw = random.Random(seed)
        self._num_streams = 0
        self._deaths_at = [num_moves * (n + 1) // (DEATHS + 1) for n in range(DEATHS)]
        made.jitter = self._jitter

    @property
    def over(self) -> bool:
        return self.results["moved"] >= self._num_moves

    async def run(self) -> None:
        await asyncio.gather(*(self._streams() for _ in range(STREAMS)))

    async def _streams(self) -> None:
        """One stream after the other, each of them on the move from its first token to its last."""
        while not self.over:
            self._num_streams += 1
            client = Client(self._made.fleet, self._draw.choice(self._asks), f"r{self._num_streams}")
            while not self.over and await client.reached(client.num_tokens + 1):
                await self._move(client)
            check(client.name, client.ask, await client.task)

    async def _move(self, client: Client) -> None:
        source = self._made.owner_of(client.name)
        how = self._draw.choices([MoveHow.COPY, MoveHow.REPLAY, MoveHow.AUTO], [8, 1, 1])[0]
        report = None if source is None else await self._made.move(client.name, 1 - source, how)
        self.results["not begun" if report is None else report.result] += 1
        if self._deaths_at and self.results["moved"] >= self._deaths_at[0]:
            self._deaths_at.pop(0)
            self._made.signal(self._draw.choice(list(self._made.fleet.members)), signal.SIGKILL)

    async def _jitter(self, passing: Passing) -> Fault:
        if self._draw.random() < DELAYED:
            await asyncio.sleep(self._draw.random() * LONGEST_S)
        between_engines = min(passing.sender, passing.receiver) >= 0 and passing.name != CONTROL
        if between_engines and self._draw.random() < FAULTS_PER_FRAME:
            fault = self._draw.choice(FAULTS)
            self.faults[fault.name] += 1
            return fault
        return Fault.NONE


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_forced_moves_under_load_with_faults_and_deaths_change_no_token(kind: str) -> None:
    asks = [*others(), *(subject(500 + n, 480) for n in range(DIFFERENT))]
    oracle.learn(asks)

    async def main() -> None:
        async with yard(config(), kind, ack_s=1.0, freeze_s=1.0, reserve_s=2.0, claim_s=0.2) as made:
            storm = Storm(made, asks, -(-MOVES // 2), SEED)
            await storm.run()
            made.jitter = lambda passing: Fault.NONE
            await made.quiet()
            what = f"{dict(storm.results)}, faults {dict(storm.faults)}, {made.num_deaths} deaths"
            sys.stdout.write(f"seed {SEED}, {kind}: {what}\n")
            assert storm.results["moved"] >= MOVES // 2

    asyncio.run(main())
