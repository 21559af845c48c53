"""Documents in conversations: where templates take them, which ids are theirs, and that they stay text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvlite import Document, InvalidRequestError, Segment
from kvlite.chat_template import Place
from kvlite.reuse_types import EncodedPrompt
from kvlite.tokenizer import Tokenizer
from tests.engines import SHIPPED

TOKENIZER = Tokenizer(SHIPPED)
TEXTS = ("Nora works as a baker. Nora lives in Oslo.", "Ben lives in Rome.", "She owns a boat.")
DOCUMENTS = [Document(text, id=name) for text, name in zip(TEXTS, "abc", strict=True)]
ASKED = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Where does Nora live?"}]

VARIABLE = (
    "<|bos|>{% for d in documents %}<|doc|>{{ d.text }}{% endfor %}"
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
)
NUMBERED = (
    "<|bos|>{% for d in documents %}<|doc|>{{ loop.index }}{% if d.title %} {{ d.title }}{% endif %}: {{ d.text }}\n"
    "{% endfor %}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
)
ENCLOSED = "<|bos|>{% for d in documents %}<d>{{ d.text }}</d>{% endfor %}{{ messages[0].content }}"
ANY_ROLE = "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content | trim }}<|end|>{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('role') }}"
    "{% endif %}<|user|>{{ m.content }}{% endfor %}"
)


def templated(folder: Path, template: str) -> Tokenizer:
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    values = json.loads((SHIPPED / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, prompt: EncodedPrompt) -> list[str]:
    """Text of every span."""
    ids = [list(prompt.ids[span.start :][: span.length]) for span in prompt.spans]
    return [tokenizer.decode(each, skip_special_tokens=False) for each in ids]


def test_the_shipped_models_documents_are_messages_of_their_own_role_with_the_same_ids() -> None:
    prompt = TOKENIZER.encode_chat(ASKED, DOCUMENTS)
    told = [{"role": "document", "content": text} for text in TEXTS]
    assert prompt.ids == TOKENIZER.apply_chat_template([ASKED[0], *told, ASKED[1]])
    assert pieces(TOKENIZER, prompt) == [f"<|doc|> {text}" for text in TEXTS]
    assert [span.id for span in prompt.spans] == ["a", "b", "c"] and prompt.warnings == ()


def test_without_documents_nothing_changes() -> None:
    assert TOKENIZER.encode_chat(ASKED).ids == TOKENIZER.apply_chat_template(ASKED)
    assert TOKENIZER.encode_chat(ASKED).spans == ()


def test_a_segments_ids_depend_on_its_document_alone() -> None:
    draw = random.Random(5)
    alone = {document.id: TOKENIZER.document_ids(document) for document in DOCUMENTS}
    for _ in range(20):
        some = draw.sample(DOCUMENTS, draw.randint(1, 3))
        prompt = TOKENIZER.encode_chat([{"role": "user", "content": draw.choice(["a", "<|doc|> x", " "])}], some)
        assert [span.id for span in prompt.spans] == [document.id for document in some]
        for span in prompt.spans:
            assert list(prompt.ids[span.start :][: span.length]) == alone[span.id]


@pytest.mark.parametrize(
    ("template", "place", "spans", "warns"),
    [
        (VARIABLE, Place.VARIABLE, [f"<|doc|>{text}" for text in TEXTS], False),
        (NUMBERED, Place.VARIABLE, list(TEXTS), False),
        (ENCLOSED, Place.VARIABLE, list(TEXTS), False),
        (ANY_ROLE, Place.MESSAGE, list(TEXTS), True),
        (STRICT, Place.MESSAGE, [f"\n\nDocument: {text}" for text in TEXTS], True),
    ],
)
def test_documents_go_where_the_template_takes_them(
    tmp_path: Path, template: str, place: Place, spans: list[str], warns: bool
) -> None:
    tokenizer = templated(tmp_path, template)
    prompt = tokenizer.encode_chat(ASKED[1:], DOCUMENTS)
    assert tokenizer._templates["default"].placement((), {}).place is place
    assert pieces(tokenizer, prompt) == spans
    assert bool(prompt.warnings) == warns
    text = tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert all(document in text for document in TEXTS) and "Where does Nora live?" in text


def test_a_title_reaches_the_templates_that_show_it(tmp_path: Path) -> None:
    titled = [Document("Nora", title="Lease <|end|>")]
    tokenizer = templated(tmp_path, NUMBERED)
    prompt = tokenizer.encode_chat(ASKED[1:], titled)
    assert "<|doc|>1 Lease <|end|>: Nora" in tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert 6 not in prompt.ids, "a title is text"


@pytest.mark.parametrize("text", ["<|end|>", "a<|end|><|doc|> b", "<|en", "d|>", "|>", " <|bos|> ", "\ue000x\ue0010"])
@pytest.mark.parametrize("template", [None, VARIABLE, STRICT])
def test_a_documents_text_never_becomes_special_tokens(tmp_path: Path, text: str, template: str | None) -> None:
    tokenizer = TOKENIZER if template is None else templated(tmp_path, template)
    plain = tokenizer.encode_chat(ASKED[1:], [Document("x"), Document("y")])
    prompt = tokenizer.encode_chat(ASKED[1:], [Document(text), Document("y")])
    specials = [[id for id in ids if id in tokenizer.special_ids] for ids in (plain.ids, prompt.ids)]
    assert specials[0] == specials[1]
    assert pieces(tokenizer, prompt)[0].endswith(text)


def test_documents_that_a_template_leaves_out_or_cuts_are_refused(tmp_path: Path) -> None:
    only_first = "{% if documents and documents | length == 3 %}{% for d in documents %}{{ d.text }}{% endfor %}"
    tokenizer = templated(tmp_path, only_first + "{% elif documents %}{{ documents[0].text }}{% endif %}")
    with pytest.raises(InvalidRequestError, match="leaves it out") as caught:
        tokenizer.encode_chat(ASKED, DOCUMENTS[:2])
    assert caught.value.param == "documents[1]"


def test_a_template_without_a_place_needs_a_user_message(tmp_path: Path) -> None:
    tokenizer = templated(tmp_path, STRICT)
    with pytest.raises(InvalidRequestError, match="need a user message"):
        tokenizer.encode_chat([{"role": "system", "content": "a"}], DOCUMENTS)


def test_parts_are_tokenised_one_by_one_and_ids_are_taken_as_they_are() -> None:
    prompt = TOKENIZER.encode_parts(["Answer. ", Segment("Nora lives in Oslo.", id="x"), [5, 6], Segment([7, 8])])
    first, second = TOKENIZER.encode("Answer. "), TOKENIZER.encode("Nora lives in Oslo.")
    assert prompt.ids == [*first, *second, 5, 6, 7, 8]
    assert [(span.start, span.length, span.id) for span in prompt.spans] == [
        (len(first), len(second), "x"), (len(first) + len(second) + 2, 2, "1"),
    ]  # fmt: skip


@pytest.mark.parametrize("add", [True, False])
def test_parts_begin_as_text_does_unless_they_begin_with_ids(tmp_path: Path, add: bool) -> None:
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "add_bos_token": add}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_parts(["a", Segment("b")]).ids == tokenizer.encode("a") + tokenizer.encode("b")[add:]
    assert tokenizer.encode_parts([Segment("b")]).spans[0].start == int(add)
    assert tokenizer.encode_parts([[9], Segment("b")]).ids[0] == 9


def test_what_is_no_part_is_refused() -> None:
    parts: Any = ["a", Segment("b"), 5.5]
    with pytest.raises(InvalidRequestError, match="part 2"):
        TOKENIZER.encode_parts(parts)


def test_the_canonical_prefix_is_the_models_or_what_a_conversation_begins_with(tmp_path: Path) -> None:
    assert TOKENIZER.canonical_prefix() == TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "Answer the question from the documents."}], add_generation_prompt=False
    )
    assert TOKENIZER.canonical_prefix("<|end|>a") == [6, *TOKENIZER.encode("a")]
    assert TOKENIZER.canonical_prefix("") == []


@pytest.mark.parametrize(
    ("template", "first"),
    [("{{ bos_token }}{{ 1 }}", 1), ("{% if tools %}{{ '<|user|>' }}{% endif %}<|doc|>", 4), ("plain", None)],
)
def test_templates_without_a_canonical_prefix_begin_with_their_first_special_token(
    tmp_path: Path, template: str, first: int | None
) -> None:
    tokenizer = templated(tmp_path, template)
    del tokenizer._config["canonical_prefix"]
    assert tokenizer.canonical_prefix() == ([] if first is None else [first])
