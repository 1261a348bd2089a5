"""The speed of each family of cleaning rules, and its false alarms on rows that are clean.

    python benchmarks/cleaning.py [--rows 20000] [--data ../shared/data]

Reads real rows (gsm8k, self-instruct, hh-rlhf), repeated to the number of rows where
only speed is measured. Prints rows/s and words/s of each family on one core, what each family says
of 1,000 different rows, and the speed and memory of the searches for duplicates and leaks.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tuneyard.api.cleaning import PersonalData
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.encoding import Encoding
from tuneyard_trainer.data.cleaning.findings import Rule
from tuneyard_trainer.data.cleaning.language import Language
from tuneyard_trainer.data.cleaning.length import Length
from tuneyard_trainer.data.cleaning.quality import fineweb, gopher
from tuneyard_trainer.data.cleaning.repetition import repetition
from tuneyard_trainer.data.cleaning.search import Search
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.example import Example, Message
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.texts import Texts

CLEAN_ROWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    options = parser.parse_args()
    rows = list(real_rows(options.data))
    clean = rows[:: max(1, len(rows) // CLEAN_ROWS)][:CLEAN_ROWS]
    many = list(itertools.islice(itertools.cycle(rows), options.rows))
    num_words = sum(len(conversation(row).split()) for row in many)
    print(f"{len(rows)} different rows, {num_words / len(many):.0f} words a row")
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


def example(question: str, answer: str) -> Example:
    return Example(1, "chat", (Message("user", question), Message("assistant", answer)))


if __name__ == "__main__":
    main()
