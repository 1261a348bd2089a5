"""A feedback log is joined by id into conversations, pairs, labels and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import read_prompts
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import Examples, examples
from tuneyard_trainer.preference.rows import Preference, parse_preferences

Event = dict[str, Any]


def answer(key: Any, completion: str, prompt: Any = "Which lamp?", **more: Any) -> Event:
    return {"event": "answer", "id": key, "prompt": prompt, "completion": completion, **more}


def rating(key: Any, thumbs: Any = "up", **more: Any) -> Event:
    return {"event": "rating", "of": key, "thumbs": thumbs, **more}


def scored(key: str, score: Any) -> Event:
    return {"event": "rating", "of": key, "score": score}


def edit(key: str, completion: str) -> Event:
    return {"event": "edit", "of": key, "completion": completion}


def retry(key: Any, **more: Any) -> Event:
    return {"event": "retry", "of": key, **more}


def joined(*events: Event, **fields: str) -> list[Row]:
    rows = [Row(number, event, "log.jsonl") for number, event in enumerate(events, start=1)]
    return list(layouts.joined(rows, "feedback", FieldMap(**fields)))


def preferences(*events: Event, labeled: bool = False, **fields: str) -> list[Preference]:
    return [
        preference
        for row in joined(*events, **fields)
        if not isinstance(row.value, BrokenRow)
        for preference in parse_preferences(row, FieldMap(**fields), labeled=labeled)
    ]


def pairs(*events: Event, **fields: str) -> list[tuple[str, ...]]:
    found = preferences(*events, **fields)
    return [tuple(each.text for each in preference.completions) for preference in found]


def labels(*events: Event) -> list[tuple[str, float]]:
    return [(each.completions[0].text, each.label) for each in preferences(*events, labeled=True)]


def broken(*events: Event) -> list[tuple[int, str, str]]:
    """Return the number, the fault and the reason of each broken row."""
    return [
        (row.number, row.value.fault, row.value.reason)
        for row in joined(*events)
        if isinstance(row.value, BrokenRow)
    ]


def write(path: Path, *events: Event) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def stream(path: Path, **changes: Any) -> Examples:
    chosen: dict[str, Any] = {"format": "auto", "fields": FieldMap(), "weight": 1.0, "limit": None}
    return examples(path, DatasetSettings(**chosen | changes), on_invalid="skip", name="data")


def trained(path: Path, *events: Event) -> list[str]:
    return [example.messages[-1].text for example in stream(write(path / "log.jsonl", *events))]


def asked(path: Path, *events: Event) -> list[str]:
    prompts = PromptSettings(format="auto", fields=FieldMap(), limit=None)
    chat = ChatSettings(system_prompt=None, chat_template=None)
    return [
        prompt.question
        for prompt in read_prompts(write(path / "log.jsonl", *events), prompts, chat, name="p")
    ]


# ---- edits ------------------------------------------------------------------------------------


def test_an_edited_answer_beats_its_original_and_no_other_answer() -> None:
    session = {"session": "s"}
    log = [answer("1", "Blue.", **session), answer("2", "Green.", **session), edit("1", "Red.")]
    assert pairs(*log) == [("Red.", "Blue.")]
    assert labels(*log) == [("Blue.", 0.0), ("Red.", 1.0)]


def test_each_of_two_edits_beats_the_original() -> None:
    log = [answer("1", "Blue."), edit("1", "Red."), edit("1", "Dark red."), edit("1", "Red.")]
    assert sorted(pairs(*log)) == [("Dark red.", "Blue."), ("Red.", "Blue.")]


def test_an_edit_that_changes_nothing_is_named() -> None:
    log = [answer("1", "Blue."), edit("1", " Blue. ")]
    assert broken(*log) == [(2, "IdenticalSides", "the edit of answer 1 changes nothing")]
    assert not pairs(*log)


# ---- ratings ----------------------------------------------------------------------------------


def test_an_answer_with_a_thumb_up_beats_one_with_a_thumb_down_to_the_same_prompt() -> None:
    log = [answer("1", "Blue."), answer("2", "Red."), rating("1", "down"), rating("2", True)]
    assert pairs(*log) == [("Red.", "Blue.")]
    assert labels(*log) == [("Blue.", 0.0), ("Red.", 1.0)]


@pytest.mark.parametrize(
    "other",
    [{"prompt": "Which desk?"}, {"system": "Be brief."}, {"tools": [{"name": "find"}]}],
    ids=["another prompt", "another system prompt", "other tools"],
)
def test_answers_to_different_prompts_are_not_compared(other: Event) -> None:
    log = [answer("1", "Blue."), answer("2", "Red.") | other, rating("1", "down"), rating("2")]
    assert not pairs(*log)
    assert len(labels(*log)) == 2


def test_an_unrated_answer_becomes_no_preference() -> None:
    log = [answer("1", "Blue."), answer("2", "Red."), rating("2")]
    assert not pairs(*log)
    assert labels(*log) == [("Red.", 1.0)]


def test_every_rated_text_is_in_a_pair_and_their_number_stays_linear() -> None:
    ups = [event for i in range(30) for event in (answer(f"u{i}", f"up {i}"), rating(f"u{i}"))]
    downs = [
        event
        for i in range(20)
        for event in (answer(f"d{i}", f"down {i}"), rating(f"d{i}", "down"))
    ]
    found = pairs(*ups, *downs)
    assert len(found) == 30
    assert {better for better, _ in found} == {f"up {i}" for i in range(30)}
    assert {worse for _, worse in found} == {f"down {i}" for i in range(20)}


def test_a_text_that_users_rate_both_ways_is_in_no_pair() -> None:
    log = [answer("1", "Blue."), answer("2", "Blue."), answer("3", "Red.")]
    log += [rating("1"), rating("2", "down"), rating("3", "down")]
    assert not pairs(*log)
    assert labels(*log) == [("Blue.", 1.0), ("Blue.", 0.0), ("Red.", 0.0)]


def test_scores_order_the_answers_to_a_prompt_and_are_no_labels() -> None:
    log = [answer("1", "Good."), answer("2", "Best."), answer("3", "Bad.")]
    log += [scored("1", 3), scored("2", 4.5), scored("3", 1)]
    assert sorted(pairs(*log)) == [("Best.", "Good."), ("Good.", "Bad.")]
    assert not labels(*log)


def test_scores_do_not_contradict_thumbs() -> None:
    log = [answer("1", "A."), answer("2", "B.")]
    log += [rating("1", "up", score=1), rating("2", "down", score=5)]
    assert pairs(*log) == [("A.", "B.")]


def test_contradicting_ratings_of_one_answer_are_named_and_do_not_count() -> None:
    log = [answer("1", "Blue."), answer("2", "Red."), rating("1"), rating("1", "down")]
    reason = "the ratings of answer 1 differ"
    assert broken(*log) == [(3, "Conflict", reason), (4, "Conflict", reason)]
    assert not labels(*log)
    assert not broken(answer("1", "Blue."), rating("1"), rating("1"))


# ---- retries ----------------------------------------------------------------------------------

FIRST, SECOND = answer("1", "Blue.", session="s"), answer("2", "Red.", session="s")
CONTINUED = [
    {"role": "user", "content": "Which lamp?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Sure?"},
]


def went_on(session: str = "s") -> Event:
    return {
        "event": "answer",
        "id": "3",
        "session": session,
        "messages": CONTINUED,
        "completion": "Yes.",
    }


def test_a_retry_alone_states_nothing() -> None:
    assert not pairs(FIRST, retry("1"), SECOND)
    assert not labels(FIRST, retry("1"), SECOND)


@pytest.mark.parametrize("kept", [rating("2"), went_on()], ids=["rated up", "continued"])
def test_an_answer_that_was_kept_beats_the_one_that_it_replaced(kept: Event) -> None:
    assert pairs(FIRST, retry("1"), SECOND, kept) == [("Red.", "Blue.")]
    assert ("Blue.", 0.0) in labels(FIRST, retry("1"), SECOND, kept)
    assert ("Red.", 1.0) in labels(FIRST, retry("1"), SECOND, kept)


@pytest.mark.parametrize(
    "rest",
    [
        [went_on("another")],
        [went_on(), rating("2", "down")],
        [went_on(), rating("1")],
        [rating("2"), scored("1", 5)],
    ],
    ids=["another session", "rated down", "the old one is liked", "the old one has a score"],
)
def test_an_answer_that_was_not_kept_or_replaced_a_liked_one_beats_nothing(
    rest: list[Event],
) -> None:
    assert not pairs(FIRST, retry("1"), SECOND, *rest)


def test_a_retry_without_a_name_means_the_next_answer_to_its_prompt_in_its_session() -> None:
    elsewhere = answer("x", "Green.", session="t")
    other = answer("y", "Oak.", "Which desk?", session="s")
    later = answer("4", "Pink.", session="s")
    log = [FIRST, retry("1"), elsewhere, other, SECOND, later]
    ratings = [rating(key) for key in ("x", "y", "2", "4")]
    assert pairs(*log, *ratings) == [("Red.", "Blue.")]


def test_a_retry_can_name_the_answer_in_any_order() -> None:
    assert pairs(rating("2"), SECOND, retry("1", by="2"), FIRST) == [("Red.", "Blue.")]


def test_ids_and_sessions_may_begin_with_0() -> None:
    """The number 0 was taken for an absent session, and for an absent `by`."""
    first, second, third = (
        answer(key, text, session=0) for key, text in ((1, "Blue."), (0, "Red."), (2, "Green."))
    )
    kept = rating(0)
    named = retry(2, by=0)
    assert pairs(first, retry(1), second, kept) == [("Red.", "Blue.")]
    assert pairs(third, second, named, kept) == [("Red.", "Green.")]


@pytest.mark.parametrize(
    ("log", "fault", "reason"),
    [
        ([FIRST, retry("1")], "UnknownId", "no later answer of its session replaces answer 1"),
        ([FIRST, retry("1", by="9")], "UnknownId", "answer 9 is not in the data"),
        ([FIRST, retry("1", by="1")], "Conflict", "answer 1 cannot replace itself"),
        (
            [FIRST, retry("1", by="2"), answer("2", "Oak.", "Which desk?")],
            "DifferingPrompts",
            "answers 1 and 2 have different prompts",
        ),
    ],
    ids=["nothing follows", "unknown", "itself", "another prompt"],
)
def test_a_retry_that_leads_nowhere_is_named(log: list[Event], fault: str, reason: str) -> None:
    assert broken(*log) == [(2, fault, reason)]


# ---- requests and sessions --------------------------------------------------------------------


def test_an_answer_can_name_its_request_which_gives_prompt_and_session() -> None:
    request = {"event": "request", "id": "1", "session": "s", "prompt": "Which lamp?"}
    first = {"event": "answer", "id": "1", "of": "1", "completion": "Blue."}
    log = [retry("1"), first, SECOND, rating("2"), request, {"event": "session", "session": "s"}]
    (found,) = preferences(*log)
    assert [turn.text for turn in found.prompt] == ["Which lamp?"]
    assert [each.text for each in found.completions] == ["Red.", "Blue."]
    assert not broken(*log)


@pytest.mark.parametrize(
    ("log", "faults"),
    [
        ([rating("9")], [(1, "UnknownId", "answer 9 is not in the data")]),
        ([answer("1", "A."), answer("1", "B."), rating("1")],
         [(2, "DuplicateId", "answer 1 appears twice"),
          (1, "DuplicateId", "answer 1 appears twice"),
          (3, "UnknownId", "answer 1 has no valid row")]),
        ([answer("1", ""), edit("1", "B.")],
         [(1, "EmptyCompletion", "completion is empty"),
          (2, "UnknownId", "answer 1 has no valid row")]),
        ([{"event": "answer", "id": "1", "of": "9", "completion": "A."}],
         [(1, "UnknownId", "request 9 is not in the data")]),
        ([answer("1", "A.", of="9")],
         [(1, "InvalidTurns", "an answer has a request or a prompt of its own, not both")]),
        ([answer("1", "A."), rating("1", "maybe")],
         [(2, "InvalidLabel", "thumbs must be true or false, and it is 'maybe'")]),
        ([answer("1", "A."), {"event": "rating", "of": "1"}],
         [(2, "InvalidLabel", "a rating needs thumbs or score")]),
        ([answer("1", "A."), scored("1", "5")],
         [(2, "InvalidLabel", "score must be a number, not '5'")]),
        ([answer("1", "A."), {"event": "edit", "id": "1", "completion": "B."}],
         [(2, "UnknownId", "edit without of")]),
    ],
    ids=["unknown answer", "duplicate", "broken answer", "unknown request", "two prompts",
         "thumbs", "no rating", "score", "no id"],
)  # fmt: skip
def test_an_event_that_cannot_be_joined_is_named_by_its_row(
    log: list[Event], faults: list[tuple[int, str, str]]
) -> None:
    assert broken(*log) == faults
    assert not pairs(*log)


def test_an_unknown_event_is_named_where_the_log_is_known(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", answer("1", "A."), rating("1"), {"event": "click"})
    rows = stream(log)
    assert len(list(rows)) == 1
    assert rows.summary.format == "feedback"
    assert "row 3: event is 'click'; an event is one of request, answer" in str(
        rows.summary.faults[0]
    )


# ---- other purposes ---------------------------------------------------------------------------


def test_edits_and_answers_with_a_thumb_up_are_fine_tuned_on(tmp_path: Path) -> None:
    log = [answer("1", "Liked."), answer("2", "Edited."), answer("3", "Disliked.")]
    log += [answer("4", "Unrated."), answer("5", "Scored."), scored("5", 9)]
    log += [rating("1"), rating("2"), edit("2", "Better."), rating("3", "down")]
    assert trained(tmp_path, *log) == ["Liked.", "Better."]


def test_a_log_without_an_answer_to_train_on_is_empty(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="a log of 1 answers, none of which is edited"):
        trained(tmp_path, answer("1", "Unrated."))


def test_every_prompt_of_a_log_is_read_once(tmp_path: Path) -> None:
    log = [
        {"event": "request", "id": "r", "prompt": "Which desk?"},
        {"event": "answer", "id": "0", "of": "r", "completion": "Oak."},
        answer("1", "Red."),
        answer("2", "Blue."),
        rating("2"),
        rating("not in the log"),
        went_on(),
    ]
    assert asked(tmp_path, *log) == ["Which desk?", "Which lamp?", "Sure?"]
    with pytest.raises(StageError, match="row 1: request 9 is not in the data"):
        asked(tmp_path, {"event": "answer", "id": "1", "of": "9", "completion": "A."})


def test_the_columns_of_events_that_nothing_reads_are_named(tmp_path: Path) -> None:
    rows = stream(write(tmp_path / "log.jsonl", answer("1", "A.", model="m"), rating("1", user=7)))
    assert len(list(rows)) == 1
    assert rows.summary.unread == ("model", "user")


def test_fields_name_the_columns_of_events() -> None:
    log = [
        {"kind": "answer", "key": 1, "question": "Which lamp?", "said": "Blue."},
        {"kind": "answer", "key": 2, "question": "Which lamp?", "said": "Red."},
        {"kind": "rating", "about": 1, "vote": "down"},
        {"kind": "rating", "about": 2, "vote": "up"},
    ]
    fields = {"event": "kind", "id": "key", "of": "about", "label": "vote", "completion": "said"}
    assert pairs(*log, **fields) == [("Red.", "Blue.")]


def test_events_in_later_files_of_a_data_set_are_joined(tmp_path: Path) -> None:
    write(tmp_path / "monday.jsonl", answer("1", "Blue."), answer("2", "Red."))
    write(tmp_path / "sunday.jsonl", rating("1", "down"), rating("2"), rating("9"))
    rows = list(layouts.joined(read_data(tmp_path), "auto", FieldMap()))
    assert [(row.file, row.number) for row in rows if isinstance(row.value, BrokenRow)] == [
        ("sunday.jsonl", 3)
    ]
    found = [
        preference
        for row in rows
        if not isinstance(row.value, BrokenRow)
        for preference in parse_preferences(row, FieldMap(), labeled=False)
    ]
    assert [(each.file, each.row) for each in found] == [("monday.jsonl", 2)]


def test_rows_of_other_layouts_with_a_column_event_are_not_taken_for_a_log(tmp_path: Path) -> None:
    row = {"event": "storm", "id": 4, "prompt": "What happened?", "completion": "A storm."}
    rows = stream(write(tmp_path / "rows.jsonl", row))
    assert [example.completion for example in rows] == ["A storm."]
    assert rows.summary.format == "prompt-completion"


# ---- any log ----------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Return the events of a log whose retries name their answers, in two orders."""
    keys = [str(number) for number in range(draw(st.integers(1, 6)))]
    texts, key = st.sampled_from(["A.", "B.", "C."]), st.sampled_from([*keys, "unknown"])
    log = [
        answer(each, draw(texts), draw(st.sampled_from(["Q?", "R?"])), session="s") for each in keys
    ]
    event = st.one_of(
        st.builds(rating, key, st.booleans()),
        st.builds(scored, key, st.integers(0, 2)),
        st.builds(edit, key, texts),
        st.builds(lambda of, by: retry(of, by=by), key, key),
        st.builds(answer, key, texts),
    )
    log += draw(st.lists(event, max_size=10))
    return log, draw(st.permutations(log))


