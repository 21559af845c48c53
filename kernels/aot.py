"""Every Triton kernel compiled for sm_90 on this machine, no GPU needed: shared memory, registers, spilled bytes.

`python -m kvlite.kernels.aot --write` renews kernels/sm90.json; tests/kernels/test_aot.py compiles and compares. Shapes
are those of real models (head dim 64 and 128, bf16). Must run without TRITON_INTERPRET. Knows no model and no engine.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvlite.kernels.attention import kernel as attention
from kvlite.kernels.key_mass import kernel as key_mass
from kvlite.kernels.place_kv import kernel as place_kv
from kvlite.kernels.rms_norm import kernel as rms_norm
from kvlite.kernels.rope import kernel as rope
from kvlite.kernels.sampling import kernel as sampling
from kvlite.kernels.silu_mul import kernel as silu_mul
from kvlite.kernels.store_kv import kernel as store_kv

TABLE = Path(__file__).with_name("sm90.json")
MAX_SHARED_BYTES = 227 * 1024
_KERNELS = (
    (attention, ("prefill_kernel", "decode_kernel", "merge_kernel")),
    (key_mass, ("key_mass_kernel",)),
    (place_kv, ("place_kv_kernel",)),
    (rms_norm, ("rms_norm_kernel",)),
    (rope, ("rope_kernel",)),
    (sampling, ("row_max_kernel", "threshold_kernel", "pick_kernel", "merge_kernel")),
    (silu_mul, ("silu_mul_kernel",)),
    (store_kv, ("store_kv_kernel",)),
)
# Everything else that ends in _ptr points at the model's dtype; other arguments are i32 unless named here.
_POINTERS = {
    "*i32": "table start context seq_row last group member position rows slot source target part_id top_k token",
    "*fp32": "lse part_lse part mass cos sin logits temperature top_p log_min_p top threshold",
}
_FLOATS = ("scale", "scale_log2", "eps")


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: constexprs and launch options."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What ptxas made of a case; `spill_bytes` is the stack frame per thread, used for nothing but spills here."""

    shared_bytes: int
    registers: int
    spill_bytes: int


def _attention_cases() -> Iterator[Case]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for head_dim, group in ((64, 4), (64, 7), (128, 4), (128, 8)):
            shape = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim}
            tiles = {**shape, "GROUP": group, "BLOCK_SIZE": 16, "PRECISION": "ieee" if name == "fp32" else "tf32"}
            splits = {"ALL_ROWS": True, "SPLIT": attention.SPLIT, "MAX_SPLITS": attention.max_splits(1 << 15)}
            for windowed in (False, True) if (name, head_dim, group) == ("bf16", 128, 4) else (False,):
                label = f"d{head_dim}_g{group}_{name}" + ("_window" if windowed else "")
                prefill = {**tiles, **attention.prefill_config(dtype, head_dim, group), "WINDOWED": windowed}
                decode = {**tiles, **splits, **attention.decode_config(dtype, head_dim, group)}
                yield Case(f"attention_prefill_{label}", attention.prefill_kernel, name, {**prefill, "BLOCK_SEQS": 256})
                decode |= {"WINDOWED": windowed, "GROUPED": False}
                grouped, mixed = {"GROUPED": True}, {"GROUPED": True, "ALL_ROWS": False}
                for kind, more in (("", {}), ("_grouped", grouped), ("_grouped_mixed", mixed)):
                    if not (windowed and more) and (kind != "_grouped_mixed" or group == 4):
                        case = f"attention_decode_{label}{kind}"
                        yield Case(case, attention.decode_kernel, name, decode | more)
        for head_dim in (64, 128):
            shape = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "WINDOWED": False, "num_warps": 4}
            yield Case(f"attention_merge_d{head_dim}_{name}", attention.merge_kernel, name, {**shape, **splits})
            mass = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_SIZE": 16}
            mass |= {"PRECISION": tiles["PRECISION"], **key_mass.key_mass_config(dtype, 4)}
            yield Case(f"key_mass_d{head_dim}_{name}", key_mass.key_mass_kernel, name, mass)


