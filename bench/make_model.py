"""`python -m bench make-model DIR`: a random-weight checkpoint of a given shape in Hugging Face layout.

Speed does not depend on what weights say, only on how many there are: with random ones every engine can be measured on
the same directory without a download. The tokenizer is real, a byte-level BPE trained here on text made from the seed,
because engines tokenise, detokenise and count. Projections have variance 1 / inputs, so that every layer changes the
residual and greedy tokens vary: an engine that computes a layer wrongly says other tokens.

Loads in transformers, kvlite and whatever else reads that layout. The same shape and seed give the same bytes. Weights
are written in shards of at most 512 MB (or one tensor), one in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvlite.progress import Bar

from .errors import BenchError
from .report import finish, origin

SHARD_BYTES = 512 << 20
SPECIALS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|doc|>")
END = SPECIALS.index("<|end|>")
CHAT = (
    "{% for m in messages %}<|{{ 'doc' if m['role'] == 'document' else m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """What config.json says; `family` is llama or qwen2 (which has biases on q, k and v)."""

    family: str = "qwen2"
    num_layers: int = 24
    hidden_size: int = 896
    num_heads: int = 14
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 4864
    vocab_size: int = 32_768
    max_positions: int = 32_768
    rope_theta: float = 1e6
    tied: bool = True


SHAPES = {
    "qwen2-0.5b": Shape(),
    "small-long": Shape("llama", 12, 256, 4, 2, 64, 704, 1394, 16_384, 1e4),
    "mha": Shape("llama", 12, 768, 12, 12, 64, 2048, 32_768, 8192, 1e4),
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, 8192, 5e5, tied=False),
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order in which they are written."""
    width, heads, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, width)}
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = (width,)
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            if shape.family == "qwen2":
                found[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        found[layer + "self_attn.o_proj.weight"] = (width, heads)
        found[layer + "post_attention_layernorm.weight"] = (width,)
        found[layer + "mlp.gate_proj.weight"] = (shape.intermediate_size, width)
        found[layer + "mlp.up_proj.weight"] = (shape.intermediate_size, width)
        found[layer + "mlp.down_proj.weight"] = (width, shape.intermediate_size)
    found["model.norm.weight"] = (width,)
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab_size, width)
    return found


def weights_bytes(shape: Shape) -> int:
    """Bytes of the checkpoint's weights in bf16."""
    return 2 * sum(map(math.prod, tensors(shape).values()))


def config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.family]],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "bos_token_id": SPECIALS.index("<|bos|>"),
        "eos_token_id": END,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def text(seed: int, num_words: int) -> Iterator[str]:
    """Lines of made-up words, `num_words` different ones, frequent ones often (Zipf); a function of its arguments."""
    draw = random.Random(seed)
    vowels = ("a", "e", "i", "o", "u", "ai", "ou")
    syllables = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in vowels for last in ("", "n", "r")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(num_words)]
    for start in range(0, num_words, 8):
        common = [words[int(num_words ** draw.random()) - 1] for _ in range(24)]
        yield " ".join([*words[start : start + 8], *common]).capitalize() + f", {draw.randint(0, 9999)}.\n"


def write_tokenizer(folder: Path, vocab_size: int, seed: int) -> None:
    """Trains a byte-level BPE of at most `vocab_size` ids and writes it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    wanted = min(vocab_size, 32_768)
    smallest = 256 + len(SPECIALS)
    if wanted < smallest:
        raise BenchError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        min_frequency=1,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(seed, 2 * wanted), trainer)
    assert tokenizer.get_vocab_size() == wanted, "the text has words enough for every merge"
    tokenizer.save(str(folder / "tokenizer.json"))
    # Some classes of transformers add an unknown token of their own, past the vocabulary, where none is named.
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|pad|>"}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | fixed, indent=1))


def copy_tokenizer(folder: Path) -> None:
    """The shipped model's tokenizer, for shapes that are its own at another length."""
    import kvlite

    shipped = Path(kvlite.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shipped / name, folder / name)


