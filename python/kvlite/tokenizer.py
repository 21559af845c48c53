"""`Tokenizer`: text to ids and back, over `tokenizers` and the files of a model directory.

Owns tokenizer.json and tokenizer_config.json. User text never turns into special tokens: only
raw ids and the chat template's own literals do. Thread-safe once made. Called by engine and server; knows no model.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers

from kvlite.chat_template import ChatTemplate, Place, Placed, Rendered
from kvlite.errors import InvalidRequestError, ModelLoadError
from kvlite.model_files import JSON_BYTES_LIMIT, read_json, read_text
from kvlite.reuse_types import Document, EncodedPrompt, Segment, SegmentSpan

Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Special:
    """A special token as the template's text spells it."""

    id: int
    lstrip: bool
    rstrip: bool


class Tokenizer:
    """One model's tokenizer. Raises ModelLoadError when a file is missing, corrupt or of an unknown kind."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        source = read_text(directory / "tokenizer.json", limit=1 << 28)
        if source is None:
            raise ModelLoadError(f"{directory}: there is no tokenizer.json")
        self._source = source
        self._config = read_json(directory / "tokenizer_config.json")
        self._plain = self._load()
        # Special tokens inside text given to this one stay text.
        self._plain.encode_special_tokens = True
        self._bytes: dict[int, bytes] = {}
        self._byte_level = self._find_decoder(directory)
        self._specials = {
            token.content: _Special(id, token.lstrip, token.rstrip)
            for id, token in self._plain.get_added_tokens_decoder().items()
            if token.special
        }
        self._special_ids = frozenset(special.id for special in self._specials.values())
        self.vocab_size: int = self._plain.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        template = read_text(directory / "chat_template.jinja", limit=JSON_BYTES_LIMIT)
        self._templates = _templates(self._config, template)

    def _load(self) -> tokenizers.Tokenizer:
        try:
            loaded = tokenizers.Tokenizer.from_str(self._source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception for a file that it cannot parse; panics are no Exception
            raise ModelLoadError(f"tokenizer.json cannot be read: {error}") from None
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    @cached_property
    def _control(self) -> tokenizers.Tokenizer:
        """Parses special tokens; sees the chat template's output only."""
        return self._load()

    def _find_decoder(self, directory: Path) -> bool:
        decoder: dict[str, Any] = json.loads(self._source).get("decoder") or {}
        parts: list[dict[str, Any]] = [decoder, *decoder.get("decoders", ())]
        kinds = [str(part.get("type")) for part in parts]
        if {"ByteLevel", "ByteFallback", "Metaspace"}.isdisjoint(kinds):
            raise ModelLoadError(f"{directory}: tokenizer.json has decoder {kinds[0]}, which is not supported")
        return "ByteLevel" in kinds

    def _named_id(self, name: str) -> int | None:
        value: Any = self._config.get(name)
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        return self._plain.token_to_id(value) if isinstance(value, str) else None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that are no text."""
        return self._special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of user text. BOS and EOS as the model's files ask, special tokens inside `text` are text.

        Raises InvalidRequestError for text that has no ids (a lone surrogate, a vocabulary without bytes).
        """
        if not add_special_tokens:
            return _encode(self._plain, text)
        if not {"add_bos_token", "add_eos_token"} & self._config.keys():
            return _encode(self._plain, text, add_special_tokens=True)
        ids = _encode(self._plain, text)
        if self._config.get("add_bos_token") and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        if self._config.get("add_eos_token") and self.eos_token_id is not None:
            ids = [*ids, self.eos_token_id]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(id, skip_special_tokens) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes that token `id` adds to the text; empty for an unknown id. O(1) after the first call."""
        if skip_special_tokens and id in self._special_ids:
            return b""
        found = self._bytes.get(id)
        if found is None:
            token = self._plain.id_to_token(id)
            found = self._bytes[id] = b"" if token is None else self._bytes_of(id, token)
        return found

    def _bytes_of(self, id: int, token: str) -> bytes:
        if id in self._special_ids:
            return token.encode()
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:
                return token.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_text(self, id: int) -> str:
        """The token alone as text, specials included; U+FFFD where it is part of a character."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation. `variables` reach the template (tools, documents, enable_thinking, ...).

        Same ids as transformers while no user text holds a special token; those that do stay text. Raises
        InvalidRequestError when there is no template or it refuses the messages.
        """
        rendered = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        if not rendered.protected:
            return _encode(self._control, rendered.text)
        return self._encode_protected(rendered)

    def encode_chat(
        self,
        messages: Sequence[Message],
        documents: Sequence[Document] = (),
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> EncodedPrompt:
        """A conversation over documents that have texts: each is a segment, whose ids depend on nothing but itself.

        Documents go where the template takes them. The text that the template writes before every document belongs to
        the segment. Pieces between segments are tokenised one by one; without documents, as `apply_chat_template`.
        Raises InvalidRequestError.
        """
        if not documents:
            return EncodedPrompt(
                self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)
            )
        template, given = self._template(variables), self._variables(add_generation_prompt, variables)
        specials = tuple(self._specials)
        placement = template.placement(specials, self._variables(True, {}))
        placed = Placed(documents, placement.place)
        rendered = template.render(messages, specials=specials, variables=given, placed=placed)
        missing = set(range(len(documents))) - {number for *_, number in rendered.documents}
        if missing:
            raise InvalidRequestError(f"documents[{min(missing)}]", "the model's chat template leaves it out")
        warning = "the model's chat template has no place for documents: they are part of the first user message"
        warnings = (warning,) if placement.place is Place.MESSAGE else ()
        return self._encode_pieces(rendered, placement.wrapper, documents, warnings)

    def _encode_pieces(
        self, rendered: Rendered, wrapper: str, documents: Sequence[Document], warnings: tuple[str, ...]
    ) -> EncodedPrompt:
        ids, spans, done = list[int](), list[SegmentSpan](), 0
        for start, end, number in rendered.documents:
            front = start - len(wrapper)
            if front < done or not rendered.text.startswith(wrapper, front):
                front = start
            ids += self._encode_protected(rendered.part(done, front))
            piece = self._encode_protected(rendered.part(front, end))
            if piece:
                spans.append(SegmentSpan(len(ids), len(piece), documents[number].id or str(number)))
            ids += piece
            done = end
        ids += self._encode_protected(rendered.part(done, len(rendered.text)))
        return EncodedPrompt(ids, tuple(spans), warnings)

    def document_ids(self, document: Document) -> list[int]:
        """Ids of the segment that `document` is in every conversation; [] when its text has none."""
        if not self._templates:
            return [] if document.text is None else self.encode(document.text, add_special_tokens=False)
        prompt = self.encode_chat([{"role": "user", "content": "a"}], [document])
        return [id for span in prompt.spans[:1] for id in prompt.ids[span.start :][: span.length]]

    def encode_parts(self, parts: Sequence[str | Sequence[int] | Segment]) -> EncodedPrompt:
        """A prompt of parts, each tokenised alone; BOS comes first as for text, unless the first part is ids.

        Raises InvalidRequestError.
        """
        ids, spans = list[int](), list[SegmentSpan]()
        for n, part in enumerate(parts):
            content = part.content if isinstance(part, Segment) else part
            if not isinstance(content, str) and not hasattr(content, "__len__"):
                raise InvalidRequestError("prompt", f"part {n} is neither text, token ids nor a Segment")
            if n == 0 and isinstance(content, str):
                ids += self._opening
            is_text = isinstance(content, str)
            piece = self.encode(content, add_special_tokens=False) if is_text else list[int](content)
            if isinstance(part, Segment) and piece:
                spans.append(SegmentSpan(len(ids), len(piece), part.id or str(len(spans))))
            ids += piece
        return EncodedPrompt(ids, tuple(spans))

    @cached_property
    def _opening(self) -> list[int]:
        """What the model's files put before text: BOS, or nothing."""
        bare, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        size = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        return whole[:size]

    def canonical_prefix(self, text: str | None = None) -> list[int]:
        """Ids that segments are computed behind: of `text`, special tokens included, when it is given.

        Else what tokenizer_config.json says under `canonical_prefix`, else the special token that a conversation begins
        with: the first one that the template's source names. BOS as before text where there is no template, [] without
        one. Nothing is rendered, so that an engine starts without jinja2. Raises InvalidRequestError.
        """
        own = self._config.get("canonical_prefix") if text is None else text
        if isinstance(own, str):
            return _encode(self._control, own)
        template = self._templates.get("default")
        if template is None:
            return self._opening
        for match in re.finditer(rf"\bbos_token\b|{self._special_pattern.pattern}", template.source):
            special = self._specials.get(self._token_text("bos_token") if match[0] == "bos_token" else match[0])
            if special is not None:
                return [special.id]
        return self._opening

    def compile_templates(self) -> None:
        """Does now what the first chat would do, for whoever must not find out then. Raises ModelLoadError."""
        for template in self._templates.values():
            _ = template.compiled

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> Rendered:
        """The conversation as the template writes it, with the spans that must not turn into special tokens."""
        template = self._template(variables)
        given = self._variables(add_generation_prompt, variables)
        return template.render(messages, specials=tuple(self._specials), variables=given)

    def _template(self, variables: Mapping[str, Any]) -> ChatTemplate:
        name = "tool_use" if variables.get("tools") and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise InvalidRequestError("messages", "the model has no chat template: send a plain prompt instead")
        return template

    def _variables(self, add_generation_prompt: bool, variables: Mapping[str, Any]) -> dict[str, Any]:
        tokens = {key: self._token_text(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {**tokens, **variables, "add_generation_prompt": add_generation_prompt}

    def _token_text(self, name: str) -> str:
        value: Any = self._config.get(name)
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        return value if isinstance(value, str) else ""

    def _encode_protected(self, rendered: Rendered) -> list[int]:
        """Special tokens parse where no protected span overlaps; the text between them is encoded as text."""
        text, ids, start = rendered.text, list[int](), 0
        spans = iter(rendered.protected)
        span = next(spans, None)
        for match in self._special_pattern.finditer(text):
            while span is not None and span[1] <= match.start():
                span = next(spans, None)
            if span is not None and span[0] < match.end():
                continue
            special = self._specials[match[0]]
            section = text[start : match.start()]
            ids += self.encode(section.rstrip() if special.lstrip else section, add_special_tokens=False)
            ids.append(special.id)
            start = match.end()
            if special.rstrip:
                start += len(text) - start - len(text[start:].lstrip())
        return ids + self.encode(text[start:], add_special_tokens=False)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._specials), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception as error:  # a bare one for text that the vocabulary cannot spell, TypeError for half a character
        raise InvalidRequestError("prompt", f"cannot be tokenised: {error}") from None


class Detokenizer:
    """Ids in, text out, one choice. Never gives half a character; O(bytes) in all. Owned by one request."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; the bytes of an unfinished character wait inside."""
        return self._decoder.decode(self._tokenizer.token_bytes(id, self._skip))

    def flush(self) -> str:
        """U+FFFD when the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _templates(config: Mapping[str, Any], file_text: str | None) -> dict[str, ChatTemplate]:
    """Templates by name; the file chat_template.jinja goes before the configuration."""
    if file_text is not None:
        return {"default": ChatTemplate(file_text)}
    value: Any = config.get("chat_template")
    if isinstance(value, str):
        return {"default": ChatTemplate(value)}
    if isinstance(value, list):
        return dict(map(_named_template, cast("list[Any]", value)))
    return {}


def _named_template(entry: Any) -> tuple[str, ChatTemplate]:
    """One of several templates in tokenizer_config.json."""
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    name, source = fields.get("name"), fields.get("template")
    if not isinstance(name, str) or not isinstance(source, str):
        raise ModelLoadError(
            "tokenizer_config.json: chat_template is a list, but not of objects with name and template"
        )
    return name, ChatTemplate(source)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in kept)
    return table | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
