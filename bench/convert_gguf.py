"""A checkpoint in llama.cpp's own format: `python -m bench.convert_gguf SOURCES DIR --outfile F --outtype bf16`.

Runs llama.cpp's converter, out of the sources that `make peers` unpacked, in the environment that has torch. The
converter knows a tokenizer by a hash of what it makes of one text, and refuses any other; one that was trained a moment
ago it cannot know. It is then written down as GPT-2's, which splits text as make-model's tokenizers do; `compare` sends
and receives ids, so no text ever passes through it. SentencePiece, which the converter tries first, is left out: a
directory that kvlite loads has a tokenizer.json. Called by llamacpp.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """`arguments` after the first are the converter's own."""
    sources, *sys.argv[1:] = arguments
    sys.path[:0] = [sources, str(Path(sources) / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def split_of(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    def no_sentencepiece(self: Any, *arguments: Any, **named: Any) -> None:
        raise FileNotFoundError("tokenizer.model")

    TextModel.get_vocab_base_pre = split_of
    TextModel._set_vocab_sentencepiece = no_sentencepiece
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(sys.argv[1:])
