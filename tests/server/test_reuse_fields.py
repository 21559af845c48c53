"""documents, reuse and reuse_options: each spelling is honoured or refused by name."""

import json
from typing import Any

import pytest

from kvlite.config import EngineConfig
from kvlite.errors import InvalidRequestError
from kvlite.reuse_types import Document, Reuse
from kvlite.server.fields import Fields
from kvlite.server.reuse_fields import (
    parse_change,
    parse_new_documents,
    parse_public_document,
    read_documents,
    read_plain_reuse,
    read_reuse,
)

CONFIG = EngineConfig(max_documents=3)


def documents(*entries: object) -> tuple[Document, ...]:
    return read_documents(Fields({"documents": list(entries)}), CONFIG)


def reuse(config: EngineConfig = CONFIG, **fields: Any) -> Reuse | None:
    return read_reuse(Fields(fields), config)[0]


def refused(call: Any, *args: Any, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call(*args, **fields)
    return caught.value


def test_a_document_has_text_or_is_named():
    inline, stored = documents({"id": "lease", "title": "Lease 2024", "text": " x "}, {"id": "doc_9f2c"})
    assert (inline.text, inline.id, inline.title) == (" x ", "lease", "Lease 2024")
    assert (stored.text, stored.id) == (None, "doc_9f2c")
    assert documents({"text": "a"}, {"text": "a"})[1].id is None
    assert documents() == read_documents(Fields({}), CONFIG) == ()


@pytest.mark.parametrize(
    ("entries", "param", "says"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a"}], "documents[1].id", "names two documents"),
        ([{"text": ""}], "documents[0].text", "at least one visible character"),
        ([{"text": " \n\t"}], "documents[0].text", "at least one visible character"),
        ([{"text": 5}], "documents[0].text", "text"),
        ([{"text": "x"}, {}], "documents[1].text", "or left out beside the id"),
        ([{"title": "x"}], "documents[0].text", "or left out beside the id"),
        ([{"id": "a", "title": "x"}], "documents[0].title", "leave the field out"),
        ([{"id": "", "text": "x"}], "documents[0].id", "1 to 64 letters"),
        ([{"id": "a/b", "text": "x"}], "documents[0].id", "1 to 64 letters"),
        ([{"id": "x" * 65}], "documents[0].id", "1 to 64 letters"),
        ([{"id": 5}], "documents[0].id", "text"),
        ([{"text": "x", "title": "t" * 513}], "documents[0].title", "at most 512"),
        ([{"text": "x", "colour": 1}], "documents[0].colour", "allowed are id, title, text"),
        (["x"], "documents[0]", "an object"),
        ([{"text": "x"}] * 4, "documents", "1 to 3 objects"),
    ],
)
def test_a_bad_document_is_refused_by_its_place(entries: list[object], param: str, says: str):
    error = refused(documents, *entries)
    assert error.param == param
    assert says in error.message


def test_reuse_and_its_options_become_one_value():
    assert reuse() is None
    assert reuse(reuse="off") == Reuse.OFF
    assert reuse(reuse="prefix") == Reuse.PREFIX
    assert reuse(reuse="blend") == Reuse.blend()
    options = {"method": "deviation", "recompute_ratio": 0.5, "check_layer": 2, "seed": None}
    assert reuse(reuse="verify", reuse_options=options) == Reuse.verify(0.5, "deviation", check_layer=2)
    assert reuse(reuse="blend", reuse_options={"recompute_ratio": 0}) == Reuse.blend(0.0)


def test_options_without_a_mode_belong_to_the_servers_own():
    blending = EngineConfig(reuse="blend")
    assert reuse(blending) is None
    assert reuse(blending, reuse_options={"recompute_ratio": 1}) == Reuse.blend(1.0)


def test_options_that_change_nothing_are_said_to():
    value, warnings = read_reuse(Fields({"reuse": "prefix", "reuse_options": {"method": "query"}}), CONFIG)
    assert value == Reuse.PREFIX
    assert warnings == ("reuse_options have no effect with reuse=prefix",)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"reuse": "fast"}, "reuse", "one of off, prefix, blend, verify"),
        ({"reuse": True}, "reuse", "one of off, prefix, blend, verify"),
        ({"reuse": "blend", "reuse_options": []}, "reuse_options", "an object"),
        ({"reuse": "blend", "reuse_options": {"method": 5}}, "reuse_options.method", "text"),
        (
            {"reuse": "blend", "reuse_options": {"recompute_ratio": 1.01}}, "reuse_options.recompute_ratio",
            "between 0 and 1",
        ),
        ({"reuse": "prefix", "reuse_options": {"recompute_ratio": -1}}, "reuse_options.recompute_ratio", "0 and 1"),
        ({"reuse": "blend", "reuse_options": {"recompute_ratio": "x"}}, "reuse_options.recompute_ratio", "0 and 1"),
        ({"reuse": "blend", "reuse_options": {"seed": [1]}}, "reuse_options.seed", "a number or text"),
        ({"reuse": "blend", "reuse_options": {"seed": "x" * 65}}, "reuse_options.seed", "at most 64"),
        ({"reuse": "blend", "reuse_options": {f"o{n}": n for n in range(17)}}, "reuse_options", "at most 16"),
    ],
)  # fmt: skip
def test_a_bad_wish_is_refused_by_name(fields: dict[str, Any], param: str, says: str):
    error = refused(reuse, **fields)
    assert error.param == param
    assert says in error.message


