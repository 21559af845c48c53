"""The store of documents: per tenant and public, bounded, forgetting in time; and its segments in step."""

from __future__ import annotations

from typing import Any

import pytest

from kvlite import CapacityError
from kvlite.documents import BYTES_LIMIT, PUBLIC_TENANT, DocumentStore, StoredDocument, new_id


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def document(id: str = "a", text: str = "Nora", tenant: int = 0, **more: Any) -> StoredDocument:
    return StoredDocument(id, text, None, tenant, text.encode("utf-32-le"), **({"created": 1000.0} | more))


def test_a_tenant_sees_its_own_and_public_documents_and_nobody_elses() -> None:
    store = DocumentStore(8)
    for one in (document("a"), document("b", tenant=1), document("c", tenant=PUBLIC_TENANT)):
        store.put(one)
    assert [one.id for one in store.list(0)] == ["a", "c"]
    assert [one.id for one in store.list(1)] == ["b", "c"]
    assert store.get(0, "b") is None and store.get(1, "b") is not None and store.get(5, "c") is not None
    assert store.delete(0, "b") is None and store.delete(0, "c") is None, "not its own"
    assert store.delete(1, "b") is not None and store.delete(PUBLIC_TENANT, "c") is not None
    assert len(store) == 1


def test_an_own_document_goes_before_a_public_one_of_the_same_id() -> None:
    store = DocumentStore(8)
    store.put(document("a", "public", PUBLIC_TENANT))
    store.put(document("a", "mine", 3))
    mine, public = store.get(3, "a"), store.get(4, "a")
    assert mine is not None and public is not None and (mine.text, public.text) == ("mine", "public")


def test_documents_end_with_their_time() -> None:
    clock = Clock()
    store = DocumentStore(8, clock)
    store.put(document("short", expires=1005.0))
    store.put(document("long", expires=2000.0, created=1001.0))
    store.put(document("ever", created=1002.0))
    clock.now = 1005.0
    assert store.get(0, "short") is None and [one.id for one in store.list(0)] == ["long", "ever"]
    assert [one.id for one in store.expire()] == ["short"] and store.expire() == []
    clock.now = 5000.0
    assert store.delete(0, "long") is None, "it was over before"
    assert [one.id for one in store.list(0)] == ["ever"] and len(store) == 1


def test_a_full_store_refuses_new_documents_and_takes_replacements() -> None:
    store = DocumentStore(4)
    for one in (document("a"), document("b"), document("a", tenant=1)):
        store.put(one)
    with pytest.raises(CapacityError, match="2 documents are kept for one tenant"):
        store.put(document("c"))
    store.put(document("p", tenant=PUBLIC_TENANT))
    for full in (document("b", tenant=1), document("q", tenant=PUBLIC_TENANT)):
        with pytest.raises(CapacityError, match="4 documents are kept for all tenants"):
            store.put(full)
    replaced = store.put(document("a", "new"))
    assert replaced is not None and replaced.text == "Nora"
    store.delete(0, "b")
    store.put(document("c"))
    assert [one.id for one in store.list(0)] == ["a", "p", "c"]


def test_texts_are_bounded_for_one_tenant_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlite.documents.BYTES_LIMIT", 1200)
    store = DocumentStore(100)
    store.put(document("a", "x" * 60))
    with pytest.raises(CapacityError, match="600 bytes of documents are kept for one tenant"):
        store.put(document("b", "y" * 60))
    store.put(document("a", "z" * 70))
    store.put(document("b", "y" * 70, tenant=1))
    with pytest.raises(CapacityError, match="1200 bytes of documents are kept for all tenants"):
        store.put(document("c", "y" * 30, tenant=2))
    store.delete(0, "a")
    store.put(document("c", "y" * 30, tenant=2))
    assert len(store) == 2 and set(store._held) == {1, 2}
    assert BYTES_LIMIT > 1 << 20


def test_a_store_of_none_refuses_every_document() -> None:
    with pytest.raises(CapacityError, match="0 documents"):
        DocumentStore(0).put(document())


def test_a_segment_is_shared_by_documents_of_one_tenant_alone() -> None:
    store = DocumentStore(8)
    one = document("a", pinned=True)
    store.put(one)
    assert not store.is_shared(one)
    store.put(document("b", tenant=1))
    assert not store.is_shared(one), "another tenant's segment is another segment"
    twin = document("c")
    store.put(twin)
    assert store.is_shared(one) and not store.is_pinned(one) and store.is_pinned(twin)


def test_ids_made_by_the_store_differ_and_fit_in_a_url() -> None:
    made = {new_id() for _ in range(100)}
    assert len(made) == 100 and all(id.startswith("doc_") and id[4:].isalnum() and len(id) == 20 for id in made)
