"""Command-line options that several scenarios share, and what they mean. Knows argparse and paths, no benchmark."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from .errors import BenchError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --threads, --save."""
    parser.add_argument("--model", default="small", help="small (the model that ships) or a directory (make-model)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save", action="store_true", help="also write bench/results/")


def model_directory(name: str) -> Path:
    """The directory that `--model` names. Raises BenchError when there is none."""
    if name == "small":
        from kvlite.startup import SHIPPED_MODEL

        return SHIPPED_MODEL
    directory = Path(name)
    if not (directory / "config.json").is_file():
        raise BenchError(f"--model {name}: no config.json there; write one with: python -m bench make-model {name}")
    return directory


def torch_dtype(name: str) -> torch.dtype:
    """`auto` is what an engine takes on this CPU: bf16 where it is multiplied natively, else fp32."""
    if name != "auto":
        return DTYPES[name]
    abilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32


def integers(option: str, text: str) -> list[int]:
    """Numbers above 0 out of `1,8,32`. Raises BenchError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise BenchError(f"{option} {text}: numbers above 0 are wanted, separated by commas")
    return found


def pairs(option: str, text: str) -> list[tuple[int, int]]:
    """(batch, context) out of `1x64,8x64`. Raises BenchError."""
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        numbers = integers(option, part.replace("x", ",", 1))
        if len(numbers) != 2:
            raise BenchError(f"{option} {text}: pairs like 8x64 (batch x context) are wanted, separated by commas")
        found.append((numbers[0], numbers[1]))
    return found
