"""pairs: reads preferences, checks every row, holds prompts out, and leaves tokens on disk
(`preferences`), `validation.jsonl` and `tokenizer/`.

All answers to one prompt lie on one side of the split. One pass over the data; memory holds a batch
and some 40 bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import DatasetSettings, PairsSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.example import Example
from tuneyard_trainer.data.prepared import SPLITS, Rows, RowWriter
from tuneyard_trainer.data.rows import Row, data_files, read_rows
from tuneyard_trainer.data.splits import held_out
from tuneyard_trainer.data.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import sequence_limit
from tuneyard_trainer.preference.dataset import remove_groups, write_groups
from tuneyard_trainer.preference.rows import Judged, PreferenceError, judged
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome

BATCH_ROWS = 256
FAULTS_SHOWN = 3
SKIPPED_AT_MOST = 0.5
"""Share of a job's preferences that onInvalidRow: skip may leave out: with more the format is
misread, not a row broken."""
_SPOOL = ".spool"
REPAIR = "Repair these rows, or set spec.preferences.onInvalidRow: skip."
SHAPES = (
    "A row needs prompt, chosen and rejected; or prompt and answers (best first); or prompt, "
    "completion and label (for kto). Name another prompt field in spec.preferences.data[].fields."
)


def run(context: StageContext) -> StageOutcome:
    """Leaves the files that `preferences` describes."""
    settings = context.settings(PairsSettings)
    _clear(context.workdir)
    try:
        return _Reading.of(context, settings).outcome()
    except (StageError, OSError):  # a full disk, too
        _clear(context.workdir)
        raise


@dataclass
class _Reading:
    """The preferences as they are read."""

    context: StageContext
    settings: PairsSettings
    encoder: Encoder
    limit: int
    """The longest row, in tokens."""
    num_rows: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Rows refused, by reason."""
    shown: dict[str, list[str]] = field(default_factory=dict)
    """The first rows refused for each reason."""
    too_long: list[str] = field(default_factory=list)
    """The groups with a row longer than `limit`."""
    longest: int = 0
    sizes: array[int] = field(default_factory=lambda: array("l"))
    labels: array[float] = field(default_factory=lambda: array("f"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of each group's prompt."""

    @classmethod
    def of(cls, context: StageContext, settings: PairsSettings) -> _Reading:
        tokenizer = base.load_tokenizer(context.inputs["model"])
        if settings.chat.chat_template is not None:
            tokenizer.chat_template = settings.chat.chat_template
        limit = sequence_limit(
            context.inputs["model"], tokenizer, settings.max_length, "spec.preferences.maxLength"
        )
        encoder = Encoder(tokenizer, "last-assistant", settings.chat.system_prompt)
        return cls(context, settings, encoder, limit)

    def outcome(self) -> StageOutcome:
        spool = self.context.workdir / _SPOOL
        spool.mkdir(parents=True)
        with RowWriter(spool, "all") as rows, (spool / "texts").open("w", encoding="utf-8") as text:
            for index, dataset in enumerate(self.settings.preferences):
                for batch in self._batches(index, dataset):
                    for one, encoded in self._encoded(batch):
                        self._keep(one, encoded, index, rows, text)
        self._check()
        counts = self._deal(spool)
        shutil.rmtree(spool)
        self.encoder.tokenizer.save_pretrained(self.context.workdir / "tokenizer")
        metrics = self._metrics(counts)
        details = {"skippedBy": dict(self.faults), "faults": self.shown, "maxLength": self.limit}
        self._write_summary(metrics, details)
        return StageOutcome(metrics, details)

    # ---- rows ---------------------------------------------------------------------------------

    def _batches(self, index: int, dataset: DatasetSettings) -> Iterator[list[Judged]]:
        """What the rows of one data set state, some hundred rows at a time."""
        rows = islice(_rows(self.context.inputs[f"preferences.{index}"]), dataset.limit)
        while chunk := list(islice(rows, BATCH_ROWS)):
            if self.context.worker.stop():
                raise Interrupted(self.context.stage.name, self.num_rows)
            self.num_rows += len(chunk)
            yield [one for row in chunk for one in self._judged(row, dataset)]
            self.context.worker.report(step=self.num_rows, message=f"reading {self._name(index)}")

    def _judged(self, row: Row, dataset: DatasetSettings) -> list[Judged]:
        try:
            return judged(row, dataset.fields, labeled=self.settings.labeled)
        except PreferenceError as error:
            self._refuse(error.fault, f"{row.file} row {row.number}".strip(), str(error))
            return []

    def _encoded(self, batch: Sequence[Judged]) -> Iterator[tuple[Judged, list[Encoded]]]:
        """Each with its rows, one for each answer; what does not fit is counted."""
        examples = [example for one in batch for example in one.examples]
        encoded = iter(self.encoder.encode(_by_template(examples, self.encoder)))
        for one in batch:
            found = [next(encoded) for _ in one.answers]
            where = f"{one.file} row {one.row}".strip()
            misfit = next((row for row in found if isinstance(row, Misfit)), None)
            rows = [_to_stop_token(row) for row in found if isinstance(row, Encoded)]
            if misfit is not None:
                self._refuse("ChatTemplate", where, misfit.message)
            elif not all(row.mask.any() for row in rows):
                self._refuse("EmptyCompletion", where, "no token of an answer is left")
            elif len({row.ids.tobytes() for row in rows}) < len(rows):
                self._refuse("IdenticalSides", where, "two answers are the same tokens")
            else:
                yield one, rows

    def _keep(
        self, one: Judged, encoded: Sequence[Encoded], source: int, rows: RowWriter, text: Any
    ) -> None:
        longest = max(len(row.ids) for row in encoded)
        self.longest = max(self.longest, longest)
        if longest > self.limit:
            self.too_long.append(f"{one.file} row {one.row}".strip() + f": {longest} tokens")
            return
        for row in encoded:
            rows.append(row.ids, row.mask, source)
        self.sizes.append(len(encoded))
        self.labels.append(one.label)
        turns = [{"role": turn.role, "content": turn.content} for turn in one.prompt]
        key = json.dumps(turns, ensure_ascii=False).encode("utf-8", "replace")
        content = hashlib.blake2b(key, digest_size=8, key=str(self.settings.seed).encode())
        self.prompts.append(int.from_bytes(content.digest(), "little"))
        line = {"prompt": turns, "answers": list(one.answers), "label": one.label}
        text.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _refuse(self, fault: str, where: str, why: str) -> None:
        self.faults[fault] += 1
        shown = self.shown.setdefault(fault, [])
        if len(shown) < FAULTS_SHOWN:
            shown.append(f"{where}: {why}")

    def _name(self, index: int) -> str:
        source = self.context.stage.inputs[f"preferences.{index}"]
        path = source.path if isinstance(source, SourceInput) else source.stage
        return path.removesuffix(".uri") or f"preferences.{index}"

    # ---- verdict ------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raises StageError InvalidPreferences, RowTooLong or EmptyData."""
        refused = sum(self.faults.values())
        tolerated = self.settings.on_invalid_row == "skip"
        if refused and (not tolerated or refused > SKIPPED_AT_MOST * self.num_rows):
            raise self._invalid(refused)
        if self.too_long and self.settings.on_overlength == "error":
            raise StageError(
                "RowTooLong",
                f"{len(self.too_long)} of {self.num_rows} preferences are longer than {self.limit} "
                f"tokens: {'; '.join(self.too_long[:FAULTS_SHOWN])}.",
                advice="Raise spec.preferences.maxLength, or set spec.preferences.onOverlength: "
                "drop.",
            )
        if not self.sizes:
            raise StageError(
                "EmptyData",
                f"no preference is left of {self.num_rows} rows: {refused} skipped, "
                f"{len(self.too_long)} longer than {self.limit} tokens.",
                advice="Put more into spec.preferences, or raise spec.preferences.maxLength.",
            )
        if self.settings.labeled and len(set(self.labels)) < 2:
            raise StageError(
                "OneSided",
                f"all {len(self.labels)} answers have thumbs "
                f"{'up' if self.labels[0] else 'down'}, so there is nothing to tell apart.",
                advice="Bring answers of both kinds, or choose another spec.optimize.dpo.loss.",
            )

    def _invalid(self, refused: int) -> StageError:
        counts = ", ".join(f"{count} {fault}" for fault, count in self.faults.most_common())
        shown = "; ".join(line for lines in self.shown.values() for line in lines[:1])
        hopeless = refused > SKIPPED_AT_MOST * self.num_rows
        return StageError(
            "InvalidPreferences",
            f"{refused} of {self.num_rows} rows state no preference: {counts}. {shown}.",
            advice=SHAPES if hopeless else REPAIR,
        )

    # ---- split --------------------------------------------------------------------------------

    def _deal(self, spool: Path) -> dict[str, int]:
        """Writes the splits; the number of groups in each."""
        held = self._held_out()
        spooled = Rows.open(spool, "all")
        if spooled is None:
            raise TypeError("preferences without rows")
        starts = np.concatenate(([0], np.cumsum(self.sizes)))
        with (
            (spool / "texts").open(encoding="utf-8") as lines,
            RowWriter(self.context.workdir, "train") as train,
            RowWriter(self.context.workdir, "validation") as validation,
            (self.context.workdir / "validation.jsonl").open("w", encoding="utf-8") as texts,
        ):
            for group, line in enumerate(lines):
                writer = validation if held[group] else train
                for row in range(starts[group], starts[group + 1]):
                    writer.append(spooled.ids(row), spooled.mask(row), int(spooled.source[row]))
                if held[group]:
                    texts.write(line)
        sizes, labels = np.array(self.sizes), np.array(self.labels, dtype=np.float32)
        write_groups(self.context.workdir, "train", sizes[~held], labels[~held])
        write_groups(self.context.workdir, "validation", sizes[held], labels[held])
        return {"train": int((~held).sum()), "validation": int(held.sum())}

    def _held_out(self) -> NDArray[np.bool_]:
        """(G,) which groups: all of a prompt's, or none."""
        prompts = np.array(self.prompts, dtype=np.uint64)
        if not self.settings.held_out:
            return np.zeros(len(prompts), dtype=np.bool_)
        if len(np.unique(prompts)) < 2:
            raise StageError(
                "TooFewRows",
                f"no prompt can be held out: all {len(prompts)} preferences are on one prompt.",
                advice="Bring preferences on more prompts, or set spec.preferences.heldOut: 0.",
            )
        return held_out(prompts, self.settings.held_out)

    def _metrics(self, counts: Mapping[str, int]) -> dict[str, float]:
        train = Rows.open(self.context.workdir, "train")
        if train is None:
            raise TypeError("prepared no training rows")
        return {
            "rows": float(self.num_rows),
            "preferences": float(counts["train"]),
            "heldOutPreferences": float(counts["validation"]),
            "prompts": float(len(set(self.prompts))),
            "sequences": float(len(train)),
            "tokens": float(len(train.tokens)),
            "longestRow": float(self.longest),
            "skippedRows": float(sum(self.faults.values())),
            "droppedRows": float(len(self.too_long)),
            "ties": float(sum(label == 0.5 for label in self.labels)),
        }

    def _write_summary(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> None:
        """`data.json`, last of all: it says that the rest is whole."""
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
    """Removes what this stage writes: a killed run may have left some, and a failed one does."""
    (workdir / "data.json").unlink(missing_ok=True)
    (workdir / "validation.jsonl").unlink(missing_ok=True)
    for name in SPLITS:
        remove_groups(workdir, name)
    for folder in (_SPOOL, "tokenizer"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def _rows(path: Path) -> Iterator[Row]:
    for name, file in data_files(path):
        for row in read_rows(file):
            yield Row(row.number, row.value, name)


def _by_template(examples: Sequence[Example], encoder: Encoder) -> list[Example]:
    """As conversations where the tokenizer has a chat template, else as prompt and completion."""
    if encoder.tokenizer.chat_template:
        return list(examples)
    return [
        Example(e.row, "completion", e.messages, e.prompt, e.completion, file=e.file)
        for e in examples
    ]


def _to_stop_token(row: Encoded) -> Encoded:
    """Without what a template writes after the answer's last token: nobody judged that."""
    targets = np.flatnonzero(row.mask)
    end = int(targets[-1]) + 1 if len(targets) else len(row.ids)
    return Encoded(row.ids[:end], row.mask[:end])
