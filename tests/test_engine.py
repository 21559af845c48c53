"""Engine: what comes out equals transformers and plain oracles, ends as asked, and bad input harms nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvlite import (
    Delta,
    Engine,
    FinishReason,
    InvalidRequestError,
    RequestOptions,
    Reuse,
    SamplingParams,
)
from kvlite.output import StopMatcher
from kvlite.request import ValidatedRequest
from tests.engines import SMALL, engine, essence, ids, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DOCUMENTS = ("Nora works as a baker. Nora lives in Oslo.", "Ben lives in Rome. Ben owns a boat.")


@pytest.fixture(scope="module")
def one() -> Any:
    with engine(deterministic=True) as made:
        yield made


@pytest.fixture(scope="module")
def shipped() -> Any:
    with Engine(**SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()


def question(text: str) -> list[dict[str, str]]:
    system = {"role": "system", "content": "Answer the question from the documents."}
    documents = [{"role": "document", "content": document} for document in DOCUMENTS]
    return [system, *documents, {"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Where does Nora live?", " Oslo"), ("Where does Ben live?", " Rome"), ("What does Ben own?", " boat")],
)
def test_the_shipped_model_answers_from_documents(shipped: Engine, text: str, answer: str) -> None:
    output = shipped.chat(question(text))
    assert (output.text, output.outputs[0].finish_reason) == (answer, FinishReason.STOP)
    again = shipped.chat(question(text))
    assert again.text == answer and again.usage.cached_tokens > 0
    whole = shipped.chat(question(text), options=RequestOptions(reuse=Reuse.OFF))
    assert whole.text == answer and whole.usage.cached_tokens == 0, "a cached prefix was there, and not to be taken"


@pytest.mark.parametrize("family", ["llama2", "qwen3", "mistral"])
def test_greedy_ids_equal_those_of_transformers(family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    prompts = [ids(length, length) for length in (1, 17, 60)]
    with engine(family) as made:
        for prompt, output in zip(prompts, made.generate(prompts, GREEDY), strict=True):
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert list(output.token_ids) == expected[0, len(prompt) :].tolist()


def logits_of(oracle: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return oracle(torch.tensor([tokens])).logits[0].float()


def test_logprobs_are_those_of_the_unmodified_distribution(one: Engine, oracle: Any) -> None:
    prompt = ids(20)
    params = replace(GREEDY, temperature=1.7, top_k=5, seed=1, logit_bias={9: 50.0}, logprobs=3, prompt_logprobs=2)
    output = one.generate(prompt, params)
    expected = torch.log_softmax(logits_of(oracle, [*prompt, *output.token_ids]), dim=-1)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    every = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert len(every) == len(prompt) + 12 - 1
    for at, found in enumerate(every):
        row = expected[at]
        token = [*prompt, *output.token_ids][at + 1]
        assert found is not None and found.chosen.token_id == token
        assert found.chosen.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert found.chosen.rank == int((row > row[token]).sum()) + 1
        best = torch.topk(row, len(found.top)).indices.tolist()
        assert [top.token_id for top in found.top] == best
        assert [top.rank for top in found.top] == list(range(1, len(best) + 1))
    assert {len(found.top) for found in every if found} == {2, 3}


def test_penalties_bias_and_min_tokens_follow_a_plain_oracle(one: Engine, oracle: Any) -> None:
    prompt = ids(12, 3)
    favourite = int(logits_of(oracle, prompt)[-1].argmax())
    params = SamplingParams(
        temperature=0, max_tokens=16, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.4,
        logit_bias={33: 2.5, 34: -4.0}, min_tokens=6, stop_token_ids=[favourite], ignore_eos=True,
    )  # fmt: skip
    tokens: list[int] = []
    while len(tokens) < 16 and tokens[-1:] != [favourite]:
        row = logits_of(oracle, prompt + tokens)[-1]
        for token in {*prompt, *tokens}:
            row[token] = row[token] / 1.4 if row[token] > 0 else row[token] * 1.4
        for token in set(tokens):
            row[token] -= 0.7 + 0.4 * tokens.count(token)
        row[33] += 2.5
        row[34] -= 4.0
        if len(tokens) < 6:
            row[favourite] = -torch.inf
        tokens.append(int(row.argmax()))
    output = one.generate(prompt, params)
    assert list(output.token_ids) == tokens
    free = one.generate(prompt, SamplingParams(temperature=0, max_tokens=16, stop_token_ids=[favourite]))
    assert free.token_ids == (favourite,) and free.outputs[0].stop_reason == favourite


def test_a_seed_reproduces_and_no_seed_varies(one: Engine) -> None:
    prompt = ids(9)
    seeded = SamplingParams(temperature=1, seed=5, max_tokens=10, ignore_eos=True)
    assert one.generate(prompt, seeded).token_ids == one.generate(prompt, seeded).token_ids
    free = replace(seeded, seed=None)
    assert one.generate(prompt, free).token_ids != one.generate(prompt, free).token_ids
    assert one.generate(prompt, replace(seeded, top_k=1)).token_ids == one.generate(prompt, GREEDY).token_ids[:10]


def test_a_stop_string_across_token_borders_ends_the_text_before_it(one: Engine) -> None:
    prompt = ids(8)
    long = replace(GREEDY, max_tokens=30, temperature=1, seed=3)
    whole = one.generate(prompt, long)
    text = whole.text
    start = next(at for at in range(5, len(text) - 6) if text.find(text[at : at + 6]) == at)
    stop = text[start : start + 6]
    deltas = list(one.stream(prompt, replace(long, stop=["never", stop])))
    shown = "".join(delta.text for delta in deltas)
    assert shown == text[:start] and deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == stop
    tokens = tuple(id for delta in deltas for id in delta.token_ids)
    assert tokens == whole.token_ids[: len(tokens)] and len(tokens) < 30
    assert len(one.tokenizer.encode(stop)) > 1 or len(tokens) > 1
    usage = deltas[-1].usage
    assert usage is not None and usage.completion_tokens == len(tokens)
    included = one.generate(prompt, replace(long, stop=stop, include_stop_str_in_output=True))
    assert included.text == text[: start + 6]
    late = one.generate(prompt, replace(long, stop=stop, min_tokens=30))
    assert late.text == text and late.outputs[0].finish_reason is FinishReason.LENGTH
    one._core.audit()


def test_after_a_stop_string_the_row_serves_others_correctly(one: Engine) -> None:
    long = replace(GREEDY, max_tokens=25, temperature=1, seed=8)
    prompts = [ids(10, seed) for seed in range(6)]
    whole = [one.generate(prompt, long) for prompt in prompts]
    stopping = [replace(long, stop=output.text[4:7]) if n % 2 else long for n, output in enumerate(whole)]
    for output, full, params in zip(one.generate(prompts, stopping), whole, stopping, strict=True):
        if params.stop_strings:
            assert output.text == full.text[: full.text.index(params.stop_strings[0])]
        else:
            assert essence(output) == essence(full)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["ab", "c", "d"], ("bcx",), "abcd", None),
        (["ab", "cx", "d"], ("bcx",), "a", "bcx"),
        (["a", "a", "a", "b"], ("aab",), "a", "aab"),
        (["xyz"], ("z", "y"), "x", "y"),
        (["ababab", "c"], ("ababc",), "ab", "ababc"),
        (["hello\n", "\nuser"], ("\n\n",), "hello", "\n\n"),
    ],
)
def test_no_part_of_a_stop_string_is_shown(
    pieces: list[str], stops: tuple[str, ...], shown: str, found: str | None
) -> None:
    matcher = StopMatcher(stops, include=False)
    out, hit = "", None
    for piece in pieces:
        if hit is None:
            text, hit = matcher.push(piece)
            out += text
            assert shown.startswith(out) or hit is None
    assert (out + ("" if hit else matcher.flush()), hit) == (shown, found)


def test_eos_ends_and_is_not_shown_but_counted(shipped: Engine) -> None:
    output = shipped.chat(question("Where does Nora live?"), SamplingParams(max_tokens=8, temperature=0))
    assert output.token_ids[-1] == 6 and output.usage.completion_tokens == len(output.token_ids) == 2
    assert output.outputs[0].stop_reason is None
    on = shipped.chat(question("Where does Nora live?"), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert len(on.token_ids) == 8 and on.outputs[0].finish_reason is FinishReason.LENGTH


def test_a_request_past_its_deadline_ends_with_timeout(one: Engine) -> None:
    handle = one.add(ids(100), replace(GREEDY, max_tokens=100), RequestOptions(timeout_s=1e-6))
    deltas = [delta for _ in range(3) for delta in one.step()]
    assert [(delta.handle, delta.finish_reason) for delta in deltas] == [(handle, FinishReason.TIMEOUT)]


def test_deltas_add_up_to_the_whole_and_usage_comes_once_at_the_end(one: Engine) -> None:
    params = replace(GREEDY, n=3, temperature=1, seed=4, logprobs=1)
    whole = one.generate(ids(33), params)
    deltas = list(one.stream(ids(33), params))
    for choice in whole.outputs:
        mine = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in mine) == choice.text
        assert tuple(id for delta in mine for id in delta.token_ids) == choice.token_ids
        assert tuple(found for delta in mine for found in delta.logprobs) == choice.logprobs
        assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
    assert [delta.usage for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 36
    assert deltas[-1].usage.cached_tokens == 32, "one prompt for three choices, cached by the first call"


def test_a_stream_closed_early_frees_everything_and_leaves_others_alone(one: Engine) -> None:
    expected = one.generate(ids(20, 5), GREEDY)
    leaving, staying = one.stream(ids(40, 6), replace(GREEDY, max_tokens=200)), one.stream(ids(20, 5), GREEDY)
    first = [next(staying), next(leaving), next(leaving)]
    leaving.close()  # type: ignore[attr-defined]
    rest = list(staying)
    assert "".join(delta.text for delta in [first[0], *rest]) == expected.text
    assert one.step() == [] and one.num_unfinished == 0
    stats = one.stats()
    assert (stats.num_running, stats.owned_blocks) == (0, 0)
    one._core.audit()


def test_step_gives_what_was_added_even_while_streams_are_read(one: Engine) -> None:
    expected = one.generate(ids(10), GREEDY)
    handle = one.add(ids(10), GREEDY)
    list(one.stream(ids(11), replace(GREEDY, max_tokens=30)))
    deltas = one.step()
    assert {delta.handle for delta in deltas} == {handle}
    assert tuple(id for delta in deltas for id in delta.token_ids) == expected.token_ids


def test_a_list_longer_than_the_queue_is_fed_as_room_appears_and_keeps_its_order() -> None:
    with engine(max_num_waiting=2, max_num_seqs=2) as narrow:
        prompts = [ids(3 + n % 5, n) for n in range(25)]
        outputs = narrow.generate(prompts, replace(GREEDY, max_tokens=3))
        assert [list(output.prompt_token_ids) for output in outputs] == prompts
        assert narrow.generate([], GREEDY) == []


def test_a_run_takes_requests_only_as_the_queue_has_room() -> None:
    with engine(max_num_waiting=3, max_num_seqs=2) as narrow:
        params = replace(GREEDY, max_tokens=2)
        taken, ended, most = 0, 0, 0

        def endless() -> Iterator[ValidatedRequest]:
            nonlocal taken
            while True:
                taken += 1
                yield narrow.validate(ids(4, taken), params)

        with closing(narrow.run(endless())) as outcomes:
            for number, outcome in outcomes:
                assert isinstance(outcome, Delta) and number < taken
                ended += outcome.usage is not None
                most = max(most, taken - ended)
                if ended == 20:
                    break
        assert most <= 3 + 2 + 1, "waiting, running, and the one at hand"
        assert narrow.step() == [] and narrow.num_unfinished == 0


def test_what_the_core_refuses_ends_alone_in_a_run(one: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [one.validate(ids(4, n), replace(GREEDY, max_tokens=2)) for n in range(3)]
    add = one.add_validated

    def refuse_the_second(request: ValidatedRequest) -> int:
        if request is requests[1]:
            raise InvalidRequestError("max_tokens", "needs 9 blocks")
        return add(request)

    monkeypatch.setattr(one, "add_validated", refuse_the_second)
    outcomes = list(one.run(requests))
    assert [(n, str(found)) for n, found in outcomes if isinstance(found, Exception)] == [
        (1, "max_tokens: needs 9 blocks")
    ]
    assert {n for n, found in outcomes if isinstance(found, Delta) and found.usage} == {0, 2}


def test_a_list_outlives_the_time_limit_of_single_requests() -> None:
    with engine(request_timeout_s=0.001, max_num_seqs=1) as hasty:
        prompts = [ids(20, n) for n in range(8)]
        assert {output.outputs[0].finish_reason for output in hasty.generate(prompts, GREEDY)} == {FinishReason.LENGTH}
        late = hasty.generate(prompts, GREEDY, RequestOptions(timeout_s=1e-6))
        assert {output.outputs[0].finish_reason for output in late} == {FinishReason.TIMEOUT}


def test_text_and_ids_and_lists_of_them_are_prompts(one: Engine) -> None:
    text = "Nora lives in"
    tokens = one.tokenizer.encode(text)
    single, listed = one.generate(text, GREEDY), one.generate([text], GREEDY)
    assert essence(single) == essence(listed[0]) == essence(one.generate(tokens, GREEDY))
    assert single.prompt == text and essence(one.generate([tokens], GREEDY)[0]) == essence(single)
    assert essence(one.generate(np.asarray(tokens, np.int32), GREEDY)) == essence(single)  # type: ignore[call-overload]


def test_progress_is_drawn_when_asked(one: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    one.generate([ids(4)] * 3, replace(GREEDY, max_tokens=2), progress=True)
    shown = capsys.readouterr().err
    assert "3/3 requests" in shown and "output tokens/s" in shown and "% of the prompts from the cache" in shown
    one.generate([ids(4)] * 3, replace(GREEDY, max_tokens=2))
    assert capsys.readouterr().err == "", "stderr is no terminal here"
