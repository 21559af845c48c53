"""The picture: exact match against time to the first token, a line per method.

Needs matplotlib, which nothing else does. Knows rows of figures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BenchError

INSTALL = "the picture needs matplotlib: pip install matplotlib"
COLOURS = {
    "hybrid": "#d62728", "query": "#1f77b4", "plain-query": "#17becf", "deviation": "#2ca02c",
    "attention-deviation": "#9467bd", "boundary": "#8c564b", "random": "#7f7f7f",
}  # fmt: skip


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws rows of `figures.row` to `path` (PNG). Raises BenchError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchError(INSTALL) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    full = next(one for one in rows if one["method"] == "full")
    none = next(one for one in rows if one["method"] == "none")
    for axes, x in ((left, "ttft_ms"), (right, "token_layers")):
        axes.axhline(full["exact_match"], color="black", linewidth=0.8, linestyle=":")
        axes.axhline(none["exact_match"], color="black", linewidth=0.8, linestyle=":")
        axes.plot(full[x], full["exact_match"], "k*", markersize=11, label="exact prefill")
        axes.plot(none[x], none["exact_match"], "kx", markersize=8, label="positions repaired only")
        for method in dict.fromkeys(one["method"] for one in rows):
            of_method = [
                one
                for one in rows
                if one["method"] == method and one["mask"] == "exact" and one["ratio"] not in (None, 0.0, 1.0)
            ]
            if of_method:
                of_method.sort(key=lambda one: one["ratio"])
                _line(axes, of_method, x, method)
        axes.grid(alpha=0.25)
    left.set_xlabel("time to the first token, ms")
    right.set_xlabel("token-layers computed of the documents', selection included")
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_ylabel("exact match across documents")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(axes: Any, rows: Sequence[dict[str, Any]], x: str, method: str) -> None:
    values = [one["exact_match"] for one in rows]
    below = [one["exact_match"] - one["exact_match_95"][0] for one in rows]
    above = [one["exact_match_95"][1] - one["exact_match"] for one in rows]
    axes.errorbar(
        [one[x] for one in rows], values, yerr=[below, above], label=method, color=COLOURS.get(method),
        marker="o", markersize=4, linewidth=1.4, elinewidth=0.6, capsize=2,
    )  # fmt: skip
