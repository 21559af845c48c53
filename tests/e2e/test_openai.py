"""The official client against a real server on the shipped model."""

from typing import Any

import openai
import pytest

from kvlite.demo import read_script

MODEL = "kvlite-small"
SENTENCE = " Nora lives in Oslo. Nora keeps a dog."


def test_a_chat_over_documents_is_answered(client: openai.OpenAI, short_messages: Any):
    reply = client.chat.completions.create(model=MODEL, messages=short_messages)
    assert reply.choices[0].message.content.strip() == "Lyon"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 2


def test_the_same_documents_again_come_from_the_cache(client: openai.OpenAI):
    script = read_script()
    reversed_documents = [{"role": "document", "content": text} for text in script.documents[::-1]]

    def ask(question: str) -> Any:
        messages: Any = [*reversed_documents, {"role": "user", "content": question}]
        return client.chat.completions.create(model=MODEL, messages=messages)

    cold, hit = ask("Where does Maria live?"), ask("What does Nolan eat?")
    assert cold.usage.prompt_tokens_details.cached_tokens < 32
    cached = hit.usage.prompt_tokens_details.cached_tokens
    assert cached > 0.9 * hit.usage.prompt_tokens
    assert hit.model_extra["kvlite"] == {
        "reuse": "prefix", "exact": True, "prefix_tokens": cached, "blended_tokens": 0, "recomputed_tokens": 0,
        "computed_tokens": hit.usage.prompt_tokens - cached,
    }  # fmt: skip


def test_a_stream_adds_up_to_the_answer_and_ends_with_the_usage(client: openai.OpenAI, short_messages: Any):
    whole = client.chat.completions.create(model=MODEL, messages=short_messages)
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=short_messages, stream=True, stream_options=options)
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_two_choices_have_two_indexes_and_greedy_ones_agree(client: openai.OpenAI, short_messages: Any):
    reply = client.chat.completions.create(model=MODEL, messages=short_messages, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert len({choice.message.content for choice in reply.choices}) == 1
    assert reply.usage.completion_tokens == 4


def test_a_seed_repeats_a_sampled_answer(client: openai.OpenAI):
    def sample(seed: int) -> str:
        reply = client.completions.create(
            model=MODEL, prompt=SENTENCE, max_tokens=12, temperature=1.5, seed=seed, extra_body={"ignore_eos": True}
        )
        return reply.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_chat_logprobs_name_every_token(client: openai.OpenAI, short_messages: Any):
    reply = client.chat.completions.create(model=MODEL, messages=short_messages, logprobs=True, top_logprobs=3)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    assert entries[0].token == reply.choices[0].message.content
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert entries[0].logprob == max(top.logprob for top in entries[0].top_logprobs) <= 0
    assert len(entries[0].top_logprobs) == 3


def test_completions_take_text_lists_and_ids(client: openai.OpenAI):
    def texts(prompt: Any) -> list[str]:
        reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    ids = [
        choice["prompt_token_ids"]
        for choice in client.completions.create(
            model=MODEL, prompt=[SENTENCE, " Rain fell"], max_tokens=1, extra_body={"return_token_ids": True}
        ).model_dump()["choices"]
    ]
    first, second = texts(SENTENCE)[0], texts(" Rain fell")[0]
    assert texts([SENTENCE, " Rain fell"]) == [first, second]
    assert texts([" Rain fell", SENTENCE]) == [second, first]
    assert texts(ids[0]) == [first]
    assert texts(ids) == [first, second]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI):
    def complete(**more: Any) -> Any:
        reply = client.completions.create(
            model=MODEL,
            prompt=SENTENCE,
            max_tokens=24,
            temperature=1.5,
            seed=1,
            extra_body={"ignore_eos": True},
            **more,
        )
        return reply.choices[0]

    free = complete().text
    stop = free.split()[2]
    stopped = complete(stop=[stop])
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"
    assert complete().finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(client: openai.OpenAI, stream: bool):
    reply: Any = client.completions.create(
        model=MODEL, prompt=SENTENCE, max_tokens=2, echo=True, logprobs=1, stream=stream
    )
    choices = [part.choices[0] for part in reply] if stream else reply.choices
    text = "".join(choice.text for choice in choices)
    assert text.startswith(SENTENCE)
    logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
    tokens = [value for choice in choices for value in choice.logprobs.tokens]
    assert logprobs[0] is None
    assert all(value <= 0 for value in logprobs[1:])
    assert "".join(tokens).startswith(SENTENCE)
    assert len(tokens) == len(logprobs)


def test_logit_bias_and_max_tokens_are_honoured(client: openai.OpenAI):
    reply = client.completions.create(
        model=MODEL, prompt=SENTENCE, max_tokens=3, logit_bias={"300": 100}, extra_body={"return_token_ids": True}
    )
    assert reply.model_dump()["choices"][0]["token_ids"] == [300, 300, 300]
    assert reply.choices[0].finish_reason == "length"


def test_special_tokens_in_user_text_stay_text(client: openai.OpenAI):
    def num_tokens(text: str) -> int:
        reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=1)
        return reply.usage.prompt_tokens

    assert num_tokens("<|end|>") > num_tokens("x") + 2


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_unknown_field_is_answered_with_a_warning(client: openai.OpenAI, short_messages: Any):
    reply = client.chat.completions.create(model=MODEL, messages=short_messages, extra_body={"colour": "red"})
    assert reply.model_extra["warnings"] == ['unknown field "colour" was ignored']
