"""`python -m bench <name> [options]`: finds the benchmark by name and runs it; without a name, lists them."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {"core": "one step of the Rust core, and the operations of its cache"}


def main() -> int:
    """Runs the named benchmark; 2 for a name that does not exist."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name not in BENCHMARKS:
        for known, text in BENCHMARKS.items():
            print(f"  python -m bench {known:8} {text}")
        return 0 if name in ("help", "-h", "--help") else 2
    return importlib.import_module(f".{name}", __package__).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
