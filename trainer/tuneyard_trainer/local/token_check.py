"""The faults of rows as a model reads them: `tuneyard data check --model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tuneyard.errors import StageError
from tuneyard_trainer.data.batches import truncate
from tuneyard_trainer.data.encoding.chat import TrainOn
from tuneyard_trainer.data.encoding.masks import MaskProof
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN
from tuneyard_trainer.local.check import BATCH_ROWS, Fault, spread
from tuneyard_trainer.local.models import model_folder
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.files import sequence_limit
from tuneyard_trainer.preference.batches import encode_completions

REFUSED = "rows that the chat template refuses"
WITHOUT_TARGETS = "rows without a trained token"
ALIKE = "preferences with two answers of the same tokens"
_WHOLE_FILE = {
    "NoStopToken": "rows, none of which trains a stop token within the limit",
    "ContextTrained": "rows whose questions are trained on",
}
"""Faults of all rows of a file, by the reason of the error that ends a job."""


@dataclass
class TokenCheck:
    """Encodes rows by a model's tokenizer and chat template, and counts what a job would refuse."""

    encoder: Encoder
    limit: int
    """Most tokens of a row."""
    rated: bool
    """Whether the rows are preferences, which are trained on as the stage `pairs` reads them."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row, or of each completion with its prompt."""
    _num_rows: int = 0
    _waiting: list[tuple[str, Sequence[Example]]] = field(default_factory=list)
    _faults: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    _proof: MaskProof = field(default_factory=MaskProof)

    @classmethod
    def of(
        cls,
        model: str,
        *,
        max_length: int | Literal["auto"],
        train_on: TrainOn,
        reasoning: bool,
        rated: bool,
    ) -> TokenCheck:
        """Return the check of a model's folder or URI. Raises StageError.

        The other arguments are fields of a manifest, except `rated`: whether the rows are
        preferences, of which the last answer is trained on.
        """
        folder = model_folder(model)
        tokenizer = load_tokenizer(folder)
        limit = sequence_limit(folder, tokenizer, max_length, "--max-length")
        encoder = Encoder(tokenizer, "last-assistant" if rated else train_on, reasoning=reasoning)
        return cls(encoder, limit, rated)

    def add(self, place: str, examples: Sequence[Example]) -> None:
        """Search a row. Raises StageError ChatTemplate or NoStopToken if no row can be encoded."""
        self._num_rows += 1
        self._waiting.append((place, examples))
        if len(self._waiting) == BATCH_ROWS:
            self._encode()

    def faults(self) -> list[Fault]:
        """Return the faults of all rows. Raises StageError as `add` does."""
        self._encode()
        found = [
            Fault(name, rows, self._num_rows, shown) for name, (rows, shown) in self._faults.items()
        ]
        try:
            self._proof.check("the file", self.encoder)
        except StageError as error:
            name = _WHOLE_FILE[error.reason]
            found.append(Fault(name, self._proof.rows, self._num_rows, [error.message]))
        return found

    def notes(self) -> list[str]:
        """Return the lengths, and what the chat template does not render."""
        what = "an answer with its prompt" if self.rated else "a row"
        lengths = f"Tokens of {what}: {spread(self.lengths)}." if self.lengths else ""
        left_out = [
            f"The chat template does not render the {part} of {count:,} rows."
            for part, count in self.encoder.left_out.items()
            if count
        ]
        return [*filter(None, [lengths]), *left_out]

    def _encode(self) -> None:
        waiting, self._waiting = self._waiting, []
        every = [example for _, examples in waiting for example in examples]
        if not every:
            return
        encoded = iter(
            encode_completions(every, self.encoder) if self.rated else self.encoder.encode(every)
        )
        for place, examples in waiting:
            self._judge(place, examples, [next(encoded) for _ in examples])

    def _judge(
        self, place: str, examples: Sequence[Example], encoded: Sequence[Encoded | Misfit]
    ) -> None:
        """Count a row at its first fault."""
        rows = [row for row in encoded if isinstance(row, Encoded)]
        misfit = next((row for row in encoded if isinstance(row, Misfit)), None)
        lengths = [len(row.ids) for row in rows]
        self.lengths += lengths
        if misfit is not None:
            self._count(REFUSED, f"{place}: {misfit.message}")
        elif not all(row.mask.any() for row in rows):
            self._count(WITHOUT_TARGETS, place)
        elif len({row.ids.tobytes() for row in rows}) < len(rows):
            self._count(ALIKE, place)
        elif max(lengths) > self.limit:
            self._count(f"rows longer than {self.limit:,} tokens", f"{place}: {max(lengths):,}")
        for example, row in zip(examples, encoded, strict=True):
            if isinstance(row, Encoded):
                kept = truncate(row, self.limit)
                pieces = [piece for piece in kept if piece.mask.any()]
                self._proof.add(example, pieces, self.encoder)

    def _count(self, name: str, shown: str) -> None:
        rows, examples = self._faults.get(name, (0, []))
        if len(examples) < FAULTS_SHOWN:
            examples.append(shown)
        self._faults[name] = rows + 1, examples
