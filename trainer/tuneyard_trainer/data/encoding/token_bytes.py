"""The tokens of a span of text, from the bytes that tokens stand for.

The offsets of tokens cost a quarter of the time of a tokenization. A byte-level tokenizer needs
none: its tokens, joined, are the bytes of the text. Where they are not, as after a normalization of
the text, the offsets have to be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_SAMPLE = 'A lamp: 12 "ü"\n\n\t  x '
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(_HIDDEN)
}
"""The byte of each character in the tokens of byte-level BPE, as in GPT-2's vocabulary."""


class TokenBytes:
    """The bytes of each token of a byte-level tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._added = {
            token: each.content.encode() for token, each in tokenizer.added_tokens_decoder.items()
        }
        self._bytes: NDArray[np.object_] = np.empty(0, np.object_)
        """The bytes of each token that was seen. b"": they are not known."""
        self._sizes: NDArray[np.int64] = np.empty(0, np.int64)
        """Their number. -1: the token was not seen."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self | None:
        """Return the bytes of a tokenizer's tokens. None: it is not a byte-level tokenizer."""
        found = cls(tokenizer)
        ids = tokenizer(_SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
        return found if b"".join(map(found.bytes_of, ids)) == _SAMPLE.encode() else None

    def masks(
        self,
        texts: Sequence[str],
        rows: Sequence[NDArray[np.int32]],
        spans: Sequence[Sequence[Span]],
    ) -> list[NDArray[np.uint8] | None]:
        """Return for each text (L,) 1 for the tokens that hold any character of its spans.
        `rows`: (L,) token ids.

        None: the tokens are not the bytes of the text, or a span is empty or begins or ends with
        white space, which a tokenizer's offsets may leave out of a token.
        """
        self._note(np.concatenate(rows) if rows else np.empty(0, np.int32))
        return [self._mask(*row) for row in zip(texts, rows, spans, strict=True)]

    def _note(self, ids: NDArray[np.int32]) -> None:
        """Find the bytes of the tokens that were not seen before."""
        missing = int(ids.max(initial=-1)) + 1 - len(self._sizes)
        if missing > 0:
            self._bytes = np.pad(self._bytes, (0, missing), constant_values=b"")
            self._sizes = np.pad(self._sizes, (0, missing), constant_values=-1)
        for token in np.unique(ids[self._sizes[ids] < 0]).tolist():
            self._bytes[token] = self.bytes_of(token)
            self._sizes[token] = len(self._bytes[token])

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token. b"": they are not known."""
        text = self._backend.id_to_token(token) or ""
        found = self._added.get(token, b"")
        if not found and _BYTES.keys() >= set(text):
            found = bytes(map(_BYTES.__getitem__, text))
        return found

    def _mask(
        self, text: str, ids: NDArray[np.int32], spans: Sequence[Span]
    ) -> NDArray[np.uint8] | None:
        content = text.encode()
        if b"".join(self._bytes[ids].tolist()) != content:
            return None
        for start, end in spans:
            if start >= end or text[start].isspace() or text[end - 1].isspace():
                return None
        if len(content) != len(text):
            spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
        ends = self._sizes[ids].cumsum()
        bounds = np.asarray(spans, np.int64).reshape(-1, 2)
        # The token that ends after the first byte, up to the one that holds the last byte.
        firsts = ends.searchsorted(bounds[:, 0], side="right").tolist()
        lasts = ends.searchsorted(bounds[:, 1], side="left").tolist()
        mask = np.zeros(len(ids), dtype=np.uint8)
        for first, last in zip(firsts, lasts, strict=True):
            mask[first : last + 1] = 1
        return mask
