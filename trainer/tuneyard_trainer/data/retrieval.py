"""Contexts of retrieved passages before the questions of rows (RAFT, Zhang et al. 2024,
arXiv:2403.10131).

A context has the passage that answers the question and distractors, or distractors only. Passages
are ranked by BM25.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from tuneyard.api.stage_settings import RetrievalSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.documents import Documents, words
from tuneyard_trainer.data.encoding.tokenization import Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN


def with_context(question: str, passages: Sequence[str]) -> str:
    """Return a question after its numbered passages, in the form that models are trained on."""
    numbered = (f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
    return "\n\n".join((*numbered, f"Question: {question}"))


def with_citation(answer: str, number: int) -> str:
    """Return an answer followed by the number of the passage that it is from."""
    return f"{answer.rstrip()} [{number}]"


class PassageIndex:
    """Ranks the passages of a collection by BM25 in Lucene's form, with k1 = 1.5 and b = 0.75.

    Passages with equal scores keep their order, so that a ranking does not depend on the machine.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        self._size = len(passages)
        self._index = bm25s.BM25()
        self._index.index([words(passage) for passage in passages], show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return (N,) the score of each passage. 0: it shares no word with the query."""
        found = words(query)
        if not found:
            return np.zeros(self._size, dtype=np.float32)
        scores: NDArray[np.float32] = self._index.get_scores(found)
        return scores


def best(scores: NDArray[np.float32], count: int) -> list[int]:
    """Return the indices of the `count` highest scores, best first; of equal ones the first."""
    count = min(count, len(scores))
    if not count:
        return []
    least = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= least)
    order = np.argsort(-scores[candidates], kind="stable")[:count]
    return [int(index) for index in candidates[order]]


@dataclass(frozen=True)
class _Context:
    """The passages of one row."""

    bare: Example
    """The row without a context."""
    ranked: tuple[int, ...]
    """Passages: the right one first, if the context has it; then distractors, the best first."""
    positions: tuple[float, ...]
    """A random number for each passage. Their order is that of the passages in the context."""
    has_right: bool

    def example(self, count: int, passages: Sequence[str], *, cite: bool) -> Example:
        """Return the row with the first `count` of its passages."""
        shown = sorted(range(count), key=lambda index: self.positions[index])
        *before, question, answer = self.bare.messages
        asked = with_context(question.content, [passages[self.ranked[index]] for index in shown])
        answered = answer.content
        if cite and self.has_right:
            answered = with_citation(answered, shown.index(0) + 1)
        turns = (replace(question, content=asked), replace(answer, content=answered))
        is_plain = self.bare.kind == "completion"
        return replace(
            self.bare,
            messages=(*before, *turns),
            prompt=asked if is_plain else "",
            completion=answered if is_plain else "",
            without_context=self.bare,
        )


@dataclass
class Contexts:
    """Puts a context before the question of each row."""

    documents: Documents
    settings: RetrievalSettings
    encoder: Encoder
    """An encoder of its own, which measures the rows."""
    max_length: int
    """Longest row, in tokens. Distractors are left out of a longer one, the worst first."""
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by what happened to them, and distractors that were left out."""

    def __post_init__(self) -> None:
        self._index = PassageIndex(self.documents.passages)
        self._ids = list(self.documents.spans)

    @classmethod
    def read(
        cls,
        path: Path,
        settings: RetrievalSettings,
        encoder: Encoder,
        max_length: int,
        seed: int,
        name: str,
    ) -> Contexts:
        """Read and index the documents. `name`: their field in the manifest.

        Raises StageError as `Documents.read` does, and InvalidData for a single document, which
        leaves no distractors.
        """
        documents = Documents.read(path, settings.fields, settings.passage_words, name)
        needs_others = settings.passages > 1 or settings.gold_share < 1
        if needs_others and len(documents.spans) < 2:
            raise StageError(
                "InvalidData",
                f"{name} holds one document, and distractors come from other documents.",
                advice="Divide the document into several files or rows, one for each subject.",
            )
        own = replace(encoder, left_out=Counter())
        return cls(documents, settings, own, max_length, seed)

    def add(self, examples: Sequence[Example]) -> list[Example | RowError]:
        """Return each row with its context, or why it cannot have one.

        Raises StageError as `Encoder.encode` does.
        """
        results: dict[int, Example | RowError] = {}
        contexts: dict[int, _Context] = {}
        for index, example in enumerate(examples):
            try:
                contexts[index] = self._context(example)
            except RowError as error:
                results[index] = error
        sizes = {index: len(context.ranked) for index, context in contexts.items()}
        pending = list(contexts)
        while pending:
            rows = [self._example(contexts[index], sizes[index]) for index in pending]
            results |= zip(pending, rows, strict=True)
            # One passage stays in any case; the policy for overlong rows decides about the row.
            pending = [index for index in self._too_long(pending, rows) if sizes[index] > 1]
            for index in pending:
                sizes[index] -= 1
        self._count(contexts, sizes)
        return [results[index] for index in range(len(examples))]

    def _example(self, context: _Context, count: int) -> Example:
        return context.example(count, self.documents.passages, cite=self.settings.cite)

    def _too_long(self, indices: Sequence[int], rows: Sequence[Example]) -> list[int]:
        encoded = zip(indices, self.encoder.encode(rows), strict=True)
        return [
            index
            for index, each in encoded
            if not isinstance(each, Misfit) and len(each.ids) > self.max_length
        ]

    def _context(self, example: Example) -> _Context:
        """Choose the passages of a row. Raises RowError for a row without one question and one
        answer, for an unknown document, and for a row that no passage matches."""
        question, answer = _question(example)
        right = self._right_passage(example, f"{question}\n{answer}")
        own = self.documents.spans[self.documents.owners[right]]
        key = json.dumps([self.seed, question, answer, example.document])
        numbers = random.Random(hashlib.sha256(key.encode()).digest())
        has_right = numbers.random() < self.settings.gold_share
        scores = self._index.scores(question)
        scores[own.start : own.stop] = -1.0  # below every passage of another document
        wanted = self.settings.passages - has_right
        others = best(scores, min(wanted, len(scores) - len(own)))
        ranked = (right, *others) if has_right else tuple(others)
        positions = tuple(numbers.random() for _ in ranked)
        return _Context(example, ranked, positions, has_right)

    def _right_passage(self, example: Example, query: str) -> int:
        """Return the passage that answers a row: the best match in the document that it names, or
        else in all documents."""
        scores = self._index.scores(query)
        if not example.document:
            found = int(np.argmax(scores))
            if not scores[found]:
                raise RowError("no passage shares a word with the question and the answer")
            return found
        span = self.documents.spans.get(example.document)
        if span is None:
            raise RowError(self._unknown(example.document))
        return span.start + int(np.argmax(scores[span.start : span.stop]))

    def _unknown(self, document: str) -> str:
        message = f"there is no document {document!r}"
        self.counts["unknown"] += 1
        if self.counts["unknown"] > FAULTS_SHOWN:  # messages show the first ones only
            return message
        close = get_close_matches(document, self._ids, n=1, cutoff=0)
        return f"{message}; the nearest id is {close[0]!r}"

    def _count(self, contexts: dict[int, _Context], sizes: dict[int, int]) -> None:
        for index, context in contexts.items():
            left_out = len(context.ranked) - sizes[index]
            self.counts["rows"] += 1
            self.counts["withRightPassage"] += context.has_right
            self.counts["namedDocuments"] += bool(context.bare.document)
            self.counts["shortenedContexts"] += left_out > 0
            self.counts["droppedPassages"] += left_out

    def details(self) -> dict[str, Any]:
        """Return the record of the contexts for `data.json` and the stage's details."""
        names = ("rows", "withRightPassage", "namedDocuments", "shortenedContexts")
        return {
            "documents": len(self.documents.spans),
            "passages": len(self.documents.passages),
            **{name: self.counts[name] for name in (*names, "droppedPassages")},
        }

    @property
    def sentence(self) -> str:
        """A sentence about the contexts for the log."""
        counts = self.counts
        searched = counts["rows"] - counts["namedDocuments"]
        text = (
            f"{counts['withRightPassage']} of {counts['rows']} contexts hold the right passage, "
            f"which BM25 chose for {searched} rows without a document's id"
        )
        if counts["droppedPassages"]:
            text += (
                f"; {counts['droppedPassages']} distractors of {counts['shortenedContexts']} "
                f"contexts were left out to keep rows within {self.max_length} tokens"
            )
        return text


def _question(example: Example) -> tuple[str, str]:
    """Return the question and the answer of a row. Raises RowError for any other row."""
    turns = [turn for turn in example.messages if turn.role != "system"]
    if [turn.role for turn in turns] != ["user", "assistant"] or turns[1].calls:
        found = ", ".join(turn.role for turn in turns) or "a text"
        raise RowError(f"retrieval needs one question and one answer, and the row has {found:.60}")
    return turns[0].content, turns[1].content
