"""The statistics of preferences as labels and values, for the report and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def statistic_lines(details: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    """Return the `details` of `preference.statistics` as labels and values. `unit`: that of the
    lengths."""
    found = [
        ("Preferences", f"{details['preferences']:,}"),
        ("Different prompts", f"{details['prompts']:,}"),
        (
            "By number of completions",
            ", ".join(f"{size}: {count:,}" for size, count in details["completions"].items()),
        ),
        ("Equal to earlier ones", f"{details['repeated']:,}"),
    ]
    if "rejected" in details:
        found.append(("Labeled bad", f"{details['rejected']:,}"))
    else:
        found.append(("Ties", f"{details['ties']:,}"))
    if details["tiedAnswers"]:
        found.append(("Answers left out for an equal score", f"{details['tiedAnswers']:,}"))
    if "agreement" in details:
        value = f"{details['agreement']:.0%} of {details['comparedAgain']:,} made again"
        found.append(("Agreement of verdicts", value))
    if "meanProbability" in details:
        found.append(("Mean probability", f"{details['meanProbability']:.2f}"))
    if "longerWins" in details:
        value = f"{details['longerWins']:.0%} of {details['unequalLengths']:,}"
        found.append(("The longer one wins", value))
        better, worse = details["meanLengths"]
        found.append((f"Mean {unit}, better and worse", f"{better:.1f} and {worse:.1f}"))
    if "margins" in details:
        low, middle, high = details["margins"]
        value = f"{low:g}, {middle:g} and {high:g}"
        found.append(("Margin of score: 10%, 50%, 90%", value))
    return found
