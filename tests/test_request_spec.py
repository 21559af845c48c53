"""A request on the wire: everything that an engine needs comes back, and what was tampered with meets the same wall."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from kvlite import Engine, InvalidRequestError, RequestOptions, Reuse, SamplingParams, Segment
from kvlite.fleet import parcel, spec
from kvlite.migration import Moving
from kvlite.request import ValidatedRequest, recheck
from kvlite.reuse_types import ReuseMode, ReuseReport
from kvlite.types import Logprob, TokenLogprobs
from tests.engines import MAX_LEN, SMALL, VOCAB, engine, ids

PARAMS = SamplingParams(
    n=2, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, presence_penalty=0.5, frequency_penalty=-0.25,
    repetition_penalty=1.2, logit_bias={9: 3.0, 11: -100.0}, stop=["never"], stop_token_ids=[12, 14], min_tokens=3,
    max_tokens=20, logprobs=4, prompt_logprobs=2, include_stop_str_in_output=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Any:
    with engine(policy="priority") as one:
        yield one


@pytest.fixture(scope="module")
def shipped() -> Any:
    with Engine(**SMALL) as one:
        yield one


def over_the_wire(made: Engine, request: ValidatedRequest, seed: int = 5) -> ValidatedRequest:
    return spec.decode(made.limits, spec.encode(request, seed))


def without_text(request: ValidatedRequest, seed: int = 5) -> dict[str, Any]:
    """Every field, as a decoded request has it."""
    fields = dict(vars(request))
    fields["prompt_ids"] = request.prompt_ids.tolist()
    params = replace(request.params, stop=(), seed=seed, include_stop_str_in_output=False, skip_special_tokens=True)
    fields["params"] = params
    fields["options"] = replace(request.options, timeout_s=request.timeout_s)
    return fields | {"text": None, "raw": True}


def test_every_field_comes_back_but_those_of_the_text(made: Engine) -> None:
    request = made.validate(ids(30), PARAMS, RequestOptions(priority=-7, timeout_s=12.5, tenant=3))
    back = over_the_wire(made, request)
    assert without_text(back) == without_text(request)
    assert back.params.stop_strings == () and back.params.seed == 5 and back.raw


@pytest.mark.parametrize("reuse", [None, Reuse.OFF, Reuse.PREFIX, Reuse.blend(0.4, "deviation", check_layer=1),
                                   Reuse.blend(0.25), Reuse.verify(0.1, "boundary")])  # fmt: skip
@pytest.mark.parametrize("with_segments", [False, True])
def test_every_reuse_mode_comes_back(shipped: Engine, reuse: Reuse | None, with_segments: bool) -> None:
    parts = ["Read.", Segment("Nora lives in Oslo.", id="nora"), Segment("Ben owns a boat."), "Where?"]
    prompt = parts if with_segments else "Where?"
    request = shipped.validate(prompt, SamplingParams(max_tokens=5), reuse=reuse)  # type: ignore[arg-type]
    back = over_the_wire(shipped, request)
    assert without_text(back) == without_text(request)
    assert (back.blending is not None) == (with_segments and reuse is not None and reuse.is_blended)


def test_what_the_quality_floor_decided_comes_back(shipped: Engine) -> None:
    asked = shipped.validate(["Read.", Segment("Nora lives in Oslo."), "Where?"], reuse=Reuse.blend(0.25))
    assert asked.blending is not None
    raised = replace(asked, blending=replace(asked.blending, ratio=0.5), fallback="ratio raised to 0.5")
    exact = replace(asked, blending=None, fallback="computed exactly")
    for request in (raised, exact):
        back = over_the_wire(shipped, request)
        assert (back.blending, back.fallback, back.options.reuse) == (
            request.blending, request.fallback, request.options.reuse,
        )  # fmt: skip
    wants = shipped.validate(["Read.", Segment("Nora lives in Oslo."), "Where?"], SamplingParams(prompt_logprobs=1))
    blends = replace(wants, options=replace(wants.options, reuse=asked.reuse), fallback="prompt_logprobs")
    assert over_the_wire(shipped, blends).fallback == "prompt_logprobs"


def test_what_is_left_of_the_time_goes_along(made: Engine) -> None:
    request = made.validate(ids(5), SamplingParams(), RequestOptions(timeout_s=100))
    assert spec.decode(made.limits, spec.encode(request, 1, timeout_s=2.5)).timeout_s == 2.5


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update(fields)


def sampling(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["sampling"].update(fields)


def reused(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["reuse"].update(fields)


WRONG: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (change(version=2), "version 2"),
    (change(version="1"), "cannot be read"),
    (change(surprise=1), "cannot be read"),
    (change(prompt=b""), "empty"),
    (change(prompt=b"123"), "whole number"),
    (change(prompt=np.array([VOCAB], "<i4").tobytes()), f"token id {VOCAB}"),
    (change(prompt=np.array([-1], "<i4").tobytes()), "token id -1"),
    (change(prompt=np.ones(MAX_LEN, "<i4").tobytes()), f"has {MAX_LEN} tokens"),
    (change(stop_ids=[VOCAB]), "out of range"),
    (change(eos_ids=[-1]), "cannot be read"),
    (change(stop_ids=list(range(65))), "cannot be read"),
    (change(priority=10**7), "priority"),
    (change(tenant=-1), "tenant"),
    (change(timeout_s=float("nan")), "timeout_s"),
    (change(timeout_s=0.0), "timeout_s"),
    (change(spans=[[0, 99, "a"]]), "leaves the"),
    (change(spans=[[0, 0, "a"]]), "out of range"),
    (change(spans=[[0, 1, "no/slash"]]), "not allowed"),
    (change(spans=[[0, 1, "a"]] * 5000), "cannot be read"),
    (sampling(n=1000), "n: 1000"),
    (sampling(n=9), "above the limit"),
    (sampling(temperature=float("inf")), "temperature"),
    (sampling(temperature=None), "cannot be read"),
    (sampling(max_tokens=MAX_LEN), "max_tokens"),
    (sampling(min_tokens=21), "min_tokens"),
    (sampling(seed=1 << 63), "seed"),
    (sampling(logprobs=21), "above the limit"),
    (sampling(logit_bias={VOCAB: 1.0}), "logit_bias"),
    (sampling(logit_bias={3: float("nan")}), "logit_bias"),
    (reused(mode="all"), "cannot be read"),
    (reused(mode="blend"), "not resolved"),
    (reused(mode="blend", method="magic", ratio=0.1), "not one of"),
    (reused(mode="blend", method="query", ratio=2.0), "out of range"),
    (reused(mode="blend", method="query", ratio=0.1, blend_ratio=0.1), "not what is blended"),
    (reused(blend_ratio=0.5), "blends nothing"),
    (reused(fallback="x" * 1000), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_spec_with_one_wrong_field_is_refused(
    made: Engine, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    request = made.validate(ids(30), replace(PARAMS, n=1), reuse=Reuse.PREFIX)
    found = msgspec.msgpack.decode(spec.encode(request, 5))
    damage(found)
    with pytest.raises(InvalidRequestError, match=message):
        spec.decode(made.limits, msgspec.msgpack.encode(found))


def test_damaged_bytes_are_refused_or_still_make_a_request_within_the_limits(made: Engine) -> None:
    whole = spec.encode(made.validate(ids(30), PARAMS), 5)
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        cut = bytes(damaged[: rng.randint(0, len(damaged))]) if rng.random() < 0.3 else bytes(damaged)
        try:
            request = spec.decode(made.limits, cut)
        except InvalidRequestError:
            refused += 1
            continue
        recheck(made.limits, request)
    assert refused > 500


DEADLINE_MS = int((time.monotonic() + 1000) * 1000)


def moving(made: Engine) -> Moving:
    request = over_the_wire(made, made.validate(ids(10), replace(PARAMS, prompt_logprobs=1)))
    known = TokenLogprobs(Logprob(3, "", -0.5, 1), (Logprob(3, "", -0.5, 1),))
    report = ReuseReport(ReuseMode.PREFIX, True, 4, 0, 0, 6)
    outputs = ((7, 8, 9), None)
    return Moving(request, 5, b"of the core", outputs, report, (None, known, *[None] * 8), DEADLINE_MS)


def test_a_parcel_brings_everything_that_the_stream_needs(made: Engine) -> None:
    sent = moving(made)
    first = parcel.unpack(made.limits, parcel.pack(sent))
    assert (first.manifest, first.outputs, first.seed) == (sent.manifest, sent.outputs, 5)
    assert (first.reuse, first.prompt_logprobs, first.num_tokens) == (sent.reuse, sent.prompt_logprobs, 13)
    assert without_text(first.request) == without_text(replace(sent.request, timeout_s=first.request.timeout_s))
    short = parcel.pack(sent, with_request=False)
    assert len(short) < len(parcel.pack(sent)) - 100
    assert parcel.unpack(made.limits, short, first).request is first.request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": [[1]]}, "cannot be read"),
        ({"outputs": [None]}, "outputs of 1 choices"),
        ({"outputs": [None, b"12"]}, "whole number"),
        ({"outputs": [None, bytes(4 * 21)]}, "max_tokens is 20"),
        ({"outputs": [None, np.array([VOCAB], "<i4").tobytes()]}, "out of range"),
        ({"prompt_logprobs": [None]}, "1 prompt log-probabilities"),
        ({"version": 9}, "version 9"),
        ({"spec": None}, "none came before"),
        ({"spec": b"nonsense"}, "cannot be read"),
    ],
)
def test_a_parcel_with_one_wrong_field_is_refused(made: Engine, fields: dict[str, Any], message: str) -> None:
    found = msgspec.msgpack.decode(parcel.pack(moving(made)))
    found.update(fields)
    with pytest.raises(InvalidRequestError, match=message):
        parcel.unpack(made.limits, msgspec.msgpack.encode(found))
