"""Bodies of the two endpoints: every field is honoured, refused, or reported as unknown."""

import json
from typing import Any

import pytest

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.request import RequestLimits
from kvlite.reuse_types import Reuse
from kvlite.server.protocol import (
    LATER,
    ChatRequest,
    CompletionRequest,
    Limits,
    UnknownModelError,
    parse_chat,
    parse_completion,
)
from kvlite.types import GenerationDefaults

USER = [{"role": "user", "content": "Hello"}]


def limits(**settings: Any) -> Limits:
    config = EngineConfig(**settings)
    return Limits("m", RequestLimits(config, 100, 64, 1 << 20, GenerationDefaults()))


def chat(strict: bool = False, **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": USER} | fields).encode(), limits(strict_fields=strict))


def complete(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"prompt": "Hello"} | fields).encode(), limits())


def refusal(call: Any, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call(**fields)
    return caught.value


def test_sampling_fields_reach_the_params():
    given = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.1, "seed": 7, "min_tokens": 1, "max_tokens": 9,
        "ignore_eos": True, "prompt_logprobs": 2, "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    params = chat(**given, stop=["a", "b"], stop_token_ids=[3], logit_bias={"4": -100}).options.params
    for name, value in given.items():
        assert getattr(params, name) == value, name
    assert params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {4: -100.0}


def test_max_completion_tokens_wins_over_max_tokens():
    assert chat(max_tokens=5, max_completion_tokens=9).options.params.max_tokens == 9


@pytest.mark.parametrize("wanted", [None, 0, 5])
def test_chat_logprobs_are_a_flag_and_a_number(wanted: int | None):
    fields = {"logprobs": True} | ({} if wanted is None else {"top_logprobs": wanted})
    assert chat(**fields).options.params.logprobs == (wanted or 0)
    assert chat().options.params.logprobs is None


def test_echo_with_logprobs_asks_for_those_of_the_prompt_but_does_not_show_them_twice():
    options = complete(echo=True, logprobs=3).options
    assert options.params.prompt_logprobs == 3
    assert not options.show_prompt_logprobs
    assert complete(prompt_logprobs=1).options.show_prompt_logprobs


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", ("a b",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_has_four_spellings(prompt: object, prompts: tuple[object, ...]):
    assert complete(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", 1], [1, "a"], [[1], "a"], ["a", [1]], [True], [100], [-1], [1.5], 5, {}, None]
)
def test_a_prompt_that_is_none_of_them_is_refused(prompt: object):
    assert refusal(complete, prompt=prompt).param.startswith("prompt")


def test_more_ids_than_the_model_takes_are_refused_before_each_is_looked_at():
    assert "max_model_len is 64" in refusal(complete, prompt=[1] * 65).message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": "two"}, "n"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 65}, "max_completion_tokens"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [100]}, "stop_token_ids[0]"),
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"priority": 1e9}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"reuse": "other"}, "reuse"),
        ({"documents": {}}, "documents"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"note": "<|end|>"}}, "chat_template_kwargs.note"),
        ({"chat_template_kwargs": {"note": [1]}}, "chat_template_kwargs.note"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*USER, {"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[1].tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "more": 1}]}, "messages[0].more"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ],
)
def test_a_known_field_with_a_bad_value_is_refused_by_name(fields: dict[str, Any], param: str):
    assert refusal(chat, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "between 1 and 8"),
        ({"n": 9}, "between 1 and 8"),
        ({"prompt_logprobs": -1}, "between 0 and 20"),
        ({"max_tokens": 0}, "between 1 and 63"),
        ({"max_completion_tokens": 64}, "between 1 and 63"),
        ({"min_tokens": 64}, "between 0 and 63"),
    ],
)
def test_a_refusal_names_the_range_of_this_server(fields: dict[str, Any], said: str):
    assert said in refusal(chat, **fields).message


@pytest.mark.parametrize("name", sorted(LATER))
def test_a_field_of_a_later_version_is_refused_unless_it_asks_for_nothing(name: str):
    error = refusal(complete, **{name: {"any": "thing"}})
    assert error.param == name
    assert "not supported yet" in error.message
    for neutral in (*LATER[name], None):
        assert complete(**{name: neutral}).options.warnings == ()


def test_an_unknown_field_is_reported_or_under_strict_fields_refused():
    assert chat(colour=1).options.warnings == ('unknown field "colour" was ignored',)
    assert chat().options.warnings == ()
    assert refusal(chat, strict=True, colour=1).param == "colour"


def test_another_model_is_unknown_and_no_model_is_the_served_one():
    with pytest.raises(UnknownModelError, match='"other" does not exist; this server has "m"'):
        chat(model="other")
    assert chat(model="m").options == chat().options


def test_developer_is_system_and_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "document", "content": parts}]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "s"},
        {"role": "document", "content": "a\nb"},
    )


def test_what_reuse_and_documents_ask_reaches_the_request_with_the_tenant():
    body = {"messages": USER, "reuse": "blend", "reuse_options": {"recompute_ratio": 0.2}, "documents": [{"id": "a"}]}
    request = parse_chat(json.dumps(body).encode(), limits(), tenant=7)
    assert request.options.request.reuse == Reuse.blend(0.2)
    assert request.options.request.tenant == 7
    assert [document.id for document in request.documents] == ["a"]
    assert complete(reuse="off").options.request.reuse == Reuse.OFF
    assert parse_completion(b'{"prompt": "a"}', limits(), tenant=3).options.request.tenant == 3


def test_template_switches_are_kept():
    request = chat(add_generation_prompt=False, chat_template_kwargs={"enable_thinking": False, "mode": "brief"})
    assert request.add_generation_prompt is False
    assert request.template_variables == {"enable_thinking": False, "mode": "brief"}
