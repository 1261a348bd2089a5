"""The facts about a job for its report and model card, from the manifest and the stage records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.api.plan import StageRecord
from tuneyard.api.stage_settings import StageKind
from tuneyard_trainer.reporting.formatting import ABSENT, count, number
from tuneyard_trainer.reporting.plots import Curves
from tuneyard_trainer.reporting.preferences import statistic_lines
from tuneyard_trainer.reporting.results import ROW_OUTCOMES, Results, last_trained

PEFT_KINDS = ("lora", "qlora", "prefix", "prompt", "ia3")
"""Adapters that PEFT can load."""
ADAPTER_NAMES = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "ia3": "(IA)³",
    "bottleneck": "bottleneck adapters",
}
METHODS = {
    "pretrain": "continued pre-training",
    "rewardModel": "reward model",
    "constitution": "constitutional AI",
    "distill": "distillation",
}
"""Names of methods. Other methods are abbreviations, shown in capitals."""
TRAINED_BY = {
    "pretrain": "further pre-trained on text",
    "rewardModel": "trained as a reward model on preferences",
    "constitution": "fine-tuned on its own revised completions",
    "dpo": "aligned with DPO on preferences",
    "ppo": "aligned with PPO against a reward",
    "grpo": "aligned with GRPO against a reward",
    "rloo": "aligned with RLOO against a reward",
    "distill": "distilled from a teacher",
}
"""How the base model was trained, by method."""

MADE_BY = {
    "paraphrase": "Paraphrased questions",
    "inversion": "New questions for answers",
    "template": "Questions in templates",
}
"""Names of augmented rows, by what made them."""


@dataclass(frozen=True)
class DataRow:
    """One data set and how many of its rows were used."""

    split: str
    uri: str
    format: str
    rows: int
    """Rows read."""
    kept: int
    outcomes: str
    """Counts of skipped, dropped, truncated and split rows."""


@dataclass(frozen=True)
class Augmented:
    """The augmented rows of one kind that were trained on."""

    heading: str
    """What made them, with the model, and how many there are."""
    samples: list[Mapping[str, str]]
    """The first ones: `where` the original is, its `original` question, the `question` and the
    `answer`."""


@dataclass(frozen=True)
class RunSummary:
    """The facts about a job. Texts are not escaped: the report and the card do that."""

    manifest: Mapping[str, Any]
    """The job's manifest with its defaults, without the secret parts of URIs."""
    records: Mapping[str, StageRecord]
    """By stage name, of the stages that the export reads: the data, the result, the evaluation."""
    stages: Sequence[StageRecord]
    """Of all stages of this run in the order of their times, such as that of a reward model;
    without the export stage, which is running."""
    results: Results
    curves: Curves
    measured: Mapping[str, float]
    """What the checks of the written files measured, by metric."""
    base_license: str | None
    """The base model's license. None: unknown."""
    has_adapter: bool
    has_model: bool
    has_chat_template: bool

    @classmethod
    def of(
        cls,
        folder: Path,
        inputs: Mapping[str, Path],
        manifest: Mapping[str, Any],
        measured: Mapping[str, float],
        base_license: str | None,
    ) -> RunSummary:
        """Return the facts from the export stage's inputs; records may be missing."""
        roles = ("data", "leaks", "tuned", "evaluation")
        found = [_record(inputs[role]) for role in roles if role in inputs]
        records = {record.stage: record for record in found if record is not None}
        stages = _stages_of_run(inputs["tuned"].parent, records)
        searched = {record.stage: record for record in stages if record.kind == "leaks"}
        trained = last_trained(records.values())
        return cls(
            manifest=shareable(manifest),
            records=records,
            stages=stages,
            results=Results.of({**records, **searched}),
            curves=Curves.read(
                inputs["tuned"] / "metrics.jsonl", trained.kind if trained else "sft"
            ),
            measured=measured,
            base_license=base_license,
            has_adapter=(folder / "adapter").is_dir(),
            has_model=(folder / "model").is_dir(),
            has_chat_template=_has_chat_template(inputs),
        )

    @property
    def name(self) -> str:
        """The job's name."""
        return str(self.manifest.get("metadata", {}).get("name", "model"))

    @property
    def spec(self) -> Mapping[str, Any]:
        """The manifest's `spec`."""
        spec: Mapping[str, Any] = self.manifest.get("spec", {})
        return spec

    @property
    def method(self) -> str:
        """The training method; for an alignment, that of its last step."""
        if self.manifest.get("kind") != "AlignmentJob":
            return str(self.spec.get("method", "sft"))
        optimize: Mapping[str, Any] = self.spec.get("optimize") or {}
        if optimize:
            return str(next(iter(optimize)))
        steps = ("rewardModel", "constitution", "sft")
        return next((step for step in steps if self.spec.get(step)), "sft")

    @property
    def is_reward_model(self) -> bool:
        """Whether the exported model scores completions instead of writing them."""
        return self.method == "rewardModel"

    @property
    def base(self) -> str:
        """The base model's URI."""
        return str(self.spec.get("model", {}).get("uri", ""))

    @property
    def hub_id(self) -> str | None:
        """ORG/NAME of the base model. None: it is not from the Hugging Face Hub."""
        found = re.match(r"hf://([^/]+/[^/]+)", self.base)
        return found[1] if found else None

    @property
    def adapter(self) -> str | None:
        """The adapter's kind. None: full fine-tuning."""
        return next(iter(self._adapter_spec), None)

    @property
    def _adapter_spec(self) -> Mapping[str, Any]:
        """The manifest's adapter of the step that produced the result; {}: all weights."""
        train = (self.spec.get("rewardModel") or {}).get("train") or {}
        step = train if self.is_reward_model else self.spec
        return step.get("adapter") or {}

    @property
    def sentence(self) -> str:
        """One sentence: the base model, the method and the adapter."""
        how = ADAPTER_NAMES.get(self.adapter, self.adapter) if self.adapter else "full fine-tuning"
        what = TRAINED_BY.get(self.method, "fine-tuned on examples")
        return f"{self.base or 'A language model'}, {what} with {how}."

    def record(self, *kinds: str) -> StageRecord | None:
        """Return the record of the first stage of one of these kinds. None: there is none."""
        return next((record for record in self.records.values() if record.kind in kinds), None)

    @property
    def is_of_preferences(self) -> bool:
        """Whether the result was trained on preferences, whose rows are completions."""
        return self.record("pairs") is not None

    # ---- sections -------------------------------------------------------------------------------

    @property
    def flips(self) -> list[tuple[str, str]]:
        """How many answers flipped, and McNemar's test of them. []: no answers of both models."""
        evaluation = self.record("evaluate", "assess")
        evidence = evaluation.details.get("evidence", {}) if evaluation else {}
        flips = evidence.get("answerAccuracy", {}).get("flips")
        return flip_lines(flips) if flips else []

    @property
    def datasets(self) -> list[DataRow]:
        """One row for each data set, in the order of the manifest."""
        prepare = self.record("prepare")
        found = prepare.details.get("datasets", []) if prepare else []
        return [self._data_row(value) for value in found]

    def _data_row(self, value: Mapping[str, Any]) -> DataRow:
        split = value["role"].partition(".")[0]
        uri = self.data_uri(value["role"]) or value["name"]
        names = [name for name in ROW_OUTCOMES.values() if value.get(name)]
        use = "training, augmented" if value.get("augmented") else "training"
        return DataRow(
            split=use if split == "train" else "held out",
            uri=uri,
            format=value["format"],
            rows=value["rows"],
            kept=value["kept"],
            outcomes=", ".join(f"{count(value[name])} {name}" for name in names) or ABSENT,
        )

    def source_uri(self, kind: StageKind, role: str) -> str:
        """Return the URI of what a stage of this kind reads in this role; "": another stage wrote
        it."""
        step, spec = self._step(kind), self.spec
        models = {
            "judge": step.get("judge"),
            "reward": spec.get("rewardModel"),
            "reward.independent": spec.get("independentReward"),
            **{f"reward.{i}": term for i, term in enumerate(spec.get("rewardTerms") or [])},
        }
        sources = {
            "model": spec.get("model"),
            "prompts": step.get("prompts"),
            "teacher": step.get("teacher"),
            **{name: (value or {}).get("model") for name, value in models.items()},
        }
        source = sources.get(role)
        return str(source["uri"]) if source else self.data_uri(role)

    def _step(self, kind: StageKind) -> Mapping[str, Any]:
        """Return the part of the manifest that a stage belongs to. {}: there is none."""
        if kind == "feedback":
            step = (self.spec.get("preferences") or {}).get("aiFeedback")
        elif kind == "critique":
            step = self.spec.get("constitution")
        else:
            step = (self.spec.get("optimize") or {}).get(self.method)
        return step or {}

    def data_uri(self, role: str) -> str:
        """Return the URI of the data with a role such as train.0, documents or toxicity; "":
        another stage wrote it."""
        split, _, index = role.partition(".")
        data = self.spec.get("data") or (self.spec.get("sft") or {}).get("data") or {}

        def sets_of(value: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
            return (value.get(name) or {}).get("data") or []

        if role == "documents":
            return str((data.get("retrieval") or {}).get("documents", {}).get("uri", ""))
        if role == "toxicity":
            return str(data["clean"]["toxicity"]["classifier"]["uri"])
        if split == "preferences":
            sets = sets_of(self.spec, "preferences")
        elif split == "train":  # the data of replay come last
            sets = [*(data.get("train") or []), *sets_of(data, "replay")]
        else:
            sets = sets_of(data, "validation")
        if not index.isdigit() or int(index) >= len(sets):
            return ""
        return str(sets[int(index)]["uri"])

    @property
    def data_facts(self) -> list[tuple[str, str]]:
        """Labels and totals over all data sets."""
        prepare = self.record("prepare")
        if prepare is None:
            return []
        labels = {
            "rows": "Training rows",
            "sequences": "Training sequences",
            "tokens": "Training tokens",
            "targetTokens": "Target tokens",
            "heldOutRows": "Held-out rows",
            "longestRow": "Longest row, tokens",
        }
        metrics = prepare.metrics
        facts = [(label, count(metrics[key])) for key, label in labels.items() if key in metrics]
        longest = ("Longest sequence, tokens", str(prepare.details.get("maxLength", ABSENT)))
        return [*facts, longest, *_retrieved(prepare.details), *_filled(prepare.details)]

    @property
    def ledger_counts(self) -> list[tuple[str, int | None, int]]:
        """Each outcome of the prepared or paired rows, with its rows and tokens over all data sets.
        None: the line is about tokens alone. []: the record is of 0.2, or no stage read rows."""
        stage = self.record("prepare", "pairs")
        total = stage.details.get("ledger", {}).get("total") if stage else None
        if total is None:
            return []
        rows, tokens = total["rows"], total["tokens"]
        lines: list[tuple[str, int | None, int]] = [("In", rows["in"], tokens["in"])]
        for outcome in ("invalid", "filtered", "duplicate"):
            lines += [
                (f"{outcome.capitalize()}: {cause}", number, tokens[outcome].get(cause, 0))
                for cause, number in rows[outcome].items()
            ]
        lines += [("Dropped as too long", rows["dropped"], tokens["dropped"])]
        parts = {"Cut off": tokens["cut"], "Pieces without a target": tokens["contextOnly"]}
        lines += [(label, None, part) for label, part in parts.items() if part]
        if tokens.get("added"):
            lines += [("Added for filling in the middle", None, tokens["added"])]
        lines += [("Held out", rows["heldOut"], tokens["heldOut"])]
        general = {"general": "General data against forgetting", "guard": "Watched by the guard"}
        lines += [
            (label, rows[name], tokens[name]) for name, label in general.items() if name in rows
        ]
        lines += [("Trained on", rows["trained"], tokens["trained"])]
        lines += [("of these, context", None, tokens["trained"] - total["targets"]["trained"])]
        return [*lines, *self._packing]

    @property
    def ledger(self) -> list[tuple[str, str, str]]:
        """The lines of `ledger_counts` as text."""
        return [
            (label, "" if number is None else count(number), count(part))
            for label, number, part in self.ledger_counts
        ]

    @property
    def _packing(self) -> list[tuple[str, int, int]]:
        """The rows of batches that the sequences of the first epoch were laid out in, with their
        tokens. []: the last training stage has no record of them."""
        trained = last_trained(self.records.values())
        found = trained.details.get("packing") if trained else None
        if found is None:
            return []
        packed = "Packed" if trained and trained.details["packed"] else "Not packed"
        padding = 1 - found["tokens"] / found["positions"]
        sequences = count(found["sequences"])
        label = f"{packed}: {sequences} sequences of the first epoch, {padding:.0%} padding"
        return [(label, found["rows"], found["positions"])]

    @property
    def mixture(self) -> list[tuple[str, str, str]]:
        """Each training data set, how often an epoch contains its rows, and its share. []: there is
        one data set."""
        prepare = self.record("prepare")
        found = prepare.details.get("mixture", []) if prepare else []
        parts = [(each["name"], f"{each['weight']:.3g}", f"{each['share']:.1%}") for each in found]
        return parts if len(parts) > 1 else []

    @property
    def augmented(self) -> list[Augmented]:
        """The augmented rows that were trained on, by what made them. []: there are none."""
        prepare = self.record("prepare")
        found = prepare.details.get("augmented", []) if prepare else []
        return [
            Augmented(
                f"{MADE_BY.get(each['by'], each['by'])}"
                + (f" by {each['model']}" if each.get("model") else "")
                + f": {count(each['rows'])} rows",
                each["samples"],
            )
            for each in found
        ]

    @property
    def preferences(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The statistics of each data set of preferences."""
        pairs = self.record("pairs")
        found = pairs.details.get("statistics", {}) if pairs else {}
        return [(name, statistic_lines(details, "tokens")) for name, details in found.items()]

    @property
    def cleaning(self) -> list[tuple[str, str, list[str]]]:
        """Each rule of cleaning that found something, with its count and its first rows."""
        prepare = self.record("prepare")
        found = prepare.details.get("cleaning", {}) if prepare else {}
        return [
            (
                rule,
                f"{count(each['rows'])} {each['action']}",
                [f"{example['where']}: {example['text']}" for example in each["examples"]],
            )
            for rule, each in found.items()
        ]

    @property
    def leaks(self) -> list[str]:
        """The first held-out rows with text that is also in the training data."""
        prepare = self.record("prepare")
        found = (prepare.details.get("leaks") or {}) if prepare else {}
        return [
            f"{leak['heldOut']} is in {leak['training']} with {leak['spanWords']} of its "
            f"{leak['rowWords']} words in sequence: {leak['span']}"
            for leak in found.get("examples", [])
        ]

    @property
    def faults(self) -> list[str]:
        """Messages about the first invalid rows of each data set."""
        prepare = self.record("prepare")
        found = prepare.details.get("faults", {}) if prepare else {}
        return [fault for reasons in found.values() for some in reasons.values() for fault in some]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Labels and values of the training settings, from the stage's record or else from the
        manifest."""
        training = self.training_settings
        record = last_trained(self.records.values())
        done = record.details if record else {}
        metrics = record.metrics if record else {}
        rates = [rate for _, rate in self.curves.learning_rate]
        rows = [
            ("Method", METHODS.get(self.method, self.method.upper())),
            ("Teacher", self._teacher),
            ("Adapter", self._adapter_settings()),
            ("Epochs", _rounded(_first(metrics.get("epochs"), training.get("epochs")))),
            ("Steps", _rounded(_first(metrics.get("steps"), training.get("maxSteps")))),
            ("Batch size, sequences", _first(done.get("batchSize"), training.get("batchSize"))),
            ("Peak learning rate", number(max(rates)) if rates else training.get("learningRate")),
            ("Schedule", _schedule(training.get("schedule", {}))),
            ("Optimizer", _with_settings("AdamW", training.get("optimizer", {}))),
            ("Frozen", _words(training.get("freeze") or {})),
            ("Precision", _first(done.get("precision"), training.get("precision"))),
            ("Packed", {True: "yes", False: "no"}.get(done.get("packed", ""))),
            ("Loss on", self.spec.get("data", {}).get("trainOn")),
            ("Seed", training.get("seed")),
            ("Device", done.get("device")),
            ("Workers", done.get("workers")),
        ]
        return [(label, str(value)) for label, value in rows if value not in (None, "")]

    @property
    def training_settings(self) -> Mapping[str, Any]:
        """The manifest's training settings of the step that produced the result."""
        spec = self.spec
        sections: tuple[Mapping[str, Any], ...] = (
            spec,
            next(iter((spec.get("optimize") or {}).values()), {}),
            (spec.get("rewardModel") or {}).get("train") or {},
            spec.get("constitution") or {},
            spec.get("sft") or {},
        )
        found: Mapping[str, Any] = next((s["training"] for s in sections if s.get("training")), {})
        return found

    @property
    def _teacher(self) -> str | None:
        """The URI of the model that a distillation learns from. None: it is another method."""
        distill = (self.spec.get("optimize") or {}).get("distill")
        return str(distill["teacher"]["uri"]) if distill else None

    def _adapter_settings(self) -> str:
        if self.adapter is None:
            return "none: all weights were trained"
        name = ADAPTER_NAMES.get(self.adapter, self.adapter)
        return _with_settings(name, self._adapter_spec[self.adapter])

    @property
    def digests(self) -> list[tuple[str, str]]:
        """Labels and digests of the inputs, which are named by their URIs, and of the outputs."""
        prepare, training = self.record("prepare", "pairs"), last_trained(self.records.values())
        digests = []
        if training and "model" in training.input_digests:
            label = ", ".join(filter(None, ("Base model", self.base)))
            digests.append((label, training.input_digests["model"]))
        for role, digest in sorted(prepare.input_digests.items() if prepare else ()):
            if role != "model":
                what = "Toxicity classifier" if role == "toxicity" else f"Data, {role}"
                digests.append((", ".join(filter(None, (what, self.data_uri(role)))), digest))
        names = {
            "prepare": "Prepared data",
            "pairs": "Prepared preferences",
            "leaks": "Suites in the training data",
            "evaluate": "Evaluation",
            "assess": "Evaluation",
        }
        return digests + [
            (names.get(record.kind, "Trained weights"), record.digest)
            for record in self.records.values()
        ]

    @property
    def checked(self) -> str:
        """A sentence about the checks of the written files; "": there are none."""
        phrases = [
            f"{count(self.measured[metric])} tensors of the {name}"
            for metric, name in (("adapterTensors", "adapter"), ("modelTensors", "model"))
            if metric in self.measured
        ]
        if not phrases:
            return ""
        sentence = f"The written files were read back and are bit for bit right: {phrases[0]}"
        sentence += "".join(f", {phrase}" for phrase in phrases[1:])
        difference = self.measured.get("mergedWeightDifference")
        if difference is None:
            return f"{sentence}."
        return (
            f"{sentence}. Before rounding to the base's precision, a merged weight differs from "
            f"float64 arithmetic by at most {difference:.2g} of its terms."
        )

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the software that trained the model, by package."""
        record = last_trained(self.records.values())
        return record.versions if record else {}


def flip_lines(flips: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of flipped answers, as `evaluation.items` recorded them."""
    lines = []
    for label, name in (("Right only after the training", "gained"), ("No longer right", "lost")):
        named, total = flips[f"{name}Items"], flips[name]
        some = f": {', '.join(named)}" + (", …" if total > len(named) else "") if named else ""
        lines.append((label, f"{count(total)}{some}"))
    probability = number(flips["pValue"])
    return [*lines, ("McNemar's exact test", f"p = {probability}")]


def _retrieved(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of the contexts before the questions. []: there are none."""
    found = details.get("retrieval")
    if found is None:
        return []
    right = f"{count(found['withRightPassage'])} of {count(found['rows'])}"
    searched = found["rows"] - found["namedDocuments"]
    return [
        ("Documents", f"{count(found['documents'])}, in {count(found['passages'])} passages"),
        ("Contexts with the right passage", right),
        ("Rows without a document, whose passage BM25 chose", count(searched)),
    ]


def _filled(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of filling in the middle. []: the job does not do so."""
    found = details.get("fillInTheMiddle")
    if found is None:
        return []
    sequences = found["sequences"]
    changed = f"{count(sequences.get('changed', 0))} of {count(sum(sequences.values()))}"
    return [
        ("Sequences whose middle comes last", changed),
        ("Held-out documents with a gap", count(found["gaps"])),
    ]


def shareable(value: Any) -> Any:
    """Return a manifest without secrets: URIs of sources and output and URLs of judges lose user
    names, passwords, queries (which may hold signatures) and fragments."""
    if isinstance(value, Mapping):
        return {
            key: without_secrets(item)
            if key in _LOCATIONS and isinstance(item, str)
            else shareable(item)
            for key, item in value.items()
        }
    return [shareable(item) for item in value] if isinstance(value, list) else value


_LOCATIONS = ("uri", "url")
_PUBLIC = re.compile(r"(?:([^:/?#]+://)(?:[^/?#]*@)?)?([^?#]*)")
"""The scheme and the path of a URL, without the user in front of its host."""


def without_secrets(uri: str) -> str:
    """Return a URI without a user name, password, query and fragment; a file's as it is."""
    found = None if uri.startswith("file://") else _PUBLIC.match(uri)
    return uri if found is None else f"{found[1] or ''}{found[2]}"


def _has_chat_template(inputs: Mapping[str, Path]) -> bool:
    """Return whether the exported tokenizer has a chat template."""
    if "data" in inputs:
        return bool(_json(inputs["data"] / "data.json").get("chatTemplate"))
    beside = inputs["model"] / "chat_template.jinja"
    return beside.exists() or bool(
        _json(inputs["model"] / "tokenizer_config.json").get("chat_template")
    )


def _stages_of_run(folder: Path, known: Mapping[str, StageRecord]) -> list[StageRecord]:
    """Return the records of all stages of a run, sorted by time. `folder`: of the stages, which may
    hold some of an earlier run. `known`: stages of this run.

    A stage is of this run if one of its stages read the output. The search for leaks, whose output
    none reads, is if it searched the data that they read.
    """
    others = [_record(path) for path in sorted(folder.iterdir())]
    candidates = [each for each in others if each is not None and each.stage not in known]
    found, size = dict(known), -1
    while size < len(found):
        size = len(found)
        read = {digest for each in found.values() for digest in each.input_digests.values()}
        found |= {
            each.stage: each
            for each in candidates
            if each.digest in read
            or (each.kind == "leaks" and read.issuperset(each.input_digests.values()))
        }
    return sorted(found.values(), key=lambda record: record.started_at)


def _record(folder: Path) -> StageRecord | None:
    """Return the record in a stage's folder. None: there is none, or another version wrote it."""
    try:
        return StageRecord.model_validate(_json(folder / "record.json"))
    except ValueError:
        return None


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _schedule(schedule: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in schedule.items() if key != "type"}
    return _with_settings(schedule.get("type", ""), rest)


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:,.6g}"


def _with_settings(name: str, settings: Mapping[str, Any]) -> str:
    return "; ".join(part for part in (name, _words(settings)) if part)


def _words(settings: Mapping[str, Any]) -> str:
    """Return `learningRate: 1.0` as "learning rate 1". False and None are left out."""
    parts = []
    for key, value in settings.items():
        name = re.sub(r"([A-Z])", lambda found: f" {found[1].lower()}", key)
        if value is True:
            parts.append(name)
        elif isinstance(value, list):
            parts.append(f"{name} {', '.join(str(item) for item in value)}")
        elif value is not False and value is not None:
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)
