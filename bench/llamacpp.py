"""llama.cpp as a peer: checkpoints in its format, the command of its server, and its protocol with token ids.

OpenAI's routes of llama-server take ids and give none back, so it is asked at its own route, /completion. Owns the
folder .peers/gguf, where every model is converted once per number format. Called by targets.py.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from .client import Address, Piece, RequestError, complaint, events
from .errors import TargetError
from .load import Send
from .workloads import Job

FORMATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def gguf(home: Path, model: Path, dtype: str) -> Path:
    """`model` as one file in `dtype`, converted now unless it was before. Raises TargetError with the converter's end.

    The name holds a digest of the names, sizes and times of the model's files: another model is another file.
    """
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
    folder = home.parent / "gguf"
    wanted = folder / f"{model.resolve().name}-{digest}-{FORMATS[dtype]}.gguf"
    if wanted.exists():
        return wanted
    folder.mkdir(exist_ok=True)
    partial = wanted.with_suffix(".partial")
    print(f"  llamacpp: converting {model.name} to {FORMATS[dtype]}", flush=True)
    command = [
        sys.executable, "-m", f"{__package__}.convert_gguf", str(home / "source"), str(model.resolve()),
        "--outfile", str(partial), "--outtype", FORMATS[dtype],
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise TargetError(f"no conversion to {FORMATS[dtype]}, status {done.returncode}: {said[-1][:300]}")
    partial.rename(wanted)
    return wanted


def sender(address: Address, model: str) -> Send:
    """How a job is asked: greedy, end-of-text excluded, ids both ways."""

    async def send(job: Job) -> AsyncGenerator[Piece]:
        fields: dict[str, Any] = {
            "prompt": list(job.prompt), "n_predict": job.max_tokens, "stream": True, "return_tokens": True,
            "ignore_eos": True, "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        seen = 0
        async with aclosing(events(address, "/completion", fields)) as found:
            async for event in found:
                piece, ended = parse(event, seen)
                seen += piece.num_tokens
                yield piece
                if ended:
                    return
        raise RequestError("the stream ended without its last event")

    return send


def parse(event: bytes, seen: int) -> tuple[Piece, bool]:
    """One event after `seen` tokens, and whether it is the last.

    A token that ends inside a character gets no event, so the running count tells how many tokens an event is worth.
    """
    try:
        fields = json.loads(event)
        if fields.get("error"):
            raise RequestError(complaint(200, event))
        count = int(fields["tokens_predicted"])
        usage = None
        if fields["stop"]:
            cached = fields["timings"]["cache_n"]
            usage = {"completion_tokens": count, "prompt_tokens": fields["tokens_evaluated"]}
            usage |= {"prompt_tokens_details": {"cached_tokens": cached}}
        return Piece(count - seen, tuple(fields["tokens"]), usage), bool(fields["stop"])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RequestError(f"an event that is no part of a completion: {event[:80]!r}") from None
