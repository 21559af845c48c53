"""What may stand where a prompt is asked for: text, ids, parts with segments, a conversation over documents.

Owns these types, how one prompt is told from a list of them, and how a conversation becomes a request. Called by
engine.py and by the fleet's front-end, which makes prompts without an engine of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kvlite.documents import DocumentStore, resolve
from kvlite.errors import InvalidRequestError
from kvlite.request import RequestLimits, ValidatedRequest, validate
from kvlite.reuse_types import Document, EncodedPrompt, Segment
from kvlite.tokenizer import Message, Tokenizer
from kvlite.types import RequestOptions, SamplingParams

Part = str | Sequence[int] | Segment
Prompt = str | Sequence[int] | Sequence[Part] | EncodedPrompt
"""Text, ids, or parts of which at least one is a Segment."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that can be served."""

    request: ValidatedRequest
    warnings: tuple[str, ...] = ()
    """What the caller should know of how the prompt was made."""


@dataclass(frozen=True)
class ChatPrompts:
    """Makes conversations over documents into requests."""

    limits: RequestLimits
    tokenizer: Tokenizer
    store: DocumentStore

    def prepare(
        self,
        messages: Sequence[Message],
        documents: Sequence[Document | str],
        params: SamplingParams | None,
        options: RequestOptions | None,
        variables: Mapping[str, Any],
    ) -> ChatPrompt:
        """The same ids under every reuse mode; `variables` reach the chat template. Safe in any thread.

        Raises InvalidRequestError, which names documents by their index, and UnknownDocumentError.
        """
        options = options or RequestOptions()
        found = resolve(self.store, documents, options.tenant, self.limits.config.max_documents)
        prompt = self.tokenizer.encode_chat(messages, found, **variables)
        index_of = {document.id or str(n): n for n, document in enumerate(found)}
        for span in prompt.spans:
            if span.length >= self.limits.max_model_len:
                raise InvalidRequestError(
                    f"documents[{index_of[span.id]}].text",
                    f"has {span.length} tokens, at most {self.limits.max_model_len - 1} fit the model",
                )
        return ChatPrompt(validate(self.limits, prompt, params or SamplingParams(), options), prompt.warnings)


def is_parts(prompt: object) -> bool:
    """Whether a list is one prompt of parts: one of them is a Segment."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    parts = cast("Sequence[object]", prompt)
    return not isinstance(parts[0], int) and any(isinstance(part, Segment) for part in parts)


def is_single(prompts: Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, not a list of them."""
    if isinstance(prompts, EncodedPrompt) or is_parts(prompts):
        return True
    is_list = not isinstance(prompts, str) and isinstance(prompts, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
    return not is_list or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence | EncodedPrompt))


def of_prompt(number: int, error: InvalidRequestError) -> InvalidRequestError:
    """The same error, naming which prompt of a list it is about."""
    return InvalidRequestError(f"prompts[{number}]", error.message if error.param == "prompt" else str(error))
