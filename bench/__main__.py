"""`python -m bench SCENARIO [options]`: finds the benchmark by name and runs it; without a name, lists them."""

from __future__ import annotations

import importlib
import sys

from .errors import BenchError

BENCHMARKS = {
    "core": "one step of the Rust core, and the operations of its cache",
    "hitrate": "prefix hits of a trace by order of eviction, as shares of the offline optimum",
    "limits": "the best rates of reads and products on this machine",
    "decode": "decode steps of an embedded engine, as shares of the limits",
    "blend": "documents at any place: time to the first token against exact prefill, memory, neighbours",
    "migrate": "moves of requests between engines: gaps between tokens, neighbours, bytes",
    "policies": "orders of admission on a mix of hit rates, each against fcfs",
    "prefill": "time to the first token of an embedded engine, as shares of the limits",
    "quality": "answers and time to the first token of blended reuse, by method and recompute ratio",
    "offline": "a whole workload at hand: prefix groups against order of arrival, the limits, transformers and vLLM",
    "kernels": "each op on each backend, as shares of its bound",
    "gpu": "the GPU side in one command: kernels against references, decode and prefill of an 8B shape against floors",
    "serve": "load on any OpenAI-compatible server: waiting, tokens per second, goodput",
    "compare": "kvlite and its peers side by side, each in its own environment",
    "install-peers": "vLLM and llama.cpp, each in an environment of its own, for compare",
    "make-model": "write a random-weight checkpoint that every engine can load",
}


def main() -> int:
    """Runs the named benchmark; 2 for a name that does not exist, 1 for one that cannot give its figures."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name not in BENCHMARKS:
        for known, text in BENCHMARKS.items():
            print(f"  python -m {__package__} {known:13} {text}")
        return 0 if name in ("help", "-h", "--help") else 2
    try:
        return importlib.import_module(f".{name.replace('-', '_')}", __package__).main(arguments)
    except BenchError as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
