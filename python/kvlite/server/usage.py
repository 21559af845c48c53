"""What an answer says of its cost: `usage` in OpenAI's shape, and the `kvlite` block: where its prompt's KV came from.

Owns the JSON of both. Summed over the prompts of a call, which all ended with a last delta. Called by stream.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlite.reuse_types import ReuseReport, VerifyReport
from kvlite.server.wire import Call
from kvlite.types import Delta

Chunk = dict[str, Any]


def usage_fields(call: Call, ends: Sequence[Delta]) -> Chunk:
    """`usage` and the `kvlite` block. `ends` are the last deltas of the call's prompts."""
    usages = [end.usage for end in ends if end.usage is not None]
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        },
        **reuse_fields(call, ends),
    }


def reuse_fields(call: Call, ends: Sequence[Delta]) -> Chunk:
    """The `kvlite` block. The four counts add up to the prompt's tokens."""
    reports = [_report(call, end) for end in ends]
    block: Chunk = {
        "reuse": reports[0].mode,
        "exact": all(report.exact for report in reports),
        "prefix_tokens": sum(report.prefix_tokens for report in reports),
        "blended_tokens": sum(report.blended_tokens for report in reports),
        "recomputed_tokens": sum(report.recomputed_tokens for report in reports),
        "computed_tokens": sum(report.computed_tokens for report in reports),
    }
    for report in reports:
        if report.segments:
            block["segments"] = [{"id": item.id, "tokens": item.tokens, "hit": item.hit} for item in report.segments]
        if report.method is not None and report.ratio is not None:
            block |= {"method": report.method, "recompute_ratio": report.ratio}
        if report.verify is not None:
            block["verify"] = _verify(report.verify)
        if report.fallback is not None:
            block["fallback"] = report.fallback
    return {"kvlite": block}


def _report(call: Call, end: Delta) -> ReuseReport:
    """The engine's own; without one (it ended before it was admitted) nothing was blended."""
    if end.reuse is not None:
        return end.reuse
    assert end.usage is not None, "the last delta of a request has its usage"
    asked = call.prompts[0].request.options.reuse
    assert asked is not None, "validate fills in the engine's default"
    cached = end.usage.cached_tokens
    return ReuseReport(asked.mode, True, cached, 0, 0, end.usage.prompt_tokens - cached)


def _verify(report: VerifyReport) -> Chunk:
    """How the blended twin differs; tokens are counted, `first_difference` is null when the answers agree."""
    return {
        "kl": report.kl,
        "top1_equal": report.top1_equal,
        "max_logit_difference": report.max_logit_difference,
        "equal_tokens": report.equal_tokens,
        "exact_tokens": report.exact_tokens,
        "blended_tokens": report.blended_tokens,
        "first_difference": report.first_difference,
        "blended_text": report.blended_text,
    }