def fill(name: str, size: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    """Random values of one tensor, bf16."""
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    scale = 0.02 if len(size) == 1 or "embed" in name or "lm_head" in name else size[-1] ** -0.5
    return (torch.randn(size, generator=noise) * scale).to(torch.bfloat16)


def write_weights(shape: Shape, folder: Path, seed: int, progress: Callable[[int, int], None]) -> None:
    """model-NNNNN-of-NNNNN.safetensors and the index. `progress` gets (bytes written, bytes in all)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in tensors(shape).items():
        if size and size + 2 * math.prod(dims) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size += 2 * math.prod(dims)
    noise = torch.Generator().manual_seed(seed)
    total, done = weights_bytes(shape), 0
    where: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        filled: dict[str, torch.Tensor] = {}
        for name, dims in shard.items():
            filled[name] = fill(name, dims, noise)
            where[name] = file
            done += filled[name].nbytes
            progress(done, total)
        save_file(filled, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


def check_fits(shape: Shape, folder: Path, available: int, free_disk: int) -> None:
    """Refuses a model whose weights fit neither this machine's memory nor its disk."""
    size = weights_bytes(shape)
    for what, room in (("memory", available), ("disk", free_disk)):
        if size > room:
            raise BenchError(
                f"{folder}: the weights of this shape are {size / 1e9:.1f} GB in bf16, {room / 1e9:.1f} GB of {what} "
                "are free: take fewer layers (--set num_layers=...) or a smaller --shape"
            )


def available_bytes() -> int:
    """Memory that a new process can have, bytes; unknown systems report no limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def make(shape: Shape, folder: Path, *, seed: int = 0, progress: bool | None = None) -> None:
    """Writes the whole model directory. Raises BenchError for a shape that is inconsistent or too large."""
    check(shape)
    disk = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    check_fits(shape, folder, available_bytes(), shutil.disk_usage(disk).free)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    special = {"bos_token_id": SPECIALS.index("<|bos|>"), "eos_token_id": END, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=1))
    if shape.vocab_size == SHAPES["small-long"].vocab_size:
        copy_tokenizer(folder)
    else:
        write_tokenizer(folder, shape.vocab_size, seed)
    with Bar("writing", unit="B", wanted=progress) as bar:
        write_weights(shape, folder, seed, bar.update)


def check(shape: Shape) -> None:
    """Every count is positive and heads divide."""
    for field in fields(shape):
        value = getattr(shape, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise BenchError(f"{field.name} is {value}: must be above 0")
    if shape.num_heads % shape.num_kv_heads:
        raise BenchError(f"num_heads is {shape.num_heads}: must be a multiple of num_kv_heads, {shape.num_kv_heads}")
    if shape.family not in ("llama", "qwen2"):
        raise BenchError(f"family is {shape.family!r}: llama or qwen2")


def changed(shape: Shape, changes: list[str]) -> Shape:
    """`shape` with the fields of `name=value` texts replaced. Raises BenchError for an unknown name or a bad value."""
    kinds = {field.name: type(getattr(shape, field.name)) for field in fields(shape)}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise BenchError(f"--set {change}: unknown field; one of {', '.join(kinds)}")
        try:
            parsed: Any = value == "true" if kinds[name] is bool else kinds[name](value)
        except ValueError:
            raise BenchError(f"--set {change}: {value!r} is no {kinds[name].__name__}") from None
        shape = replace(shape, **{name: parsed})
    return shape


def main(arguments: list[str]) -> int:
    """Writes one directory; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench make-model", description="a random-weight checkpoint")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the shape")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape = changed(SHAPES[options.shape], options.set)
    figures: dict[str, Any] = origin()
    make(shape, options.directory, seed=options.seed)
    size = weights_bytes(shape)
    print(f"{options.directory}: {size / 2e6:.1f} M parameters, {size / 1e6:.0f} MB")
    finish("make-model", figures | {"parameters": size // 2, "weights_bytes": size}, save=False)
    return 0
