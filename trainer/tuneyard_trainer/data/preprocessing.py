"""Preprocessing of data sets, row by row, by the job's policies for invalid and overlong rows.

Invalid rows end the stage only after all rows are read, so that one message counts all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import DatasetSettings, PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.findings import Cleaned, Findings
from tuneyard_trainer.data.example import Example, RowError
from tuneyard_trainer.data.ledger import Entry, Ledger
from tuneyard_trainer.data.masks import MaskProof
from tuneyard_trainer.data.middle import RESERVED
from tuneyard_trainer.data.originals import LEFT_OUT_WITH, Originals
from tuneyard_trainer.data.prepared import SPLITS
from tuneyard_trainer.data.retrieval import Contexts
from tuneyard_trainer.data.splits import Place, SplitWriter
from tuneyard_trainer.data.stream import FAULTS_SHOWN, examples
from tuneyard_trainer.data.texts import WITHOUT_CONTEXT
from tuneyard_trainer.data.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.toxicity import Toxicity
from tuneyard_trainer.data.unread import unread_message
from tuneyard_trainer.worker import Interrupted, Worker

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 20
"""A batch ends at the first limit that it reaches. It has enough rows for the tokenizer's threads
and takes a few MB of memory."""
OVERLENGTH_OUTCOMES = ("dropped", "truncated", "split")
"""The outcomes of rows that are longer than a sequence."""
UNREVIEWED = "unreviewed"
"""The rule that leaves out conversation trees without a reviewed answer."""
NOT_RATED_UP = "notRatedUp"
"""The rule that leaves out answers of a log that are neither edited nor rated up."""


class Refusal(NamedTuple):
    """The message and advice for rows that are refused for one reason."""

    problem: str
    advice: str
    may_skip: bool = True
    """Whether onInvalidRow: skip applies to these rows."""


REFUSALS = {
    "ChatTemplate": Refusal(
        "rows are refused by the chat template",
        "Repair these rows, set spec.data.chatTemplate, or set spec.data.onInvalidRow: skip.",
    ),
    "NoTargets": Refusal(
        "rows have no token that carries loss",
        "Repair these rows, raise spec.data.maxLength where it cuts the answer off, or set "
        "spec.data.onInvalidRow: skip.",
    ),
    "RetrievalMismatch": Refusal(
        "rows do not fit spec.data.retrieval",
        "Repair these rows, or set spec.data.onInvalidRow: skip.",
    ),
    "RowTooLong": Refusal(
        "rows are longer than {max_length} tokens",
        "Raise spec.data.maxLength, or set spec.data.onOverlength to split, truncate or drop.",
        may_skip=False,
    ),
}


@dataclass
class Tally:
    """The ledger of one data set, with its lengths and its first faults."""

    ledger: Ledger
    format: str = ""
    context_only_pieces: int = 0
    """Pieces of split rows without a target, which are left out."""
    longest: int = 0
    """Tokens of the longest row, before it is truncated or split."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by length in tokens, rounded up to a power of two."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """The first three rows refused for each reason."""
    unread: tuple[str, ...] = ()
    """The columns that nothing reads."""
    augmented: bool = False
    """Whether an earlier stage made the rows from other rows. A row that cannot be used is left
    out."""

    @property
    def role(self) -> str:
        """The input of the stage."""
        return self.ledger.role

    @property
    def name(self) -> str:
        """The field path in the manifest."""
        return self.ledger.name

    def refuse(self, reason: str, where: str, problem: str, tokens: int = 0) -> None:
        """Count a refused row."""
        self.ledger.lose("invalid", reason, tokens=tokens)
        shown = self.faults.setdefault(reason, [])
        if len(shown) < FAULTS_SHOWN:
            shown.append(f"{where}: {problem}")

    def refused(self, reason: str) -> int:
        """Return the number of rows refused for a reason."""
        return self.ledger.rows[Entry("invalid", reason)]

    def measure(self, length: int) -> None:
        """Count a row's length in tokens."""
        self.longest = max(self.longest, length)
        self.lengths[1 << (length - 1).bit_length()] += 1

    @property
    def skipped(self) -> int:
        """Rows refused. In a finished stage these are the skipped rows."""
        return self.ledger.num_rows("invalid")

    def outcome(self, name: str) -> int:
        """Return the number of rows of one of OVERLENGTH_OUTCOMES."""
        return self.ledger.num_rows("dropped") if name == "dropped" else self.ledger.changes[name]

    def details(self) -> dict[str, Any]:
        """Return the record of the data set for `data.json` and the stage's details."""
        ledger = self.ledger
        return {
            "role": ledger.role,
            "name": ledger.name,
            "format": self.format,
            "rows": ledger.read,
            "kept": ledger.num_rows("trained") + ledger.num_rows("heldOut"),
            "skipped": self.skipped,
            **{name: self.outcome(name) for name in OVERLENGTH_OUTCOMES},
            "filtered": ledger.num_rows("filtered"),
            "duplicates": ledger.num_rows("duplicate"),
            "contextOnlyPieces": self.context_only_pieces,
            "longest": self.longest,
            "unreadColumns": list(self.unread),
            **({"augmented": True} if self.augmented else {}),
            "lengths": {str(bound): self.lengths[bound] for bound in sorted(self.lengths)},
        }