@given(logs())
@settings(max_examples=100, deadline=None)
def test_the_order_of_events_does_not_matter(both: tuple[list[Event], list[Event]]) -> None:
    log, shuffled = both

    def stated(events: list[Event]) -> list[Any]:
        found = [preferences(*events), preferences(*events, labeled=True)]
        return [
            sorted((each.prompt[0].text, str(each.completions), each.label) for each in kind)
            for kind in found
        ]

    assert stated(log) == stated(shuffled)
    assert sorted(fault for _, fault, _ in broken(*log)) == sorted(
        fault for _, fault, _ in broken(*shuffled)
    )


@given(logs())
@settings(max_examples=100, deadline=None)
def test_no_event_is_lost_silently_and_no_pair_has_two_equal_sides(
    both: tuple[list[Event], list[Event]],
) -> None:
    log, _ = both
    for better, worse in pairs(*log):
        assert better != worse
    valid = [row for row in joined(*log) if not isinstance(row.value, BrokenRow)]
    refused = {number for number, _, _ in broken(*log)}
    answers = {i for i, event in enumerate(log, start=1) if event["event"] == "answer"}
    assert {row.number for row in valid} == answers - refused


def test_empty_cells_of_a_table_are_no_request_and_no_prompt(tmp_path: Path) -> None:
    """A table of events has every column in every row."""
    path = tmp_path / "log.csv"
    path.write_text(
        "event,id,of,prompt,completion,thumbs\n"
        "request,r,,q,,\n"
        "answer,a,,p,x,\n"
        "answer,b,r,,y,\n"
        "rating,,a,,,up\n"
        "rating,,b,,,up\n"
    )
    found = stream(path)
    assert [example.messages[0].text for example in found] == ["p", "q"]
    assert found.summary.skipped == 0


def test_an_answer_with_neither_a_request_nor_a_prompt_is_named_by_its_row() -> None:
    ((number, fault, reason),) = broken({**answer("a", "x"), "prompt": None, "of": ""})
    assert (number, fault) == (1, "UnknownShape")
    assert "the row has no prompt" in reason
