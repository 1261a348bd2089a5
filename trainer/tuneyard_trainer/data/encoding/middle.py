"""Filling in the middle: documents cut in three, whose middle part comes last.

A model that continues such a document has learned to write what lies between a prefix and a suffix
(Bavarian et al. 2022, arXiv:2207.14255). Documents are cut at two random characters, so that the
model also completes the middle of a word (section 4.4). With the markers P, S and M:

    psm:  P prefix S suffix M middle
    spm:  P S suffix M prefix middle     (the paper's second form, which shares keys with psm)

All tokens of a training sequence are targets, as in the paper.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tuneyard.api.sources import FillInTheMiddle
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.tokenization import Encoded
from tuneyard_trainer.data.prepared import GAPS, RowWriter
from tuneyard_trainer.data.texts import text_hash

KNOWN: tuple[tuple[str, str, str], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - the model's own
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
"""The markers of published models: prefix, suffix, middle. Qwen2.5-Coder and CodeGemma; StarCoder,
StableCode and Granite; SantaCoder; DeepSeek-Coder, whose hole stands before the suffix and whose
end stands before the middle; Code Llama."""

RESERVED = 8
"""Tokens left free in each piece of a split or truncated document: three markers, the end of the
document, and two cut words, which may become two tokens each."""

Order = Literal["psm", "spm"]


class Markers(NamedTuple):
    """The tokens before the three parts."""

    prefix: str
    suffix: str
    middle: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, wanted: FillInTheMiddle) -> Markers:
        """Return the manifest's markers, or else the model's own. Raises StageError
        MarkersMissing."""
        if wanted.markers is not None:
            markers = cls(wanted.markers.prefix, wanted.markers.suffix, wanted.markers.middle)
            broken = [m for m in markers if not _is_one_token(tokenizer, m)]
            if broken:
                raise StageError(
                    "MarkersMissing",
                    f"spec.data.fillInTheMiddle.markers: {', '.join(map(repr, broken))} "
                    f"{'is' if len(broken) == 1 else 'are'} no special token of the model.",
                    advice=_advice(tokenizer),
                )
            return markers
        for names in KNOWN:
            if all(_is_one_token(tokenizer, name) for name in names):
                return cls(*names)
        raise StageError(
            "MarkersMissing",
            "spec.data.fillInTheMiddle: the model's tokenizer has no markers for it, such as "
            f"{KNOWN[0][0]} or {KNOWN[1][0]}.",
            advice=_advice(tokenizer),
        )


def _advice(tokenizer: PreTrainedTokenizerBase) -> str:
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    free = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in used
    ]
    named = f": {', '.join(map(repr, free[-6:]))}" if free else ""
    return (
        "Name three special tokens of the model that your data does not use, in "
        f"spec.data.fillInTheMiddle.markers{named}."
    )


def _is_one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text is one token that the tokenizer finds anywhere in a text."""
    return any(text == token.content for token in tokenizer.added_tokens_decoder.values())


