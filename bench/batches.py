"""The workloads of `offline`, what they ask for at least, and the least work that it takes.

BatchLLM's shape (arXiv 2412.03594): requests that share a long prefix and have few tokens of their own, arriving in the
worst order; and trees of prefixes with outputs of mixed lengths. Pure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from kvlite.models import ModelConfig

from . import workloads
from .limits import products
from .workloads import Job

DEGREE, SHARED, OWN, DRAWN = 16, 2000, 200, 100
BLOCK = 16
"""Tokens of one block of the cache, by default."""


@dataclass(frozen=True)
class Groups:
    """BatchLLM's shape; lengths in tokens."""

    num_groups: int
    degree: int = DEGREE
    shared: int = SHARED
    own: int = OWN
    drawn: int = DRAWN

    @property
    def num_jobs(self) -> int:
        """Requests in all."""
        return self.num_groups * self.degree

    def jobs(self, vocab: int) -> list[Job]:
        """No two neighbours are of one group, if there are two."""
        return [
            Job(
                workloads.tokens(f"offline {group}", self.shared, vocab)
                + workloads.tokens(f"offline {group} {member}", self.own, vocab),
                self.drawn,
            )
            for member in range(self.degree)
            for group in range(self.num_groups)
        ]

    def work(self, config: ModelConfig, computed: int, readers: int) -> tuple[float, float]:
        """Floating-point operations for so many computed prompt tokens and what is drawn, and keys that decode steps
        read, each prefix once for `readers`.
        """
        drawn = self.num_jobs * self.drawn
        weights = sum(p.num_weights * p.count for p in products(config) if p.name != "head")
        per_key = 4.0 * config.num_heads * config.head_dim * config.num_layers
        # A prompt's row sees half of the prompt on average, a drawn one all of it and half of what is drawn.
        seen = computed * (self.shared + self.own) / 2 + drawn * (self.shared + self.own + self.drawn / 2)
        read = drawn * (self.shared / readers + self.own + self.drawn / 2)
        return 2.0 * weights * (computed + drawn) + per_key * seen, read


def nested(num_trees: int, scale: float, vocab: int) -> list[Job]:
    """Trees of prefixes: one for 64, one for every 16, one for every 4 of them, and loners; mixed lengths, shuffled."""
    jobs: list[Job] = []
    draw = random.Random(1)

    def part(name: str, length: int) -> tuple[int, ...]:
        return workloads.tokens(f"nested {name}", max(int(length * scale), 1), vocab)

    for tree in range(num_trees):
        # What a group draws has a scale of its own, so that there is something to order by.
        for leaf in range(64):
            above = part(f"{tree}", 640) + part(f"{tree} {leaf // 16}", 320) + part(f"{tree} {leaf // 4} of 16", 160)
            drawn = (8, 32, 64, 128)[(leaf // 16 + tree) % 4] + draw.randrange(8)
            jobs.append(Job(above + part(f"{tree} own {leaf}", 48), max(int(drawn * scale), 1)))
        jobs += [Job(part(f"{tree} lone {n}", 400), max(int(64 * scale), 1)) for n in range(8)]
    draw.shuffle(jobs)
    return jobs


@dataclass(frozen=True)
class Count:
    """What a workload asks for at least, in tokens."""

    prompt: int
    distinct: int
    drawn: int
    longest: int

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Count:
        """Neighbours in sorted order share all that anybody before shares; the last token is computed in any case."""
        prompts = sorted(job.prompt for job in jobs)
        shared = sum(min(common_len(*pair), len(pair[1]) - 1) for pair in pairwise(prompts))
        total = sum(map(len, prompts))
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        return cls(total, total - shared, sum(job.max_tokens for job in jobs), longest)


def common_len(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two prompts begin with alike."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, alike))
