"""prepare: read the data sets, check every row, hold some out, and write tokens (`prepared`).

The stage reads the data once, in batches. Memory holds the batches in flight; what is kept of each
row is in files. The choice of held-out rows and of duplicates, which follows, holds up to 100 bytes
a row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.batches import BatchEncoder
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.findings import Finding
from tuneyard_trainer.data.cleaning.text import written
from tuneyard_trainer.data.encoding.middle import Markers, MiddleFiller
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.leak_check import check_leaks
from tuneyard_trainer.data.ledger import SPLIT_OUTCOMES, Ledger, ledger_details
from tuneyard_trainer.data.mixing import mixed_weights, mixture
from tuneyard_trainer.data.parallel import Pool, num_processes
from tuneyard_trainer.data.prepared import GAPS, GENERAL, GUARD, SPLITS, Rows, remove_split
from tuneyard_trainer.data.preprocessing import Preprocessor
from tuneyard_trainer.data.retrieval import Contexts
from tuneyard_trainer.data.scratch import remove_scratch
from tuneyard_trainer.data.splits import (
    HELD_OUT,
    REPEATED,
    TRAIN,
    Codes,
    Place,
    SplitWriter,
    assign_splits,
    grouped,
    held_out,
    num_contaminated,
)
from tuneyard_trainer.data.tally import OVERLENGTH_OUTCOMES, Tally
from tuneyard_trainer.data.texts import EXAMPLES
from tuneyard_trainer.data.toxicity import Toxicity
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import sequence_limit
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

_SPOOL = ".spool"
_TEXTS = "validation.jsonl"
MAX_EXAMPLES = 64
"""Training rows that are kept as text: as many as `evaluate.fewShot` can ask for."""


def run(context: StageContext) -> StageOutcome:
    """Write the files that `prepared` describes, `validation.jsonl`, `examples.jsonl` and
    `tokenizer/`."""
    settings = context.settings(PrepareSettings)
    _clear(context.workdir)
    try:
        return _prepare(context, settings)
    except (StageError, OSError):  # a full disk, too
        _clear(context.workdir)
        raise


def _prepare(context: StageContext, settings: PrepareSettings) -> StageOutcome:
    tokenizer = _tokenizer(context.inputs["model"], settings)
    limit = sequence_limit(
        context.inputs["model"], tokenizer, settings.max_length, "spec.data.maxLength"
    )
    encoder = _encoder(tokenizer, settings)
    contexts = _contexts(context, settings, encoder, limit)
    toxicity = Toxicity.of(context)
    batches = BatchEncoder(settings, encoder, limit, Cleaner.of(settings.clean), contexts, toxicity)
    filler = _filler(tokenizer, settings, limit)
    # A classifier has threads of its own, and torch is in this process alone.
    pool = Pool(batches, 1 if toxicity else num_processes(), lambda batch: batch.size)
    preprocessor = Preprocessor(
        context.stage, settings, context.inputs, context.worker, batches, pool
    )
    splits = _write_splits(preprocessor, context.workdir, filler)
    tokenizer.save_pretrained(context.workdir / "tokenizer")
    tallies = preprocessor.tallies
    ledgers = {tally.role: tally.ledger for tally in tallies}
    _settle(ledgers, splits, context.workdir)
    leaks = None
    if settings.leaks != "off" and len(splits.validation):
        leaks = check_leaks(
            splits.validation,
            splits.read,
            splits.codes == TRAIN,
            {tally.role: tally.name for tally in tallies},
            fails=settings.leaks == "error",
            report=context.worker.report,
        )
    _write_examples(splits, context.workdir, _num_own(settings))
    augmented = preprocessor.originals.details(splits.codes, splits.read)
    shutil.rmtree(context.workdir / _SPOOL, ignore_errors=True)
    train = Rows.open(context.workdir, "train")
    if train is None:
        raise TypeError("prepared no training rows")
    metrics = _metrics(train, tallies)
    details: dict[str, Any] = {
        "datasets": [tally.details() for tally in tallies],
        "ledger": ledger_details(ledgers.values()),
    }
    if settings.clean is not None:
        details["cleaning"] = preprocessor.findings.details()
    if leaks is not None:
        details["leaks"] = leaks
        metrics["leakedRows"] = leaks["rows"]
    if contexts is not None:
        contexts.counts.update(preprocessor.contexts)  # each batch leaves them empty
        details["retrieval"] = contexts.details()
        context.worker.report(message=contexts.sentence)
    if settings.validation:
        trained = splits.read.hashes[splits.codes == TRAIN]
        contaminated = num_contaminated(trained, splits.validation.hashes)
        details["contaminated"] = contaminated
        _warn_contaminated(contaminated, len(splits.validation), context.worker)
    if filler:
        found = filler.details()  # before the gaps of held-out documents are counted with them
        gaps = filler.write_gaps(context.workdir / _TEXTS, context.workdir)
        details["fillInTheMiddle"] = found | {"gaps": gaps}
    if settings.augmented:
        details["augmented"] = augmented
        metrics["augmentedRows"] = sum(each["rows"] for each in augmented)
    counts = [ledgers[f"train.{i}"].sequences["trained"] for i in range(len(settings.train))]
    weights = _weights(settings, counts)
    details["mixture"] = mixture(counts, weights, [tally.name for tally in tallies])
    _write_summary(context.workdir, settings, tokenizer, limit, weights, metrics, details)
    faults = {tally.name: tally.faults for tally in tallies if tally.faults}
    return StageOutcome(metrics, {**details, "maxLength": limit, "faults": faults})


class _Splits(NamedTuple):
    """The closed writers of the splits."""

    train: SplitWriter
    validation: SplitWriter
    read: SplitWriter
    """The writer of all training rows as they were read, with their texts if anything compares
    them."""
    codes: Codes
    """(R,) the outcome of each row of `read`."""
    general: Mapping[str, SplitWriter]
    """The writers of `general` and `guard`, where the job has them."""


def _write_splits(
    preprocessor: Preprocessor, workdir: Path, filler: MiddleFiller | None
) -> _Splits:
    """Write the splits train and validation.

    Rows are held out, duplicates found and augmented rows left out with their originals only after
    all rows are read, and held-out documents have no gaps. Until then the rows are in a spool
    folder, if the job asks for one of the four.
    """
    settings, seed = preprocessor.settings, preprocessor.settings.seed
    fraction, spool = settings.validation_fraction, workdir / _SPOOL
    deduplicated = settings.clean is not None and settings.clean.duplicates is not None
    spooled = bool(fraction is not None or deduplicated or filler or settings.augmented)
    is_shown = settings.method == "sft"  # as worked examples of an evaluation
    compared = spooled or (bool(settings.validation) and (is_shown or settings.leaks != "off"))
    texts = spool / "train.jsonl" if compared else None
    folder = spool if spooled else workdir
    general: dict[str, SplitWriter] = {}
    folder.mkdir(parents=True, exist_ok=True)
    seen, held_seen = _duplicates(settings, folder), _duplicates(settings, folder)
    with preprocessor.pool:
        with SplitWriter(folder, "train", seed, texts=texts) as read:
            preprocessor.read("train", settings.train, read, seen)
        with SplitWriter(folder, "validation", seed, texts=folder / _TEXTS) as held_read:
            preprocessor.read("validation", settings.validation, held_read, held_seen)
        for split, datasets in ((GENERAL, settings.general), (GUARD, settings.guard)):
            if datasets:
                with SplitWriter(workdir, split, seed, texts=None) as writer:
                    preprocessor.read(split, datasets, writer)
                general[split] = writer
    preprocessor.check()
    codes = np.full(len(read), TRAIN, dtype=np.int8)
    if not spooled:
        return _Splits(read, held_read, read, codes, general)
    _remove_duplicates(codes, read, seen, preprocessor, "train")
    if fraction is not None:
        left = (codes == TRAIN) & (read.sources < _num_own(settings))
        groups = grouped(read.hashes[left], read.prompts[left])
        codes[left] = np.where(held_out(groups, fraction), HELD_OUT, TRAIN)
    _leave_out_augmented(codes, read, held_read, preprocessor)
    held_codes = np.full(len(held_read), HELD_OUT, dtype=np.int8)
    _remove_duplicates(held_codes, held_read, held_seen, preprocessor, "validation")
    with (
        SplitWriter(workdir, "train", seed, texts=None) as train,
        SplitWriter(workdir, "validation", seed, texts=workdir / _TEXTS) as validation,
    ):
        change = None if filler is None else partial(_filled, filler, preprocessor.tallies)
        assign_splits(read, codes, {TRAIN: train, HELD_OUT: validation}, change)
        if settings.validation:
            assign_splits(held_read, held_codes, {HELD_OUT: validation})
    return _Splits(train, validation, read, codes, general)


def _write_examples(splits: _Splits, workdir: Path, num_own: int) -> None:
    """Write training rows with a prompt, which an evaluation can show as worked examples.

    They are the job's own rows with the least hashes, which are seeded, without those whose prompt
    is held out. Nothing is written if no rows are held out, or if there are no such rows.
    """
    read = splits.read
    if read.texts is None or not len(splits.validation):
        return
    usable = (splits.codes == TRAIN) & (read.sources < num_own)
    usable &= ~np.isin(read.prompts, splits.validation.prompts)
    rows = np.flatnonzero(usable)
    _, first = np.unique(read.hashes[rows], return_index=True)  # sorted, each row once
    chosen = rows[first[:MAX_EXAMPLES]].tolist()
    lines = [read.texts.line(row) for row in chosen if "text" not in read.texts[row]]
    if lines:
        (workdir / EXAMPLES).write_bytes(b"".join(lines))


def _leave_out_augmented(
    codes: Codes, read: SplitWriter, held_read: SplitWriter, preprocessor: Preprocessor
) -> None:
    """Set the codes of the augmented rows that must not be trained on, and count them."""
    tally = next((tally for tally in preprocessor.tallies if tally.augmented), None)
    if tally is None:
        return
    for rule, rows, tokens in preprocessor.originals.leave_out(codes, read, held_read.prompts):
        tally.ledger.settle("filtered", rule, rows=rows, tokens=tokens)


def _num_own(settings: PrepareSettings) -> int:
    """Return the number of training data sets that are the job's own: neither replayed data nor
    augmented rows."""
    replayed = settings.replay.datasets if settings.replay else 0
    return len(settings.train) - replayed - bool(settings.augmented)


def _filler(
    tokenizer: PreTrainedTokenizerBase, settings: PrepareSettings, limit: int
) -> MiddleFiller | None:
    wanted = settings.fill_in_the_middle
    if wanted is None:
        return None
    markers = Markers.of(tokenizer, wanted)
    return MiddleFiller(tokenizer, wanted, markers, limit, settings.seed)


def _filled(
    filler: MiddleFiller,
    tallies: Sequence[Tally],
    text: Mapping[str, Any],
    pieces: list[Encoded],
    place: Place,
) -> list[Encoded]:
    """Return the sequences of a training row: of a document, some with their middle last."""
    if "text" not in text:
        return pieces
    changed = filler.pieces(text["text"], pieces)
    added = sum(len(piece.ids) for piece in changed) - sum(len(piece.ids) for piece in pieces)
    tallies[place.source].ledger.added_tokens += added  # the training data sets come first
    return changed


def _weights(settings: PrepareSettings, counts: Sequence[int]) -> list[float]:
    """Return how often an epoch contains each row of each training data set. `counts`: its
    sequences."""
    if not any(counts[: _num_own(settings)]):
        raise StageError(
            "EmptyData",
            "no row of spec.data.train is left for training: all rows to train on are those of "
            "spec.data.replay.",
            advice="Repair or add rows, or remove rules from spec.data.clean.",
        )
    weights = mixed_weights(
        counts,
        [dataset.weight for dataset in settings.train],
        temperature=settings.temperature,
        replayed=settings.replay.datasets if settings.replay else 0,
        augmented=bool(settings.augmented),
        share=settings.replay.share if settings.replay else 0.0,
    )
    if not any(round(weight * n) for weight, n in zip(weights, counts, strict=True)):
        shown = ", ".join(f"{weight:g} of {n}" for weight, n in zip(weights, counts, strict=True))
        raise StageError(
            "EmptyData",
            f"an epoch has no sequence: the weights and sequences of spec.data.train are {shown}.",
            advice="Raise the weight, or add rows.",
        )
    return weights


def _duplicates(settings: PrepareSettings, folder: Path) -> Duplicates | None:
    """Return a new search for duplicates, with its scratch files in a folder. None: the job does
    not ask for one."""
    clean = settings.clean
    if clean is None or clean.duplicates is None:
        return None
    return Duplicates(clean.duplicates, clean.similarity, folder)


def _remove_duplicates(
    codes: Codes,
    read: SplitWriter,
    duplicates: Duplicates | None,
    preprocessor: Preprocessor,
    split: str,
) -> None:
    """Set the codes of the rows that repeat an earlier row, and count them."""
    rows = Rows.open(read.folder, read.split)
    if duplicates is None or rows is None or read.texts is None:
        return
    tallies = {tally.role: tally for tally in preprocessor.tallies}
    ends = np.cumsum(read.num_pieces)
    for found in duplicates.found(read.texts.__getitem__):
        codes[found.row] = REPEATED
        place, earlier = read.place(found.row), read.place(found.of)
        tally, of = tallies[f"{split}.{place.source}"], tallies[f"{split}.{earlier.source}"]
        count, end = int(read.num_pieces[found.row]), int(ends[found.row])
        tokens = int(rows.offsets[end] - rows.offsets[end - count])
        tally.ledger.settle("duplicate", found.kind, rows=1, tokens=tokens)
        note = f"{found.similarity:.0%} as in {of.name} {earlier}"
        text = written(read.texts[found.row])[1]
        finding = Finding(f"duplicates.{found.kind}", "removed", text, note=note)
        preprocessor.findings.add(finding, f"{tally.name} {place}")


# ---- ledger -----------------------------------------------------------------------------------


def _settle(ledgers: Mapping[str, Ledger], splits: _Splits, workdir: Path) -> None:
    """Count the written rows in the ledgers of their data sets, and check that they balance.

    Held-out rows come from data sets of their own, or else from the training data sets.
    """
    roles = {role.partition(".")[0] for role in ledgers}
    own = zip(SPLITS, (splits.train, splits.validation), strict=True)
    writers = {**dict(own), **splits.general}
    for split, writer in writers.items():
        origin = split if split in roles else "train"
        mine = dict(_numbered(ledgers, origin))
        for index, ledger in mine.items():
            rows = int((writer.sources == index).sum())
            ledger.settle(SPLIT_OUTCOMES[split], rows=rows, tokens=0)
        for block in Rows.blocks(workdir, split):
            for index, ledger in mine.items():
                chosen = block.source == index
                ledger.settle(
                    SPLIT_OUTCOMES[split],
                    rows=0,
                    tokens=int(block.lengths[chosen].sum()),
                    targets=int(block.targets[chosen].sum()),
                    sequences=int(chosen.sum()),
                )
    for ledger in ledgers.values():
        ledger.check()


def _numbered(ledgers: Mapping[str, Ledger], split: str) -> Iterator[tuple[int, Ledger]]:
    """Yield the ledgers of a split's data sets with the index of each."""
    for role, ledger in ledgers.items():
        name, _, index = role.partition(".")
        if name == split:
            yield int(index), ledger