def _row_cases() -> Iterator[Case]:
    for width in (128, 1024, 4096, 8192):
        constants = {"WIDTH": width, **rms_norm.rms_norm_config(width)}
        yield Case(f"rms_norm_w{width}_bf16", rms_norm.rms_norm_kernel, "bf16", {**constants, "ADD": False})
        yield Case(f"add_rms_norm_w{width}_bf16", rms_norm.rms_norm_kernel, "bf16", {**constants, "ADD": True})
    for head_dim in (64, 128):
        half = {"HALF": head_dim // 2, "BLOCK_HALF": head_dim // 2, "BLOCK_HEADS": rope.BLOCK_HEADS, "num_warps": 4}
        yield Case(f"rope_d{head_dim}_bf16", rope.rope_kernel, "bf16", half)
        width = {"KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK": 8 * head_dim, "BLOCK_SIZE": 16, "num_warps": 4}
        yield Case(f"store_kv_d{head_dim}_bf16", store_kv.store_kv_kernel, "bf16", width)
        place = {"KV_HEADS": 8, "HEAD_DIM": head_dim, "HALF": head_dim // 2, "BLOCK_SIZE": 16}
        place |= place_kv.place_kv_config(8, head_dim, head_dim // 2)
        yield Case(f"place_kv_d{head_dim}_bf16", place_kv.place_kv_kernel, "bf16", place)
    yield Case("silu_mul_bf16", silu_mul.silu_mul_kernel, "bf16", {"BLOCK": silu_mul.BLOCK, "num_warps": 4})
    chunk = {"CHUNK": sampling.CHUNK, "num_warps": 8}
    yield Case("sampling_row_max", sampling.row_max_kernel, "fp32", chunk)
    threshold = {"BLOCK_CHUNKS": 64, **sampling.threshold_config()}
    yield Case("sampling_threshold", sampling.threshold_kernel, "fp32", threshold)
    yield Case("sampling_pick", sampling.pick_kernel, "fp32", chunk)
    yield Case("sampling_merge", sampling.merge_kernel, "fp32", {"BLOCK_CHUNKS": 64, "num_warps": 1})


def cases() -> list[Case]:
    """Every kernel at every recorded shape; raises when a kernel of the package has no case."""
    found = [*_attention_cases(), *_row_cases()]
    for module, names in _KERNELS:
        for name in names:
            assert any(case.kernel is getattr(module, name) for case in found), f"{module.__name__}.{name} has no case"
    return found


def _argument_type(name: str, dtype: str) -> str:
    stem = name.removesuffix("_ptr")
    if stem != name:
        return next((kind for kind, stems in _POINTERS.items() if stem in stems.split()), f"*{dtype}")
    return "fp32" if name in _FLOATS else "i32"


def compile_case(case: Case) -> Usage:
    """Compiles one case for sm_90; pointers and strides are divisible by 16, as those of real tensors are."""
    names = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in names}
    options = {name: value for name, value in case.constants.items() if name not in names}
    signature = {name: "constexpr" if name in constants else _argument_type(name, case.dtype) for name in names}
    if case.kernel is sampling.pick_kernel:
        signature |= {"seed_ptr": "*i64", "position_ptr": "*i64"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith(("_ptr", "_stride"))}
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(int(compiled.metadata.shared), figures["REG"], figures["STACK"] + figures["LOCAL"])


def measure() -> dict[str, Any]:
    """The whole table: Triton's version and one row per case."""
    rows = {case.name: asdict(compile_case(case)) for case in cases()}
    return {"triton": triton.__version__, "target": "sm_90", "kernels": rows}


def main() -> None:
    """Prints the table as JSON, or writes it beside this file."""
    parser = argparse.ArgumentParser(prog="python -m kvlite.kernels.aot", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed table kernels/sm90.json")
    write = parser.parse_args().write
    table = measure()
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table["kernels"].items())
    head = f'"triton": {json.dumps(table["triton"])},\n "target": {json.dumps(table["target"])}'
    text = f'{{\n {head},\n "kernels": {{\n{rows}\n }}\n}}\n'
    if write:
        TABLE.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
