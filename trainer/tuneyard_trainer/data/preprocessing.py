"""Preprocessing of data sets, row by row, by the job's policies for invalid and overlong rows.

Invalid rows end the stage only after all rows are read, so that one message counts all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import DatasetSettings, PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.batches import BatchEncoder, PreparedBatch, RowBatch, batched
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.findings import Findings
from tuneyard_trainer.data.encoding.masks import MaskProof
from tuneyard_trainer.data.ledger import Ledger
from tuneyard_trainer.data.originals import Originals
from tuneyard_trainer.data.parallel import Pool
from tuneyard_trainer.data.prepared import GENERAL, GUARD, SPLITS
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, Examples, Summary, examples
from tuneyard_trainer.data.reading.unread import absent_message, unread_message
from tuneyard_trainer.data.splits import SplitWriter
from tuneyard_trainer.data.tally import Tally
from tuneyard_trainer.worker import Interrupted, Worker

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
class Preprocessor:
    """Reads, encodes and writes data sets row by row, by the job's policies."""

    stage: PlannedStage
    settings: PrepareSettings
    inputs: Mapping[str, Path]
    worker: Worker
    encoder: BatchEncoder
    pool: Pool[RowBatch, PreparedBatch]
    """The processes that call `encoder`."""
    tallies: list[Tally] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    """What the rules of cleaning found in all data sets."""
    originals: Originals = field(default_factory=Originals)
    """The originals of augmented rows; empty if the job does not augment its data."""
    contexts: Counter[str] = field(default_factory=Counter)
    """Counts of `Contexts` in all batches."""
    _num_rows: int = 0

    def __post_init__(self) -> None:
        if self.encoder.toxicity is not None:
            self.encoder.before_forward = self._check_stop

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
            searched = None if tally.augmented else duplicates
            self._read_one(index, dataset, tally, writer, searched)

    @property
    def _augments(self) -> bool:
        return self.settings.augmented is True

    def _read_one(
        self,
        index: int,
        dataset: DatasetSettings,
        tally: Tally,
        writer: SplitWriter,
        duplicates: Duplicates | None,
    ) -> None:
        """Read a data set and write its rows, in batches."""
        stream = examples(
            self.inputs[tally.role],
            dataset if self.encoder.contexts is None else _with_documents(dataset),
            on_invalid="skip" if tally.augmented else self.settings.on_invalid_row,
            name=tally.name,
            augmented=tally.augmented,
        )
        proof, left_out = MaskProof(), Counter[str]()
        keeps_texts = writer.texts is not None
        batches = self._batches(stream, index, tally.name, keeps_texts=keeps_texts)
        for done in self.pool.map(batches):
            is_failed, first = stream.fails, stream.counts.examples
            stream.counts.update(done.counts)
            if is_failed:
                continue
            if done.error is not None:
                raise done.error
            if done.block is None:
                continue
            tally.add(done.tally)
            self.findings.update(done.findings)
            proof.update(done.proof)
            left_out.update(done.left_out)
            self.contexts.update(done.contexts)
            self._note(index, done, first, tally, len(writer))
            writer.extend(done.block)
            if duplicates and done.keys is not None:
                duplicates.add_keys(done.keys)
            self._num_rows += done.counts.examples
            self.worker.report(step=self._num_rows, message=f"reading {tally.name}")
        stream.finish()
        self._settle(stream.summary, tally)
        self._name_unread(tally, stream.summary.absent)
        self._name_left_out(tally, left_out)
        if stream.summary.filtered and tally.format == "feedback":
            count = stream.summary.filtered
            message = f"{tally.name}: {count} answers are neither edited nor rated up"
            self.worker.report(step=self._num_rows, message=message)
        proof.check(tally.name, self.encoder.encoder)

    def _batches(
        self, stream: Examples, source: int, name: str, *, keeps_texts: bool
    ) -> Iterator[RowBatch]:
        """Yield the batches of a data set. Raises Interrupted."""
        for rows, size in batched(stream.rows()):
            self._check_stop()
            yield RowBatch(rows, size, stream.reader, source, name, keeps_texts, stream.fails)

    def _check_stop(self) -> None:
        if self.worker.stop():
            raise Interrupted(self.stage.name, self._num_rows)

    def _note(self, index: int, done: PreparedBatch, first: int, tally: Tally, row: int) -> None:
        """Note the rows that are written next, as originals or with their originals. `first`: the
        number of the batch's first example. `row`: the number of rows written before."""
        if not self._augments or not tally.role.startswith("train."):
            return
        for number, origin in zip(done.numbers, done.origins, strict=True):
            if origin is not None:
                self.originals.add_augmented(origin)
            else:
                self.originals.add(index, first + number, row)
            row += 1

    @staticmethod
    def _settle(summary: Summary, tally: Tally) -> None:
        """Note what reading found in a data set."""
        tally.format, tally.ledger.read = summary.format, summary.rows
        tally.ledger.lose("invalid", "InvalidData", rows=summary.skipped)
        left_out = NOT_RATED_UP if summary.format == "feedback" else UNREVIEWED
        tally.ledger.lose("filtered", left_out, rows=summary.filtered)
        if summary.faults:
            tally.faults["InvalidData"] = [str(fault) for fault in summary.faults]
        tally.unread = summary.unread

    def _name_unread(self, tally: Tally, absent: Sequence[str]) -> None:
        """Report the columns that nothing reads, and the fields whose columns are `absent`."""
        if absent:
            message = absent_message(tally.name, absent)
            self.worker.report(step=self._num_rows, message=message)
        if not tally.unread:
            return
        message = unread_message(tally.name, tally.unread)
        if tally.format in ("alpaca", "prompt-completion"):
            message += f"; {tally.name}.fields.input can name one that follows the prompt"
        self.worker.report(step=self._num_rows, message=message)

    def _name_left_out(self, tally: Tally, left_out: Mapping[str, int]) -> None:
        """Report the reasoning and the tools that the chat template does not render."""
        for what, count in left_out.items():
            if count:
                message = (
                    f"{tally.name}: the chat template does not render the {what} of {count} rows"
                )
                self.worker.report(step=self._num_rows, message=message)

    def _name(self, role: str) -> str:
        source = self.stage.inputs[role]
        return source.path.removesuffix(".uri") or role

    # ---- checks -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise StageError ChatTemplate, NoTargets, RowTooLong or EmptyData for the rows read.
        Augmented rows are left out without an error."""
        for reason, refusal in REFUSALS.items():
            if self.settings.on_invalid_row == "error" or not refusal.may_skip:
                self._check_refused(reason, refusal)
        for split in (*SPLITS, GENERAL, GUARD):
            self._check_left(split)

    def _check_refused(self, reason: str, refusal: Refusal) -> None:
        given = [tally for tally in self.tallies if not tally.augmented]
        affected = [tally for tally in given if tally.refused(reason)]
        if not affected:
            return
        count = sum(tally.refused(reason) for tally in affected)
        total = sum(tally.ledger.read for tally in given)
        shown = [f"{t.name} {fault}" for t in affected for fault in t.faults[reason]]
        problem = refusal.problem.format(max_length=self.encoder.max_length)
        first = "" if count <= FAULTS_SHOWN else f"The first {FAULTS_SHOWN}: "
        raise StageError(
            reason,
            f"{count} of {total} {problem}. {first}{'; '.join(shown[:FAULTS_SHOWN])}.",
            advice=refusal.advice,
        )

    def _check_left(self, split: str) -> None:
        given = [tally for tally in self.tallies if not tally.augmented]
        affected = [tally for tally in given if tally.role.startswith(split)]
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
            f"dropped as longer than {self.encoder.max_length} tokens{by_rules}. "
            f"{'; '.join(shown[:FAULTS_SHOWN])}",
            advice=f"Repair the rows of {affected[0].name}, or raise spec.data.maxLength"
            + (", or remove rules from spec.data.clean." if filtered else "."),
        )


def _with_documents(dataset: DatasetSettings) -> DatasetSettings:
    """Return the settings that also read the id of each row's document."""
    column = dataset.fields.document or "document"
    return dataset.model_copy(
        update={"fields": dataset.fields.model_copy(update={"document": column})}
    )
