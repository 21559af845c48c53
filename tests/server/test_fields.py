"""Strict JSON and the field reader: what is refused, and what the refusal says."""

import json

import pytest

from kvlite.errors import InvalidRequestError
from kvlite.server.fields import MAX_DEPTH, Fields, parse_object


def nested(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON at column 2"),
        (b"[1]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', '"a" appears twice'),
        (b'{"x": [{"k": 1, "k": 1}]}', '"k" appears twice'),
        (b'{"a": "\\ud800"}', "lone surrogate U+D800"),
        (b'{"\\udfff": 1}', "lone surrogate U+DFFF"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (nested(200_000), "nested deeper"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    ],
)
def test_what_is_not_strict_json_is_refused_with_a_reason(body: bytes, says: str):
    with pytest.raises(InvalidRequestError) as caught:
        parse_object(body)
    assert caught.value.param == "body"
    assert says in caught.value.message
    assert len(caught.value.message) < 200


def test_a_body_of_the_greatest_depth_and_a_surrogate_pair_are_accepted():
    assert parse_object(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("read", "value", "says"),
    [
        (lambda f: f.text("x"), 5, "must be text"),
        (lambda f: f.text("x", 3), "abcd", "at most 3 characters"),
        (lambda f: f.flag("x", True), 1, "must be true or false"),
        (lambda f: f.integer("x", 0, 9), 10, "an integer between 0 and 9"),
        (lambda f: f.integer("x", 0, 9), True, "an integer between 0 and 9"),
        (lambda f: f.integer("x", 0, 9), 1.5, "an integer between 0 and 9"),
        (lambda f: f.integer("x", 0, 9), 10**300, "an integer between 0 and 9"),
        (lambda f: f.integer("x", 0, 9), 1e999, "an integer between 0 and 9"),
        (lambda f: f.number("x", 0, 2), 1e999, "a number between 0 and 2"),
        (lambda f: f.number("x", 0, 2), "1", "a number between 0 and 2"),
        (lambda f: f.integers("x", 0, 9, 2), [1, 2, 3], "at most 2 integers between 0 and 9"),
        (lambda f: f.integers("x", 0, 9, 2), 1, "at most 2 integers between 0 and 9"),
        (lambda f: f.integers("x", 0, 9, 2), [1, 11], "an integer between 0 and 9"),
        (lambda f: f.texts("x", 2, 4), ["a", "b", "c"], "at most 2 texts of 1 to 4 bytes"),
        (lambda f: f.texts("x", 2, 4), "abcde", "1 to 4 bytes"),
        (lambda f: f.texts("x", 2, 4), "äöü", "1 to 4 bytes"),
        (lambda f: f.texts("x", 2, 4), [""], "1 to 4 bytes"),
        (lambda f: f.texts("x", 2, 4), [7], "1 to 4 bytes"),
        (lambda f: f.choice("x", ("a", "b")), "c", "one of a, b"),
        (lambda f: f.object("x"), [], "an object"),
        (lambda f: f.bias("x", 10, 5), {"10": 1}, "token ids between 0 and 9"),
        (lambda f: f.bias("x", 10, 5), {"-1": 1}, "token ids between 0 and 9"),
        (lambda f: f.bias("x", 10, 5), {"²": 1}, "token ids between 0 and 9"),
        (lambda f: f.bias("x", 10, 5), {"1": 101}, "a number between -100 and 100"),
        (lambda f: list(f.items("x", 2)), [], "1 to 2 objects"),
        (lambda f: list(f.items("x", 2)), [1], "an object"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_the_allowed_range(read, value, says):
    with pytest.raises(InvalidRequestError) as caught:
        read(Fields({"x": value}))
    assert caught.value.param.startswith("x")
    assert says in caught.value.message


def test_null_counts_as_absent_and_an_empty_list_as_nothing():
    fields = Fields({"a": None, "b": [], "c": None})
    assert fields.text("a") is None
    assert fields.texts("b", 1, 1) == ()
    assert fields.flag("c", True) is True


def test_unread_names_what_nobody_asked_for():
    fields = Fields({"known": 1, "new": 2}, "messages[3].")
    fields.raw("known")
    assert fields.unread() == ["messages[3].new"]


def test_a_huge_value_is_described_not_repeated():
    with pytest.raises(InvalidRequestError) as caught:
        Fields({"x": "s" * 1_000_000}).texts("x", 4, 64)
    assert "text of 1000000 characters" in caught.value.message
    assert len(caught.value.message) < 200
