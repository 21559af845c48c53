"""A minimal paged driver: one decoder, one pool of scattered blocks, no scheduler. The oracle's stupid counterpart."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvlite.models import Decoder, ForwardBatch

BLOCK_SIZE = 16


@dataclass
class Row:
    """One sequence: its block table row and the tokens whose KV is in the pool."""

    index: int
    tokens: list[int] = field(default_factory=list)


class Driver:
    """Runs chunks of sequences through a decoder; blocks are handed out in a shuffled order."""

    def __init__(self, decoder: Decoder, *, num_rows: int = 8, max_len: int = 256, seed: int = 0) -> None:
        config = decoder.config
        self.decoder = decoder
        self.max_blocks = -(-max_len // BLOCK_SIZE)
        num_blocks = num_rows * self.max_blocks
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.block_table = order.to(torch.int32).view(num_rows, self.max_blocks).to(decoder.device)
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=decoder.dtype, device=decoder.device)
        self._free = list(range(num_rows))

    def row(self) -> Row:
        """A new, empty sequence."""
        return Row(self._free.pop())

    def run(self, chunks: list[tuple[Row, list[int]]]) -> list[torch.Tensor]:
        """Computes the next tokens of several sequences in one batch; returns each one's hidden states [n, W]."""
        hidden = self.decoder.forward(self.batch(chunks), self.pool).clone()
        return list(hidden.split([len(tokens) for _, tokens in chunks]))

    def batch(self, chunks: list[tuple[Row, list[int]]]) -> ForwardBatch:
        """The next tokens of several sequences, appended to them."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts = [0], []
        for row, tokens in chunks:
            first = len(row.tokens)
            row.tokens.extend(tokens)
            ids += tokens
            positions += range(first, first + len(tokens))
            blocks = self.block_table[row.index].tolist()
            slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, first + len(tokens))]
            starts.append(starts[-1] + len(tokens))
            contexts.append(len(row.tokens))

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.decoder.device)

        return ForwardBatch(
            token_ids=int32(ids),
            positions=int32(positions),
            last_key=int32(positions),
            slot_mapping=int32(slots),
            query_start=int32(starts),
            context_len=int32(contexts),
            seq_row=int32([row.index for row, _ in chunks]),
            block_table=self.block_table,
        )

    def feed(self, row: Row, tokens: list[int], chunk: int | None = None) -> torch.Tensor:
        """All tokens of one sequence, `chunk` at a time; returns hidden states [n, W]."""
        step = chunk or len(tokens)
        return torch.cat([self.run([(row, tokens[i : i + step])])[0] for i in range(0, len(tokens), step)])

    def kv(self, row: Row) -> torch.Tensor:
        """Keys and values of a sequence in position order, [layers, 2, n, KH, D]."""
        pages = self.pool[self.block_table[row.index].long()]
        flat = pages.permute(1, 2, 0, 4, 3, 5).flatten(2, 3)
        return flat[:, :, : len(row.tokens)]

    def greedy(self, prompt: list[int], num_tokens: int, chunk: int | None = None) -> list[int]:
        """Prefill in chunks, then decode; ties to the lowest id."""
        row = self.row()
        hidden = self.feed(row, prompt, chunk)[-1:]
        produced: list[int] = []
        while True:
            produced.append(int(self.decoder.logits(hidden).argmax(-1)))
            if len(produced) == num_tokens:
                return produced
            hidden = self.feed(row, produced[-1:])
