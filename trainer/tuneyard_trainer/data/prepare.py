"""prepare: read the data sets, check every row, hold some out, and write tokens (`prepared`).

The stage reads the data once, in batches: memory holds one batch and about 30 bytes a row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import PrepareSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import SPLITS, Rows, remove_split
from tuneyard_trainer.data.preprocessing import OVERLENGTH_OUTCOMES, Preprocessor, Tally
from tuneyard_trainer.data.retrieval import Contexts
from tuneyard_trainer.data.splits import SplitWriter, assign_splits, held_out, num_contaminated
from tuneyard_trainer.data.tokenization import Encoder
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import sequence_limit
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

_SPOOL = ".spool"


def run(context: StageContext) -> StageOutcome:
    """Write the files that `prepared` describes, `validation.jsonl` and `tokenizer/`."""
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
    preprocessor = Preprocessor(
        context.stage,
        settings,
        context.inputs,
        encoder,
        limit,
        context.worker,
        contexts,
    )
    train, validation = _write_splits(preprocessor, context.workdir)
    tokenizer.save_pretrained(context.workdir / "tokenizer")
    metrics = _metrics(context.workdir, preprocessor.tallies, len(validation))
    details: dict[str, Any] = {"datasets": [tally.details() for tally in preprocessor.tallies]}
    if contexts is not None:
        details["retrieval"] = contexts.details()
        context.worker.report(message=contexts.sentence)
    if settings.validation:
        details["contaminated"] = num_contaminated(train.hashes, validation.hashes)
        _warn_contaminated(details["contaminated"], len(validation), context.worker)
    _write_summary(context.workdir, settings, tokenizer, limit, metrics, details)
    faults = {tally.name: tally.faults for tally in preprocessor.tallies if tally.faults}
    return StageOutcome(metrics, {**details, "maxLength": limit, "faults": faults})


def _write_splits(preprocessor: Preprocessor, workdir: Path) -> tuple[SplitWriter, SplitWriter]:
    """Write the splits train and validation, and return their closed writers.

    A fraction can be held out only after all rows are read, so until then the training rows are
    in a spool folder.
    """
    settings, seed = preprocessor.settings, preprocessor.settings.seed
    fraction = settings.validation_fraction
    spool = workdir / _SPOOL
    folder = workdir if fraction is None else spool
    with SplitWriter(folder, "train", seed, texts=fraction is not None) as train:
        preprocessor.read("train", settings.train, train)
    with SplitWriter(workdir, "validation", seed, texts=True) as validation:
        preprocessor.read("validation", settings.validation, validation)
    preprocessor.check()
    if fraction is not None:
        validation = assign_splits(train, held_out(train.hashes, fraction), workdir, seed)
        shutil.rmtree(spool)
    return train, validation


# ---- settings and files -----------------------------------------------------------------------


def _clear(workdir: Path) -> None:
    """Remove all files of this stage: those of an earlier attempt, or of a failed one."""
    (workdir / "data.json").unlink(missing_ok=True)
    (workdir / "validation.jsonl").unlink(missing_ok=True)
    for name in SPLITS:
        remove_split(workdir, name)
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


def _metrics(workdir: Path, tallies: Sequence[Tally], num_held_out: int) -> dict[str, float]:
    train = Rows.open(workdir, "train")
    if train is None:
        raise TypeError("prepared no training rows")
    kept = {split: sum(t.kept for t in tallies if t.role.startswith(split)) for split in SPLITS}
    # Held-out rows come from their own data sets, or else from the training rows.
    rows = kept["train"] - (num_held_out if not kept["validation"] else 0)
    outcomes = {f"{name}Rows": sum(t.counts[name] for t in tallies) for name in OVERLENGTH_OUTCOMES}
    return {
        "rows": rows,
        "heldOutRows": num_held_out,
        "sequences": len(train),
        "tokens": len(train.tokens),
        "targetTokens": int(train.targets.sum()),
        "longestRow": max(tally.longest for tally in tallies),
        "skippedRows": sum(tally.skipped for tally in tallies),
        **outcomes,
        "contextOnlyPieces": sum(tally.counts["contextOnlyPieces"] for tally in tallies),
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
    metrics: Mapping[str, float],
    details: Mapping[str, Any],
) -> None:
    """Write `data.json`, last of all: its presence means that the data is complete."""
    summary = {
        "method": settings.method,
        "maxLength": limit,
        "trainOn": settings.train_on,
        "onOverlength": settings.on_overlength,
        "weights": [dataset.weight for dataset in settings.train],
        "chatTemplate": tokenizer.chat_template,
        "metrics": metrics,
        **details,
    }
    text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False)
    (workdir / "data.json").write_text(text + "\n", encoding="utf-8")
