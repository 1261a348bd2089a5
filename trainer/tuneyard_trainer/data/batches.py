"""One batch of rows: read, cleaned, given contexts, encoded and cut, by the job's policies.

A batch depends on nothing but its rows and the job, so any process may prepare it. The results of
all batches, taken in order, are those of the whole data set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from tuneyard.api.stage_settings import PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.duplicates import RowKeys
from tuneyard_trainer.data.cleaning.findings import Cleaned, Findings
from tuneyard_trainer.data.cleaning.words import WordHashes
from tuneyard_trainer.data.encoding.masks import MaskProof
from tuneyard_trainer.data.encoding.middle import RESERVED
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, Origin, RowError
from tuneyard_trainer.data.reading.rows import Line, Row
from tuneyard_trainer.data.reading.stream import RowCounts, RowReader
from tuneyard_trainer.data.splits import Place, RowBlock
from tuneyard_trainer.data.tally import Tally
from tuneyard_trainer.data.texts import WITHOUT_CONTEXT, text_line

if TYPE_CHECKING:  # each process imports this module: torch would take 3 s and 700 MB of each
    from tuneyard_trainer.data.retrieval import Contexts
    from tuneyard_trainer.data.toxicity import Toxicity

AnyRow = TypeVar("AnyRow", bound=Row | Line)

BATCH_ROWS = 256
BATCH_CHARACTERS = 1 << 20
"""A batch ends at the first limit that it reaches. It has enough rows for the tokenizer's threads,
takes a few MB of memory, and is so short that processes end at nearly the same time."""


@dataclass(frozen=True)
class RowBatch:
    """Rows of one data set that follow each other."""

    rows: list[Row | Line]
    size: int
    """As `batched` returns it."""
    reader: RowReader
    source: int
    """The index of the data set in its split."""
    name: str
    """The data set's field in the manifest, for messages."""
    keeps_texts: bool
    """Whether the rows are also kept as text."""
    only_counted: bool = False
    """Whether the rows are not prepared, since an earlier one has ended the stage."""


@dataclass
class PreparedBatch:
    """The outcome of the rows of a batch."""

    counts: RowCounts = field(default_factory=RowCounts)
    error: StageError | None = None
    """What ends the stage, unless an invalid row of an earlier batch does: whether there is one is
    not yet known where batches are prepared ahead. Only `counts` is set beside it."""
    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)
    proof: MaskProof = field(default_factory=MaskProof)
    left_out: Counter[str] = field(default_factory=Counter)
    """Examples whose `reasoning` or `tools` the chat template does not render."""
    contexts: Counter[str] = field(default_factory=Counter)
    """Counts of `Contexts`."""
    numbers: list[int] = field(default_factory=list)
    """For each row of `block`: the number of its example, from the first one of the batch."""
    origins: list[Origin | None] = field(default_factory=list)
    """For each row of `block`: what it was made from."""
    block: RowBlock | None = None
    """The rows to write. None: none were prepared."""
    keys: RowKeys | None = None
    """The keys that these rows are compared by. None: duplicates are not searched."""