# ---- settings and files -----------------------------------------------------------------------


def _clear(workdir: Path) -> None:
    """Remove all files of this stage: those of an earlier attempt, or of a failed one."""
    (workdir / "data.json").unlink(missing_ok=True)
    for name in (_TEXTS, EXAMPLES):
        (workdir / name).unlink(missing_ok=True)
    for name in (*SPLITS, GAPS, GENERAL, GUARD):
        remove_split(workdir, name)
    remove_scratch(workdir)
    for folder in (_SPOOL, "tokenizer"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def _tokenizer(model: Path, settings: PrepareSettings) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = base.load_tokenizer(model)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


def _encoder(tokenizer: PreTrainedTokenizerBase, settings: PrepareSettings) -> Encoder:
    """Return the encoder. In pre-training every token is a target."""
    train_on = "all" if settings.method == "pretrain" else settings.train_on
    return Encoder(
        tokenizer, train_on, settings.system_prompt, reasoning=settings.reasoning != "drop"
    )


def _contexts(
    context: StageContext, settings: PrepareSettings, encoder: Encoder, limit: int
) -> Contexts | None:
    """Return what puts a context before questions. None: the job asks for none."""
    if settings.retrieval is None:
        return None
    source = context.stage.inputs["documents"]
    name = source.path.removesuffix(".uri") if isinstance(source, SourceInput) else "documents"
    path = context.inputs["documents"]
    context.worker.report(message=f"reading {name}")
    return Contexts.read(path, settings.retrieval, encoder, limit, settings.seed, name)


def _metrics(train: Rows, tallies: Sequence[Tally]) -> dict[str, float]:
    total = Ledger.total(tally.ledger for tally in tallies)
    outcomes = {
        f"{name}Rows": sum(t.outcome(name) for t in tallies) for name in OVERLENGTH_OUTCOMES
    }
    return {
        "rows": total.num_rows("trained"),
        "heldOutRows": total.num_rows("heldOut"),
        "sequences": len(train),
        "tokens": len(train.tokens),
        "targetTokens": total.targets["trained"],
        "longestRow": max(tally.longest for tally in tallies),
        "skippedRows": total.num_rows("invalid"),
        **outcomes,
        "contextOnlyPieces": sum(tally.context_only_pieces for tally in tallies),
        **total.metrics(),
    }


def _warn_contaminated(contaminated: int, num_held_out: int, worker: Worker) -> None:
    if contaminated:
        worker.report(
            message=f"{contaminated} of {num_held_out} held-out rows are also in the training "
            "data, which lowers the held-out loss"
        )


def _write_summary(
    workdir: Path,
    settings: PrepareSettings,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    weights: Sequence[float],
    metrics: Mapping[str, float],
    details: Mapping[str, Any],
) -> None:
    """Write `data.json`, last of all: its presence means that the data is complete."""
    summary = {
        "method": settings.method,
        "maxLength": limit,
        "trainOn": settings.train_on,
        "onOverlength": settings.on_overlength,
        "weights": list(weights),
        "chatTemplate": tokenizer.chat_template,
        "metrics": metrics,
        **details,
    }
    text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False)
    (workdir / "data.json").write_text(text + "\n", encoding="utf-8")
