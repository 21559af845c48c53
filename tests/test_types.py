"""SamplingParams refuses what can never be served; defaults of the model fill what is None."""

from __future__ import annotations

from typing import Any

import pytest

from kvlite import InvalidRequestError, SamplingParams
from kvlite.types import GenerationDefaults


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("-inf")),
        ("repetition_penalty", 0),
        ("seed", 1 << 63),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("prompt_logprobs", 10_000),
        ("stop", ""),
        ("stop", ["a"] * 65),
        ("stop", "x" * (1 << 20)),
        ("stop", [7]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [1] * 1000),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("n", None),
        ("presence_penalty", None),
        ("temperature", 10**400),
        ("stop", None),
        ("stop", 7),
        ("stop_token_ids", None),
        ("skip_special_tokens", "no"),
    ],
)
def test_a_bad_value_names_its_field(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param
    assert len(str(caught.value)) < 200, "a huge value is not repeated"


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens: 5 is above max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_is_a_tuple_of_one() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_params_cannot_be_changed_through_what_they_were_made_of() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = float("nan")
    assert params.logit_bias == {1: 2.0}


def test_defaults_of_the_model_fill_what_the_request_leaves_open() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1)
    filled = SamplingParams(top_p=0.5, top_k=-1, repetition_penalty=1.0).resolved(defaults)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.6, 0.5, 0, 0.1)
    assert filled.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 7.0),
        ("top_k", 1 << 40),
        ("max_tokens", 0),
        ("eos_token_ids", (-1,)),
        ("eos_token_ids", (True,)),
        ("eos_token_ids", tuple(range(100))),
    ],
)
def test_a_default_that_no_request_could_ask_for_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError):
        GenerationDefaults(**{field: value})
