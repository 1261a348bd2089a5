"""pairs: read preferences, check every row, hold out prompts, and write tokens to disk.

All completions of a prompt are in the same split. The data is read once. Memory holds the batches
in flight, and of each preference 20 bytes here and 33 in its statistics.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import DatasetSettings, PairsSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.batches import batched
from tuneyard_trainer.data.encoding.masks import MaskProof
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.ledger import Ledger, ledger_details
from tuneyard_trainer.data.parallel import Pool, num_processes
from tuneyard_trainer.data.prepared import BLOCK_ROWS, SPLITS, Rows, RowWriter
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.conversations import template_turns, turn_text
from tuneyard_trainer.data.reading.example import RowError
from tuneyard_trainer.data.reading.rows import Row, read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN
from tuneyard_trainer.data.reading.unread import Unread, absent_message, unread_message
from tuneyard_trainer.data.splits import held_out
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import sequence_limit
from tuneyard_trainer.preference.batches import (
    EncodedPreference,
    Outcome,
    PreferenceEncoder,
    RatedRows,
    Rejected,
    location,
)
from tuneyard_trainer.preference.dataset import remove_groups, write_groups
from tuneyard_trainer.preference.rows import Preference, columns_read, recognized
from tuneyard_trainer.preference.statistics import PreferenceStatistics
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome

MAX_SKIPPED = 0.5
"""The largest fraction of rows that `onInvalidRow: skip` may skip. If more rows are invalid, the
format is probably misread."""
NO_PREFERENCE = "noPreference"
"""The rule that leaves out rows without a preference."""
_SPOOL = ".spool"
REPAIR = "Correct these rows, or set spec.preferences.onInvalidRow: skip."
SHAPES = (
    "A row needs prompt, chosen and rejected; or prompt and answers (best first); or prompt, "
    "completion and label (for kto). Name another prompt field in spec.preferences.data[].fields."
)


def run(context: StageContext) -> StageOutcome:
    """Write the files that `preference.dataset` describes, `validation.jsonl` and `tokenizer/`."""
    settings = context.settings(PairsSettings)
    _clear(context.workdir)
    try:
        return _Reader.of(context, settings).outcome()
    except (StageError, OSError):  # OSError: a full disk
        _clear(context.workdir)
        raise


@dataclass
class _Reader:
    """Reads, checks and splits the preferences of one stage."""

    context: StageContext
    settings: PairsSettings
    encoder: Encoder
    limit: int
    """The limit of a row, in tokens."""
    num_rows: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Rejected rows, by reason."""
    ledgers: list[Ledger] = field(default_factory=list)
    """The ledger of each data set."""
    unread: list[Unread] = field(default_factory=list)
    """The columns of each data set that nothing reads."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first rejected rows of each reason."""
    num_too_long: int = 0
    """The groups with a row longer than `limit`."""
    too_long: list[str] = field(default_factory=list)
    """The first of these groups, FAULTS_SHOWN at most."""
    without_preference: int = 0
    """Valid rows that state no preference: unrated answers, and trees without ranks. An answer that
    another one beats is in a pair of that one, and is not counted."""
    longest: int = 0
    """The longest row so far, in tokens."""
    sizes: array[int] = field(default_factory=lambda: array("l"))
    """The number of completions of each group."""
    labels: array[float] = field(default_factory=lambda: array("f"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of each group's prompt."""
    statistics: list[PreferenceStatistics] = field(default_factory=list)
    """The statistics of each data set."""
    proofs: dict[int, MaskProof] = field(default_factory=dict)
    """The masks of each data set."""

    @classmethod
    def of(cls, context: StageContext, settings: PairsSettings) -> _Reader:
        tokenizer = base.load_tokenizer(context.inputs["model"])
        if settings.chat.chat_template is not None:
            tokenizer.chat_template = settings.chat.chat_template
        limit = sequence_limit(
            context.inputs["model"], tokenizer, settings.max_length, "spec.preferences.maxLength"
        )
        encoder = Encoder(
            tokenizer,
            "last-assistant",
            settings.chat.system_prompt,
            reasoning=settings.reasoning != "drop",
        )
        return cls(context, settings, encoder, limit)

    def outcome(self) -> StageOutcome:
        """Read everything and write the splits. Raises StageError or Interrupted."""
        spool = self.context.workdir / _SPOOL
        spool.mkdir(parents=True)
        prepare = PreferenceEncoder(self.encoder, self.settings.labeled)
        with (
            Pool(prepare, num_processes(), lambda batch: batch.size) as pool,
            RowWriter(spool, "all") as rows,
            (spool / "texts").open("w", encoding="utf-8") as text,
        ):
            for index, dataset in enumerate(self.settings.preferences):
                self.ledgers.append(Ledger(f"preferences.{index}", self._name(index)))
                self.unread.append(Unread())
                self.statistics.append(PreferenceStatistics())
                message = f"reading {self._name(index)}"
                for outcomes in pool.map(self._batches(index, dataset)):
                    for outcome in outcomes:
                        self._take(outcome, index, rows, text)
                    self.context.worker.report(step=self.num_rows, message=message)
                self._name_unread()
                self._note_statistics()
        self._check()
        counts = self._assign_splits(spool)
        shutil.rmtree(spool)
        for ledger in self.ledgers:
            ledger.check()
        self.encoder.tokenizer.save_pretrained(self.context.workdir / "tokenizer")
        metrics = self._metrics(counts)
        details: dict[str, Any] = {
            "skippedBy": dict(self.faults),
            "faults": self.examples,
            "maxLength": self.limit,
            "unreadColumns": {
                ledger.name: list(unread.names)
                for ledger, unread in zip(self.ledgers, self.unread, strict=True)
            },
            "ledger": ledger_details(self.ledgers),
            "statistics": {
                ledger.name: statistics.details()
                for ledger, statistics in zip(self.ledgers, self.statistics, strict=True)
            },
        }
        if self.without_preference:
            details["withoutPreference"] = self.without_preference
            message = f"{self.without_preference} rows state no preference"
            self.context.worker.report(step=self.num_rows, message=message)
        self._write_summary(metrics, details)
        return StageOutcome(metrics, details)

    # ---- rows ---------------------------------------------------------------------------------

    def _batches(self, index: int, dataset: DatasetSettings) -> Iterator[RatedRows]:
        """Yield the rows of one data set, in batches."""
        source = read_data(self.context.inputs[f"preferences.{index}"])
        rows = self._noted(islice(source, dataset.limit), dataset)
        rows = layouts.joined(rows, dataset.format, dataset.fields)
        for chunk, size in batched(rows):
            if self.context.worker.stop():
                raise Interrupted(self.context.stage.name, self.num_rows)
            yield RatedRows(chunk, size, dataset.fields, dataset.format)

    def _noted(self, rows: Iterable[Row], dataset: DatasetSettings) -> Iterator[Row]:
        """Count the rows of the files and note the columns that nothing reads, before rows are
        joined."""
        for row in rows:
            self.num_rows += 1
            self.ledgers[-1].read += 1
            with suppress(RowError):  # reported where the row is parsed
                value, layout = recognized(row, dataset.fields, dataset.format)
                columns = columns_read(value, layout, dataset.fields)
                self.unread[-1].note(value, columns, layout.names(dataset.fields))
            yield row

    def _name_unread(self) -> None:
        """Report the columns that nothing reads of the data set that was read. A feedback stage's
        own columns are not reported."""
        ledger, columns, absent = self.ledgers[-1], self.unread[-1].names, self.unread[-1].absent
        if absent:
            message = absent_message(ledger.name, absent)
            self.context.worker.report(step=self.num_rows, message=message)
        if columns and isinstance(self.context.stage.inputs[ledger.role], SourceInput):
            message = unread_message(ledger.name, columns)
            self.context.worker.report(step=self.num_rows, message=message)

    def _note_statistics(self) -> None:
        """Report what a policy could learn from the data set that was read beside what is meant."""
        for note in self.statistics[-1].notes():
            message = f"{self.ledgers[-1].name}: {note}"
            self.context.worker.report(step=self.num_rows, message=message)

    def _take(self, outcome: Outcome, source: int, rows: RowWriter, text: IO[str]) -> None:
        """Count what became of a row of the data set that is read, and keep a valid preference."""
        if isinstance(outcome, EncodedPreference):
            self._keep(outcome.preference, outcome.rows, source, rows, text)
        elif isinstance(outcome, Rejected):
            self._reject(*outcome)
        else:
            self.without_preference += 1
            self.ledgers[-1].lose("filtered", NO_PREFERENCE)

    def _keep(
        self,
        preference: Preference,
        encoded: Sequence[Encoded],
        source: int,
        rows: RowWriter,
        text: IO[str],
    ) -> None:
        """Write a preference to the spool, unless one of its rows is too long."""
        longest = max(len(row.ids) for row in encoded)
        tokens = sum(len(row.ids) for row in encoded)
        self.longest = max(self.longest, longest)
        if longest > self.limit:
            self.ledgers[source].lose("dropped", tokens=tokens)
            self.num_too_long += 1
            if len(self.too_long) < FAULTS_SHOWN:
                where = location(preference.file, preference.row)
                self.too_long.append(f"{where}: {longest} tokens")
            return
        self.ledgers[source].keep(tokens)
        self.statistics[source].add(preference, [int(row.mask.sum()) for row in encoded])
        proof = self.proofs.setdefault(source, MaskProof())
        for example, row in zip(preference.examples, encoded, strict=True):
            proof.add(example, [row], self.encoder)
            rows.append(row.ids, row.mask, source)
        self.sizes.append(len(encoded))
        self.labels.append(preference.label)
        reasoning = self.encoder.reasoning
        turns = template_turns(preference.prompt, reasoning=reasoning)
        written = [
            template_turns((*preference.prompt, completion), reasoning=reasoning)[-1]
            for completion in preference.completions
        ]
        key = json.dumps(turns, ensure_ascii=False).encode("utf-8", "replace")
        content = hashlib.blake2b(key, digest_size=8, key=str(self.settings.seed).encode())
        self.prompts.append(int.from_bytes(content.digest(), "little"))
        line: dict[str, Any] = {
            "prompt": turns,
            "answers": [turn_text(turn) for turn in written],
            "label": preference.label,
        }
        if any(len(turn) > 2 for turn in written):  # more than role and content
            line["turns"] = written
        if preference.tools:
            line["tools"] = list(preference.tools)
        text.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _reject(self, fault: str, where: str, why: str, tokens: int = 0) -> None:
        """Count a row of the data set that is read."""
        self.faults[fault] += 1
        self.ledgers[-1].lose("invalid", fault, tokens=tokens)
        examples = self.examples.setdefault(fault, [])
        if len(examples) < FAULTS_SHOWN:
            examples.append(f"{where}: {why}")

    def _name(self, index: int) -> str:
        """Return the manifest path of a data set."""
        source = self.context.stage.inputs[f"preferences.{index}"]
        path = source.path if isinstance(source, SourceInput) else source.stage
        return path.removesuffix(".uri") or f"preferences.{index}"

    # ---- checks -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise StageError InvalidPreferences, RowTooLong, EmptyData or OneSided."""
        rejected = sum(self.faults.values())
        tolerated = self.settings.on_invalid_row == "skip"
        if rejected and (not tolerated or rejected > MAX_SKIPPED * self.num_rows):
            raise self._invalid(rejected)
        if self.too_long and self.settings.on_overlength == "error":
            raise StageError(
                "RowTooLong",
                f"{self.num_too_long} of {self.num_rows} preferences are longer than {self.limit} "
                f"tokens: {'; '.join(self.too_long)}.",
                advice="Raise spec.preferences.maxLength, or set spec.preferences.onOverlength: "
                "drop.",
            )
        if not self.sizes:
            raise StageError(
                "EmptyData",
                f"none of {self.num_rows} rows is left: {rejected} are skipped, "
                f"{self.without_preference} state no preference, {self.num_too_long} are longer "
                f"than {self.limit} tokens.",
                advice="Add rows to spec.preferences, or raise spec.preferences.maxLength.",
            )
        for source, proof in self.proofs.items():
            proof.check(self._name(source), self.encoder)
        if self.settings.labeled:
            _require_both_labels(np.array(self.labels), "completions")

    def _invalid(self, rejected: int) -> StageError:
        counts = ", ".join(f"{count} {fault}" for fault, count in self.faults.most_common())
        examples = "; ".join(lines[0] for lines in self.examples.values())
        misread = rejected > MAX_SKIPPED * self.num_rows
        return StageError(
            "InvalidPreferences",
            f"{rejected} of {self.num_rows} rows state no preference: {counts}. {examples}.",
            advice=SHAPES if misread else REPAIR,
        )

    # ---- split --------------------------------------------------------------------------------

    def _assign_splits(self, spool: Path) -> dict[str, int]:
        """Write the splits. Returns the number of groups of each."""
        held = self._held_out()
        labels = np.array(self.labels, dtype=np.float32)
        if self.settings.labeled:
            _require_both_labels(labels[~held], "training completions")
            _require_two_prompts(self.prompts, held)
        starts = np.concatenate(([0], np.cumsum(self.sizes)))
        with (
            (spool / "texts").open(encoding="utf-8") as lines,
            RowWriter(self.context.workdir, "train") as train,
            RowWriter(self.context.workdir, "validation") as validation,
            (self.context.workdir / "validation.jsonl").open("w", encoding="utf-8") as texts,
        ):
            for group, line in enumerate(lines):
                if group % BLOCK_ROWS == 0:
                    # Mapped anew for each block: pages that were read leave the process with it.
                    spooled = Rows.open(spool, "all")
                if spooled is None:
                    raise TypeError("no rows were spooled")
                writer = validation if held[group] else train
                first, end = int(starts[group]), int(starts[group + 1])
                for row in range(first, end):
                    writer.append(spooled.ids(row), spooled.mask(row), int(spooled.source[row]))
                tokens = slice(int(spooled.offsets[first]), int(spooled.offsets[end]))
                self.ledgers[int(spooled.source[first])].settle(
                    "heldOut" if held[group] else "trained",
                    rows=1,
                    tokens=tokens.stop - tokens.start,
                    targets=int(spooled.flat_mask[tokens].sum()),
                    sequences=end - first,
                )
                if held[group]:
                    texts.write(line)
        sizes = np.array(self.sizes)
        write_groups(self.context.workdir, "train", sizes[~held], labels[~held])
        write_groups(self.context.workdir, "validation", sizes[held], labels[held])
        return {"train": int((~held).sum()), "validation": int(held.sum())}

    def _held_out(self) -> NDArray[np.bool_]:
        """Return which groups are held out (G,): all groups of a prompt, or none of them."""
        prompts = np.array(self.prompts, dtype=np.uint64)
        if not self.settings.held_out:
            return np.zeros(len(prompts), dtype=np.bool_)
        if len(np.unique(prompts)) < 2:
            raise StageError(
                "TooFewRows",
                f"no prompt can be held out: all {len(prompts)} preferences have the same prompt.",
                advice="Add preferences with other prompts, or set spec.preferences.heldOut: 0.",
            )
        return held_out(prompts, self.settings.held_out)

    def _metrics(self, counts: Mapping[str, int]) -> dict[str, float]:
        train = Rows.open(self.context.workdir, "train")
        if train is None:
            raise TypeError("no training rows were written")
        return {
            "rows": float(self.num_rows),
            "preferences": float(counts["train"]),
            "heldOutPreferences": float(counts["validation"]),
            "prompts": float(len(np.unique(np.asarray(self.prompts)))),
            "sequences": float(len(train)),
            "tokens": float(len(train.tokens)),
            "longestRow": float(self.longest),
            "skippedRows": float(sum(self.faults.values())),
            "droppedRows": float(self.num_too_long),
            **Ledger.total(self.ledgers).metrics(),
            "ties": float(sum(label == 0.5 for label in self.labels)),
        }

    def _write_summary(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> None:
        """Write `data.json`, the last file: its presence marks the output as complete."""
        summary = {
            "method": "pairs",
            "labeled": self.settings.labeled,
            "maxLength": self.limit,
            "weights": [dataset.weight for dataset in self.settings.preferences],
            "chatTemplate": self.encoder.tokenizer.chat_template,
            "metrics": metrics,
            **details,
        }
        text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False)
        (self.context.workdir / "data.json").write_text(text + "\n", encoding="utf-8")


def _clear(workdir: Path) -> None:
    """Remove the files of this stage, which a killed or failed run leaves behind."""
    (workdir / "data.json").unlink(missing_ok=True)
    (workdir / "validation.jsonl").unlink(missing_ok=True)
    for name in SPLITS:
        remove_groups(workdir, name)
    for folder in (_SPOOL, "tokenizer"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def _require_both_labels(labels: NDArray[np.floating[Any]], what: str) -> None:
    """Raise StageError OneSided if all labels are good or all are bad: KTO weighs both kinds."""
    if labels.size and len(np.unique(labels)) < 2:
        raise StageError(
            "OneSided",
            f"all {len(labels)} {what} are labeled {'good' if labels[0] else 'bad'}, and kto needs "
            "both labels.",
            advice="Add completions with the other label, or set another spec.optimize.dpo.loss.",
        )


def _require_two_prompts(prompts: Sequence[int], held: NDArray[np.bool_]) -> None:
    """Raise StageError TooFewRows if the rows that are not `held` out have one prompt only: KTO
    compares each prompt with completions of other prompts."""
    trained = np.array(prompts, dtype=np.uint64)[~held]
    if len(np.unique(trained)) < 2:
        raise StageError(
            "TooFewRows",
            f"all {len(trained)} training completions have the same prompt, and kto compares each "
            "prompt with completions of other prompts.",
            advice="Add rows with other prompts to spec.preferences"
            + (", or set spec.preferences.heldOut: 0." if held.any() else "."),
        )