@dataclass
class BatchEncoder:
    """Prepares batches. It pickles, and each process has a copy of it."""

    settings: PrepareSettings
    encoder: Encoder
    max_length: int
    cleaner: Cleaner
    contexts: Contexts | None = None
    """What puts a context before questions. None: rows have none."""
    toxicity: Toxicity | None = None
    """What judges rows by a classifier, which stays in this process. None: the job asks for no such
    rule."""
    before_forward: Callable[[], None] | None = None
    """Called before each forward pass of the classifier. None: nothing is."""
    _known: WordHashes = field(default_factory=WordHashes)

    def __call__(self, batch: RowBatch) -> PreparedBatch:
        """Return what becomes of a batch. Its error is a StageError as `Encoder.encode` raises
        it."""
        done = PreparedBatch()
        examples = [each for row in batch.rows for each in batch.reader.read(row, done.counts)]
        if batch.only_counted:
            return done
        try:
            self._prepare(examples, batch, done)
        except StageError as error:
            return PreparedBatch(done.counts, error)
        return done

    def _prepare(self, examples: list[Example], batch: RowBatch, done: PreparedBatch) -> None:
        """Add what becomes of the examples of a batch. Raises StageError as `Encoder.encode`
        does."""
        done.tally.ledger.name = batch.name
        cleaned = [self.cleaner(example) for example in examples]
        if self.toxicity is not None:
            cleaned = self.toxicity(cleaned, self.before_forward or _nothing)
        cleaned = self._with_contexts(cleaned, done.tally)
        encodings = self.encoder.encode([row.example for row in cleaned])
        block = done.block = RowBlock(self.settings.seed, keeps_texts=batch.keeps_texts)
        texts: list[dict[str, Any]] = []
        for row, encoded in zip(cleaned, encodings, strict=True):
            pieces = self._pieces(row, encoded, done)
            if pieces:
                example = row.example
                done.proof.add(example, pieces, self.encoder)
                place = Place(batch.source, example.file, example.row)
                line = None
                if batch.keeps_texts or self._compares:
                    texts.append(self._text(example))
                    line = text_line(texts[-1]) if batch.keeps_texts else None
                block.add(pieces, place, line, self._prompt(example))
                done.numbers.append(example.number)
                done.origins.append(example.origin)
        if self._compares:
            is_near = self.settings.clean is not None and self.settings.clean.duplicates == "near"
            done.keys = RowKeys.of(texts, self._known if is_near else None)
        self._take_counts(done)

    @property
    def _compares(self) -> bool:
        """Whether duplicates are searched."""
        return self.settings.clean is not None and self.settings.clean.duplicates is not None

    def _take_counts(self, done: PreparedBatch) -> None:
        done.left_out.update(self.encoder.left_out)
        self.encoder.left_out.clear()
        if self.contexts is not None:
            done.contexts.update(self.contexts.counts)
            self.contexts.counts.clear()

    def _with_contexts(self, rows: list[Cleaned], tally: Tally) -> list[Cleaned]:
        """Return the rows of a batch with their contexts, without the rows that cannot have one."""
        if self.contexts is None:
            return rows
        kept = [row for row in rows if row.removed_by is None]
        found = iter(self.contexts.add([row.example for row in kept]))
        results = []
        for row in rows:
            example = row.example if row.removed_by is not None else next(found)
            if isinstance(example, RowError):
                tally.refuse("RetrievalMismatch", _where(row.example), str(example))
            else:
                results.append(row._replace(example=example))
        return results

    def _pieces(
        self, row: Cleaned, encoded: Encoded | Misfit, done: PreparedBatch
    ) -> list[Encoded]:
        """Return the sequences to write for a row: none, the row, its start, or its pieces."""
        tally, where = done.tally, _where(row.example)
        for finding in row.findings:
            done.findings.add(finding, f"{tally.name} {where}")
        if row.removed_by is not None:
            tokens = 0 if isinstance(encoded, Misfit) else len(encoded.ids)
            tally.ledger.lose("filtered", row.removed_by, tokens=tokens)
            return []
        tally.ledger.changes.update(finding.rule for finding in row.findings)
        if isinstance(encoded, Misfit):
            tally.refuse("ChatTemplate", where, encoded.message)
            return []
        length = len(encoded.ids)
        tally.measure(length)
        if not encoded.mask.any():
            tally.refuse("NoTargets", where, "no token carries loss", length)
            return []
        if length <= self.max_length:
            tally.ledger.keep(length)
            return [encoded]
        return self._overlong(row.example, encoded, tally)

    @property
    def part_length(self) -> int:
        """The longest piece of a split or truncated row, in tokens. It leaves room for markers."""
        reserved = RESERVED if self.settings.fill_in_the_middle else 0
        return max(1, self.max_length - reserved)

    def _overlong(self, example: Example, encoded: Encoded, tally: Tally) -> list[Encoded]:
        policy, length, where = self.settings.on_overlength, len(encoded.ids), _where(example)
        if policy == "error" and example.origin is None:
            tally.refuse("RowTooLong", where, f"{length} tokens", length)
            return []
        if policy in ("drop", "error"):
            tally.ledger.lose("dropped", tokens=length)
            return []
        pieces = (
            truncate(encoded, self.part_length)
            if policy == "truncate"
            else split_evenly(encoded, self.part_length)
        )
        useful = [piece for piece in pieces if piece.mask.any()]
        if not useful:
            problem = f"none of the first {self.part_length} tokens carries loss"
            tally.refuse("NoTargets", where, problem, length)
            return []
        cut = length - sum(len(piece.ids) for piece in pieces)
        left_out = sum(len(piece.ids) for piece in pieces if not piece.mask.any())
        tally.ledger.keep(length, cut=cut, context_only=left_out)
        tally.ledger.changes["truncated" if policy == "truncate" else "split"] += 1
        tally.context_only_pieces += len(pieces) - len(useful)
        return useful

    def _prompt(self, example: Example) -> str:
        """Return the turns before the last one, whose rows go to one split, without the white space
        around them. "": the row is all target, the method pretrain has no prompts, and nothing
        reads them without held-out or augmented rows."""
        if example.kind == "text" or self.settings.method == "pretrain":
            return ""
        settings = self.settings
        held_out = settings.validation_fraction is not None or settings.validation
        if not held_out and not settings.augmented:
            return ""
        bare = example.without_context or example
        turns = [[turn.role, turn.text.strip()] for turn in bare.messages[:-1]]
        return json.dumps(turns, ensure_ascii=False)

    def _text(self, example: Example) -> dict[str, Any]:
        """Return the row as text, for `validation.jsonl`."""
        text: dict[str, Any] = {}
        conversation = self.encoder.conversation(example)
        if conversation:
            text["messages"] = conversation
            if example.tools:
                text["tools"] = list(example.tools)
        elif example.kind == "completion":
            text |= {"prompt": example.prompt, "completion": example.completion}
        else:
            text["text"] = example.text
        if example.expected:
            text["expected"] = list(example.expected)
        if example.without_context:
            text[WITHOUT_CONTEXT] = self._text(example.without_context)
        return text


def batched(rows: Iterable[AnyRow]) -> Iterator[tuple[list[AnyRow], int]]:
    """Yield batches within BATCH_ROWS and BATCH_CHARACTERS, each with its size: the bytes of lines
    that are not parsed, else the characters of strings."""
    batch: list[AnyRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.text) if isinstance(row, Line) else _characters(row.value)
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _characters(value: Any) -> int:
    """Return the characters of the strings in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _nothing() -> None:
    """Do nothing before a forward pass."""


def _where(example: Example) -> str:
    return f"{example.file} row {example.row}".strip()


def truncate(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Return the start of the row, as one sequence."""
    return [Encoded(encoded.ids[:max_length], encoded.mask[:max_length])]


def split_evenly(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Return the whole row in as few pieces as possible.

    Lengths differ by one token at most, so that no piece is a short remainder. A piece's first
    token is no target, because no token precedes it.
    """
    length = len(encoded.ids)
    count = -(-length // max_length)
    bounds = [index * length // count for index in range(count + 1)]
    pieces = []
    for start, end in pairwise(bounds):
        mask = encoded.mask[start:end].copy()
        mask[0] = 0
        pieces.append(Encoded(encoded.ids[start:end], mask))
    return pieces