@dataclass
class Preprocessor:
    """Reads, encodes and writes data sets row by row, by the job's policies."""

    stage: PlannedStage
    settings: PrepareSettings
    inputs: Mapping[str, Path]
    encoder: Encoder
    max_length: int
    worker: Worker
    cleaner: Cleaner
    contexts: Contexts | None = None
    """What puts a context before questions. None: rows have none."""
    toxicity: Toxicity | None = None
    """What judges rows by a classifier. None: the job asks for no such rule."""
    tallies: list[Tally] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    """What the rules of cleaning found in all data sets."""
    originals: Originals = field(default_factory=Originals)
    """The originals of augmented rows; empty if the job does not augment its data."""
    _num_rows: int = 0

    def read(
        self,
        split: str,
        datasets: Sequence[DatasetSettings],
        writer: SplitWriter,
        duplicates: Duplicates | None = None,
    ) -> None:
        """Read a split's data sets and add the rows to the writer, and to the search for
        duplicates. Augmented rows, which are meant to be like others, are not searched.

        Raises StageError, and Interrupted when the stage is asked to stop.
        """
        for index, dataset in enumerate(datasets):
            role = f"{split}.{index}"
            last = split == "train" and index == len(datasets) - 1
            tally = Tally(Ledger(role, self._name(role)), augmented=last and self._augments)
            self.tallies.append(tally)
            for rows in self._read_one(index, dataset, tally, writer):
                if duplicates and not tally.augmented:
                    duplicates.add(rows)

    @property
    def _augments(self) -> bool:
        return self.settings.augmented is True

    def _read_one(
        self, index: int, dataset: DatasetSettings, tally: Tally, writer: SplitWriter
    ) -> Iterator[list[dict[str, Any]]]:
        """Write a data set's rows, and yield the texts of those that were written, in batches."""
        stream = examples(
            self.inputs[tally.role],
            dataset if self.contexts is None else _with_documents(dataset),
            on_invalid="skip" if tally.augmented else self.settings.on_invalid_row,
            name=tally.name,
            augmented=tally.augmented,
        )
        proof = MaskProof(self.encoder)
        for batch in _batches(stream):
            self._check_stop()
            written = []
            cleaned = self._judged([self.cleaner(example) for example in batch])
            cleaned = self._with_contexts(cleaned, tally)
            encodings = self.encoder.encode([row.example for row in cleaned])
            for row, encoded in zip(cleaned, encodings, strict=True):
                pieces = self._pieces(row, encoded, tally)
                proof.add(row.example, pieces)
                if pieces:
                    self._note(index, row.example, tally, len(writer))
                    place = Place(index, row.example.file, row.example.row)
                    text = self._text(row.example)
                    writer.add(pieces, place, text, self._prompt(row.example))
                    written.append(text)
            yield written
            self._num_rows += len(batch)
            self.worker.report(step=self._num_rows, message=f"reading {tally.name}")
        summary = stream.summary
        tally.format, tally.ledger.read = summary.format, summary.rows
        tally.ledger.lose("invalid", "InvalidData", rows=summary.skipped)
        left_out = NOT_RATED_UP if summary.format == "feedback" else UNREVIEWED
        tally.ledger.lose("filtered", left_out, rows=summary.filtered)
        if summary.faults:
            tally.faults["InvalidData"] = [str(fault) for fault in summary.faults]
        tally.unread = summary.unread
        self._name_unread(tally)
        self._name_left_out(tally)
        if summary.filtered and summary.format == "feedback":
            message = f"{tally.name}: {summary.filtered} answers are neither edited nor rated up"
            self.worker.report(step=self._num_rows, message=message)
        proof.check(tally.name)

    def _check_stop(self) -> None:
        if self.worker.stop():
            raise Interrupted(self.stage.name, self._num_rows)

    def _judged(self, rows: list[Cleaned]) -> list[Cleaned]:
        """Return the rows of a batch with what the classifier found in them."""
        return self.toxicity(rows, self._check_stop) if self.toxicity else rows

    def _note(self, index: int, example: Example, tally: Tally, row: int) -> None:
        """Note a row that is written, as an original or with its original."""
        if example.origin is not None:
            self.originals.add_augmented(example.origin)
        elif self._augments and tally.role.startswith("train."):
            self.originals.add(index, example.number, row)

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

    def _name_unread(self, tally: Tally) -> None:
        """Report the columns that nothing reads."""
        if not tally.unread:
            return
        message = unread_message(tally.name, tally.unread)
        if tally.format in ("alpaca", "prompt-completion"):
            message += f"; {tally.name}.fields.input can name one that follows the prompt"
        self.worker.report(step=self._num_rows, message=message)

    def _name_left_out(self, tally: Tally) -> None:
        """Report the reasoning and the tools that the chat template does not render."""
        for what, count in self.encoder.left_out.items():
            if count:
                message = (
                    f"{tally.name}: the chat template does not render the {what} of {count} rows"
                )
                self.worker.report(step=self._num_rows, message=message)
        self.encoder.left_out.clear()

    def _name(self, role: str) -> str:
        source = self.stage.inputs[role]
        return source.path.removesuffix(".uri") or role

    def _pieces(self, row: Cleaned, encoded: Encoded | Misfit, tally: Tally) -> list[Encoded]:
        """Return the sequences to write for a row: none, the row, its start, or its pieces."""
        where = _where(row.example)
        for finding in row.findings:
            self.findings.add(finding, f"{tally.name} {where}")
        if row.removed_by is not None:
            tokens = 0 if isinstance(encoded, Misfit) else len(encoded.ids)
            tally.ledger.lose("filtered", row.removed_by, tokens=tokens)
            return []
        origin = row.example.origin
        if origin is not None and not self.originals.has(origin):
            tokens = 0 if isinstance(encoded, Misfit) else len(encoded.ids)
            tally.ledger.lose("filtered", LEFT_OUT_WITH, tokens=tokens)
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
        return self._overlong(where, encoded, tally)

    @property
    def part_length(self) -> int:
        """The longest piece of a split or truncated row, in tokens. It leaves room for markers."""
        reserved = RESERVED if self.settings.fill_in_the_middle else 0
        return max(1, self.max_length - reserved)

    def _overlong(self, where: str, encoded: Encoded, tally: Tally) -> list[Encoded]:
        policy, length = self.settings.on_overlength, len(encoded.ids)
        if policy == "error" and not tally.augmented:
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
        around them. "": the row is all target, and the method pretrain has no prompts."""
        if example.kind == "text" or self.settings.method == "pretrain":
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

    # ---- checks -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise StageError ChatTemplate, NoTargets, RowTooLong or EmptyData for the rows read.
        Augmented rows are left out without an error."""
        for reason, refusal in REFUSALS.items():
            if self.settings.on_invalid_row == "error" or not refusal.may_skip:
                self._check_refused(reason, refusal)
        for split in SPLITS:
            self._check_left(split)

    def _check_refused(self, reason: str, refusal: Refusal) -> None:
        given = [tally for tally in self.tallies if not tally.augmented]
        affected = [tally for tally in given if tally.refused(reason)]
        if not affected:
            return
        count = sum(tally.refused(reason) for tally in affected)
        total = sum(tally.ledger.read for tally in given)
        shown = [f"{t.name} {fault}" for t in affected for fault in t.faults[reason]]
        problem = refusal.problem.format(max_length=self.max_length)
        first = "" if count <= FAULTS_SHOWN else f"The first {FAULTS_SHOWN}: "
        raise StageError(
            reason,
            f"{count} of {total} {problem}. {first}{'; '.join(shown[:FAULTS_SHOWN])}.",
            advice=refusal.advice,
        )

    def _check_left(self, split: str) -> None:
        affected = [tally for tally in self.tallies if tally.role.startswith(split)]
        if not affected or any(tally.ledger.kept for tally in affected):
            return
        skipped = sum(tally.skipped for tally in affected)
        dropped = sum(tally.outcome("dropped") for tally in affected)
        filtered = sum(tally.ledger.num_rows("filtered") for tally in affected)
        by_rules = f", {filtered} removed by rules" if filtered else ""
        shown = [fault for t in affected for faults in t.faults.values() for fault in faults]
        raise StageError(
            "EmptyData",
            f"no row is left for {split}: {skipped} skipped, {dropped} "
            f"dropped as longer than {self.max_length} tokens{by_rules}. "
            f"{'; '.join(shown[:FAULTS_SHOWN])}",
            advice=f"Repair the rows of {affected[0].name}, or raise spec.data.maxLength"
            + (", or remove rules from spec.data.clean." if filtered else "."),
        )


def _where(example: Example) -> str:
    return f"{example.file} row {example.row}".strip()


def _with_documents(dataset: DatasetSettings) -> DatasetSettings:
    """Return the settings that also read the id of each row's document."""
    column = dataset.fields.document or "document"
    return dataset.model_copy(
        update={"fields": dataset.fields.model_copy(update={"document": column})}
    )


def _batches(stream: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield batches within BATCH_ROWS and BATCH_CHARACTERS."""
    batch: list[Example] = []
    characters = 0
    for example in stream:
        batch.append(example)
        characters += len(example.text) + sum(len(turn.content) for turn in example.messages)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
