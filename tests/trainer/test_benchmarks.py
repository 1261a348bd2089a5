"""The parts of the benchmarks of forgetting that decide what their tables say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.ability import shortest, write_rows
from benchmarks.alignment_tax import shortest_dialogues
from benchmarks.guard_rates import GUARDED, NOTHING, UNGUARDED, Comparison, Stop
from benchmarks.journal import THE_BASE, Column, Journal

COLUMNS = (
    Column("loss", "loss", "{:.2f}"),
    Column("rise", "loss", "{:+.2f}", sign=1),
    Column("gain", "loss", "{:+.2f}", sign=-1),
    Column("pairs", "pairs", "{:.3f}"),
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(THE_BASE, 0, loss=2.0)
    for seed, loss in enumerate((1.0, 1.25, 1.8)):
        journal.add("plain", seed, loss=loss)
    return journal


def test_a_table_has_means_with_the_least_and_the_most_and_differences_from_the_base(
    journal: Journal,
) -> None:
    assert [*journal.table(COLUMNS)] == [
        "| | runs | loss | rise | gain |",
        "|---|---:|---:|---:|---:|",
        "| the base | 1 | 2.00 |  |  |",
        "| plain | 3 | 1.35 (1.00 to 1.80) | -0.65 (-1.00 to -0.20) | +0.65 (+0.20 to +1.00) |",
    ]


def test_a_journal_that_is_opened_again_knows_its_runs(journal: Journal) -> None:
    again = Journal(journal.path)
    assert again.results == journal.results
    assert again.has("plain", 2)
    assert not again.has("plain", 3)
    assert not again.has("other", 2)


def curve(*increases: float, losses: tuple[float, ...] = ()) -> list[dict[str, float]]:
    falling = losses or tuple(3.0 - n for n in range(len(increases)))
    return [
        {"step": 2 * n + 2, "increase": increase, "validation": loss}
        for n, (increase, loss) in enumerate(zip(increases, falling, strict=True))
    ]


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        (curve(0.01, 0.09, 0.11, 0.05), Stop(6, 4)),
        (curve(0.01, 0.1, 0.05), Stop(6, 6)),
        (curve(0.01, 0.05, 0.2, losses=(1.0, 2.0, 0.5)), Stop(6, 2)),
        (curve(0.2, 0.05), Stop(2, NOTHING)),
    ],
    ids=["beyond", "at-the-bound", "the-best-is-earlier", "at-once"],
)
def test_a_guard_should_stop_at_the_first_evaluation_beyond_its_bound(
    evaluations: list[dict[str, float]], expected: Stop
) -> None:
    assert Stop.expected(evaluations, 0.1) == expected


@pytest.mark.parametrize(
    ("step", "kept", "others", "agrees"),
    [(6, 4, 0.0, True), (8, 4, 0.0, False), (6, 2, 0.0, False), (6, 4, 0.001, False)],
    ids=["same", "later", "another-kept", "another-curve"],
)
def test_runs_agree_if_the_guard_stops_there_and_the_runs_were_the_same_before(
    tmp_path: Path, step: int, kept: int, others: float, agrees: bool
) -> None:
    journal = Journal(tmp_path / "rates.jsonl")
    increases = (0.01, 0.09, 0.11, 0.3)
    free = {"step": 8, "kept": 8, "note": None, "curve": curve(*increases)}
    journal.add(UNGUARDED, 0, rate=0.1, **free)
    seen = curve(*(each + others for each in increases))[:3]
    journal.add(GUARDED, 0, rate=0.1, step=step, kept=kept, note="stopped", curve=seen)
    compared = Comparison.of(journal, 0.1, 0.1)
    assert compared.agrees == agrees
    assert compared.row() == f"| 0.1 | +0.30 | 6 (+0.110) | 4 | {step} | {kept} |"


def test_the_preferences_are_the_shortest_dialogues_of_one_question(tmp_path: Path) -> None:
    def row(question: str, chosen: str, rejected: str) -> dict[str, str]:
        start = f"\n\nHuman: {question}\n\nAssistant:"
        return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}

    rows = [
        row("A long question about lamps?", "It is not known.", "I do not know."),
        row("Why?", "I do not know.", "It is not known."),
        row("Who?", "Me.", "I do not know."),
        row("How?", "I do not know.", "I do not know."),
        row("Why?\n\nAssistant: What?\n\nHuman: This.", "I do not know.", "It is not known."),
        row("why?", "One more answer here.", "And one more here."),
        row("When?", "It is today, I think.", "I do not know."),
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in rows).encode()))
    found = shortest_dialogues(path, 2)
    assert [each["prompt"][-1]["content"] for each in found] == ["When?", "why?"]
    assert found[0]["chosen"] == "It is today, I think."


def test_as_many_questions_are_taken_of_each_set(tmp_path: Path) -> None:
    rows = [{"set": name, "question": "?" * n} for name in ("a", "b") for n in (3, 1, 2)]
    chosen = shortest(write_rows(tmp_path / "rows.jsonl", rows), 4)
    assert [(each["set"], len(each["question"])) for each in chosen] == [
        ("a", 1), ("a", 2), ("b", 1), ("b", 2)
    ]  # fmt: skip
