"""`python -m bench quality`: what blended KV reuse costs in answers, and what each way of choosing rows wins back.

Physics. KV of a document that was computed alone knows nothing of the documents before it. Questions whose answer needs
two documents together (a pronoun, a role, "that city") show it; questions inside one document do not. Exact prefill is
the ceiling, position repair alone the floor, and `gap` the share between them that a rule wins back. The cost beside it
is measured at the products of the engine: token-layers computed beyond the text that is no document, selection
included, over all token-layers of the documents. Correctness first: exact prefill must answer at least nine questions
in ten, position repair alone clearly fewer, and with all rows recomputed the answers must be those of exact prefill.

Fresh questions in the language of the shipped model; `--seed` draws others. The picture (`--picture`) needs matplotlib:
pip install matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlite import Engine
from kvlite.models import load_config
from kvlite.progress import Bar

from ..errors import BenchError
from ..limits import kv_bytes_per_token
from ..options import add_model_options, integers, model_directory, torch_dtype
from ..report import HERE, finish, origin
from . import figures, plot
from .asking import Asker, Rule
from .generator import CROSS_KINDS, contexts
from .meter import metered

METHODS = ("hybrid", "query", "plain-query", "deviation", "attention-deviation", "boundary", "random")
RATIOS = "5,8,10,15,20,30"
SEED = 20_000
"""Of the figures that are kept; no method was tuned on its questions."""
KV_TOKENS = 24_576
VERIFIED = ("query", "hybrid")
"""Methods whose logits are compared."""
CONTROLLED = (figures.FULL, figures.NONE, Rule("query", 0.15), Rule("hybrid", 0.15))
"""Rules under which questions inside one document are asked too."""


def rules(methods: Sequence[str], ratios: Sequence[int]) -> list[Rule]:
    """Exact prefill and position repair first, then every method at every ratio, all rows, and the wrong mask."""
    found = [figures.FULL, figures.NONE]
    found += [Rule(method, percent / 100) for method in methods for percent in ratios]
    found.append(Rule("query", 1.0))
    if "query" in methods and 15 in ratios:
        found.append(Rule("query", 0.15, bottom_right=True))
    return found


def main(arguments: list[str]) -> int:
    """Contexts one after the other under every rule; gate, table, picture; the last line is one JSON object."""
    options = _parser().parse_args(arguments)
    if options.redraw:
        kept = json.loads((HERE / "results" / "quality.json").read_text(encoding="utf-8"))
        plot.picture(kept["rows"], HERE / "results" / "quality.png")
        return 0
    directory = model_directory(options.model)
    config, _family = load_config(directory)
    dtype = torch_dtype(options.dtype)
    methods = [name for name in options.methods.split(",") if name]
    asked_rules = rules(methods, integers("--ratios", options.ratios))
    controls = [rule for rule in asked_rules if rule in CONTROLLED]
    found: dict[str, Any] = origin() | {"model": directory.name, "dtype": str(dtype).removeprefix("torch.")}
    with (
        metered(config) as meter,
        Engine(
            str(directory), device="cpu", dtype=found["dtype"], num_threads=options.threads, max_num_seqs=16,
            kv_cache_bytes=KV_TOKENS * kv_bytes_per_token(config, dtype),
        ) as engine,
        Bar("asking", unit="questions") as bar,
    ):  # fmt: skip
        asker, source = Asker(engine, meter, config.num_layers), contexts(options.seed, per_kind=2)
        verified = [figures.NONE] + [rule for rule in asked_rules if rule.method in VERIFIED and not rule.bottom_right]
        num_contexts, num_questions = 0, 0
        while num_questions < options.questions:
            context = source()
            asker.context(num_contexts, context, asked_rules, controls)
            if num_contexts < options.verify:
                asker.verify(context, verified)
            num_contexts += 1
            num_questions += sum(question.kind in CROSS_KINDS for question in context.questions)
            bar.update(min(num_questions, options.questions), options.questions)
            if not sys.stderr.isatty():
                print(f"{num_questions} of {options.questions} questions", flush=True)
    figures.gate(asker.asked)
    rows = {rule: figures.row(rule, asker.asked) for rule in asked_rules}
    print(figures.table(rows))
    found |= {"seed": options.seed, "contexts": num_contexts} | figures.keys(asker.asked, rows)
    finish("quality", found | {"rows": list(rows.values())}, options.save)
    if options.picture:
        plot.picture(list(rows.values()), Path(options.picture))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--questions", type=int, default=300, help="at least so many that need another document")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--ratios", default=RATIOS, help="recompute ratios in percent, separated by commas")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--verify", type=int, default=10, help="contexts whose logits are compared too (KL, top-1)")
    parser.add_argument("--picture", metavar="PNG", help="draw quality against time to the first token")
    parser.add_argument("--redraw", action="store_true", help="only draw bench/results/quality.json again")
    return parser


__all__ = ["BenchError", "main", "rules"]