def test_a_server_without_cache_computes_everything_and_refuses_to_blend():
    bare = EngineConfig(enable_prefix_caching=False)
    assert reuse(bare) == reuse(bare, reuse="prefix") == Reuse.OFF
    assert "--enable-prefix-caching" in refused(reuse, bare, reuse="blend").message


@pytest.mark.parametrize(
    "fields", [{"documents": [{"text": "x"}]}, {"reuse": "blend"}, {"reuse": "verify"}, {"reuse_options": {"a": 1}}]
)
def test_a_plain_prompt_takes_no_documents_and_the_refusal_says_where_to_go(fields: dict[str, Any]):
    error = refused(read_plain_reuse, Fields(fields), CONFIG)
    assert error.param == next(iter(fields))
    assert "/v1/chat/completions" in error.message


def test_a_plain_prompt_is_exact_whatever_the_server_does_by_itself():
    assert read_plain_reuse(Fields({}), EngineConfig(reuse="blend")) == Reuse.PREFIX
    assert read_plain_reuse(Fields({"reuse": "off", "documents": [], "reuse_options": {}}), CONFIG) == Reuse.OFF
    assert read_plain_reuse(Fields({}), EngineConfig(reuse="off")) == Reuse.OFF


def new(**body: Any) -> Any:
    return parse_new_documents(json.dumps(body).encode(), CONFIG)


def test_one_document_or_several_are_stored_with_the_same_wishes():
    one = new(text="x", id="a", pinned=True, ttl_s=5, public=True)
    assert [document.id for document in one.documents] == ["a"]
    assert (one.listed, one.retention.pinned, one.retention.ttl_s, one.retention.public) == (False, True, 5.0, True)
    two = new(documents=[{"text": "x"}, {"text": "y", "title": "t"}])
    assert two.listed and [document.title for document in two.documents] == [None, "t"]
    assert (two.retention.pinned, two.retention.ttl_s, two.retention.public) == (False, None, False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"id": "a"}, "text"),
        ({"documents": []}, "documents"),
        ({"documents": [{"id": "a"}]}, "documents[0].text"),
        ({"documents": [{"text": "x"}], "text": "y"}, "text"),
        ({"text": "x", "ttl_s": 0}, "ttl_s"),
        ({"text": "x", "ttl_s": 1e300}, "ttl_s"),
        ({"text": "x", "pinned": 1}, "pinned"),
        ({"text": "x", "public": "yes"}, "public"),
        ({"text": "x", "colour": 1}, "colour"),
    ],
)
def test_a_document_that_cannot_be_stored_is_refused_by_name(body: dict[str, Any], param: str):
    assert refused(new, **body).param == param


def test_a_change_names_what_changes_and_null_takes_the_end_away():
    change = parse_change(b'{"pinned": false}')
    assert (change.pinned, change.changes_ttl) == (False, False)
    forever = parse_change(b'{"ttl_s": null}')
    assert (forever.pinned, forever.changes_ttl, forever.ttl_s) == (None, True, None)
    for body, param in ((b"{}", "body"), (b'{"pinned": 5}', "pinned"), (b'{"text": "x"}', "text")):
        assert refused(parse_change, body).param == param


def test_a_line_of_the_operators_file_needs_an_id():
    assert parse_public_document(b'{"id": "a", "text": "x"}') == Document("x", "a")
    for line, param in ((b'{"text": "x"}', "id"), (b'{"id": "a"}', "text"), (b"x", "body"), (b'{"x": 1}', "text")):
        assert refused(parse_public_document, line).param == param