@dataclass
class MiddleFiller:
    """Turns documents into sequences whose middle part comes last."""

    tokenizer: PreTrainedTokenizerBase
    settings: FillInTheMiddle
    markers: Markers
    max_length: int
    """The longest sequence, in tokens."""
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    """Sequences by outcome: `changed`; `asItWas`, by chance; `tooLong` with the markers; `unclear`:
    shorter than three characters, or its text contains a marker."""

    def pieces(self, text: str, pieces: Sequence[Encoded]) -> list[Encoded]:
        """Return a document's sequences, of which a share of `rate` is changed.

        The choice and the cuts depend on the text and the seed alone.
        """
        texts = self._texts(text, pieces)
        return [
            self._changed(part, piece, index, is_first=index == 0)
            for index, (part, piece) in enumerate(zip(texts, pieces, strict=True))
        ]

    def details(self) -> dict[str, Any]:
        """Return the markers and the counts, for `data.json` and the stage's record."""
        return {"markers": list(self.markers), "sequences": dict(sorted(self.counts.items()))}

    def gap(self, text: str) -> Encoded | None:
        """Return a held-out document with a gap, whose middle and end are the only targets; the
        start of one that is longer than a sequence. None: it is unclear."""
        start = self._start(text)
        return self._filled(start, self._random(text, 0), targets_all=False)

    def write_gaps(self, texts: Path, folder: Path) -> int:
        """Write the held-out documents of `texts` with a gap each, and return their number."""
        if not texts.exists():
            return 0
        with texts.open(encoding="utf-8") as lines, RowWriter(folder, GAPS) as gaps:
            for line in lines:
                row = json.loads(line)
                gap = self.gap(row["text"]) if "text" in row else None
                if gap is not None:
                    gaps.append(gap.ids, gap.mask, 0)
        return len(gaps)

    def _start(self, text: str) -> str:
        """Return a text that is no longer than a sequence with markers, or else its start: three
        quarters of a sequence, so that markers and cut words have room."""
        starts = self._token_starts(text)
        if len(starts) <= self.max_length - RESERVED:
            return text
        return text[: starts[max(1, self.max_length * 3 // 4)]]

    def _token_starts(self, text: str) -> list[int]:
        encoding = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoding["offset_mapping"]]

    def _texts(self, text: str, pieces: Sequence[Encoded]) -> list[str]:
        """Return the text of each piece. Together they are the whole text, unless it was
        truncated."""
        if len(pieces) == 1 and len(pieces[0].ids) < self.max_length - RESERVED:
            return [text]
        starts = self._token_starts(text)
        position, bounds = 0, [0]
        for piece in pieces:
            position += len(piece.ids)
            bounds.append(starts[position] if position < len(starts) else len(text))
        return [text[start:end] for start, end in pairwise(bounds)]

    def _changed(self, text: str, piece: Encoded, index: int, *, is_first: bool) -> Encoded:
        random = self._random(text, index)
        if random.random() >= self.settings.rate:
            self.counts["asItWas"] += 1
            return piece
        filled = self._filled(text, random, targets_all=True, is_first=is_first)
        self.counts["changed"] += filled is not None
        return piece if filled is None else filled

    def _random(self, text: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, text_hash(text)])

    def _filled(
        self,
        text: str,
        random: np.random.Generator,
        *,
        targets_all: bool,
        is_first: bool = True,
    ) -> Encoded | None:
        """Return the text with its middle last; None: it is too long, or unclear."""
        if len(text) < 3 or any(marker in text for marker in self.markers):
            self.counts["unclear"] += 1
            return None
        low, high = sorted(random.choice(len(text) + 1, size=2, replace=False).tolist())
        order: Order = "psm" if self.settings.mode == "both" else self.settings.mode
        if self.settings.mode == "both" and random.random() < 0.5:
            order = "spm"
        joined = arranged(text[:low], text[low:high], text[high:], self.markers, order)
        encoding = self.tokenizer(
            joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        begin = self._begin if is_first else []
        ids = [*begin, *encoding["input_ids"], self.tokenizer.eos_token_id]
        if len(ids) > self.max_length:
            self.counts["tooLong"] += 1
            return None
        given = 1
        if not targets_all:  # the middle is the last part in both orders
            ends = [end for _, end in encoding["offset_mapping"]]
            given = len(begin) + bisect_right(ends, len(joined) - (high - low))
        mask = np.ones(len(ids), dtype=np.uint8)
        mask[:given] = 0
        return Encoded(np.asarray(ids, dtype=np.int32), mask)

    @cached_property
    def _begin(self) -> list[int]:
        """The tokens before a document: that of its beginning, if the tokenizer has one."""
        found = self.tokenizer("", verbose=False)["input_ids"]
        return [token for token in found if token != self.tokenizer.eos_token_id]


def arranged(prefix: str, middle: str, suffix: str, markers: Markers, order: Order) -> str:
    """Return the three parts of a document with their markers."""
    if order == "psm":
        return f"{markers.prefix}{prefix}{markers.suffix}{suffix}{markers.middle}{middle}"
    return f"{markers.prefix}{markers.suffix}{suffix}{markers.middle}{prefix}{middle}"
