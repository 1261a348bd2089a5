"""Each layout in its published shape: what it is read as for training, preferences and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard.planning.limits import PREFERENCE_FORMATS
from tuneyard_trainer.data.prompts import Prompt, read_prompts
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.conversations import template_turns
from tuneyard_trainer.data.reading.example import Example, Message, RowError, ToolCall
from tuneyard_trainer.data.reading.layouts import Purpose
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import Examples, examples
from tuneyard_trainer.data.reading.trees import link_messages
from tuneyard_trainer.preference.rows import Preference, parse_preferences

SHARED = Path(__file__).parents[4] / "shared" / "data"
WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
TOOLS = ({"type": "function", "function": WEATHER},)
CALL = ToolCall("weather", {"city": "Paris"})


def stream(path: Path, *rows: Any, **settings: Any) -> Examples:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = FieldMap(**settings.pop("fields", {}))
    chosen = {"format": "auto", "fields": fields, "weight": 1.0, "limit": None} | settings
    return examples(file, DatasetSettings(**chosen), on_invalid="error", name="data")


def read(path: Path, row: dict[str, Any], **settings: Any) -> Example:
    (example,) = stream(path, row, **settings)
    return example


def preferences(row: dict[str, Any], *, labeled: bool = False, **fields: str) -> list[Preference]:
    return parse_preferences(Row(1, row), FieldMap(**fields), labeled=labeled)


def prompts(path: Path, *rows: Any, **fields: str) -> list[Prompt]:
    file = path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PromptSettings(format="auto", fields=FieldMap(**fields), limit=None)
    chat = ChatSettings(system_prompt=None, chat_template=None)
    return read_prompts(file, settings, chat, name="prompts")


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def shown(turns: Any) -> list[str]:
    return [f"{each.role}: {each.text}" for each in turns]


QA = ["user: q", "assistant: a"]
OPENAI_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
TRAINING: list[tuple[str, str, dict[str, Any], list[str]]] = [
    (
        "TRL, conversational",
        "messages",
        {"messages": [turn("user", "q"), turn("assistant", "a")]},
        QA,
    ),
    ("TRL, prompt and completion", "prompt-completion", {"prompt": "q", "completion": "a"}, QA),
    (
        "TRL, conversational prompt and completion",
        "prompt-completion",
        {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]},
        QA,
    ),
    (
        "LLaMA-Factory, Alpaca with history",
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
        ["system: s", "user: x", "assistant: y", *QA],
    ),
    (
        "LLaMA-Factory, ShareGPT",
        "sharegpt",
        {"conversations": [said("human", "q"), said("gpt", "a")], "system": "s", "tools": "[]"},
        ["system: s", *QA],
    ),
    (
        "Axolotl, chat_template",
        "sharegpt",
        {"conversations": [turn("user", "q"), turn("assistant", "a")]},
        QA,
    ),
    (
        "Axolotl, pygmalion",
        "sharegpt",
        {
            "conversations": [
                {"role": "user", "value": "q"},
                {"role": "assistant", "value": "a"},
            ]
        },
        QA,
    ),
    ("Axolotl, load_qa", "question-answer", {"question": "q", "answer": "a"}, QA),
    (
        "OpenOrca",
        "question-answer",
        {"system_prompt": "s", "question": "q", "response": "a"},
        ["system: s", *QA],
    ),
    ("GPTeacher", "dolly", {"instruction": "q", "input": "x", "response": "a"},
     ["user: q\n\nx", "assistant: a"]),
    (
        "Dolly",
        "dolly",
        {"instruction": "q", "context": "x", "response": "a", "category": "closed_qa"},
        ["user: q\n\nx", "assistant: a"],
    ),
    ("FLAN", "flan", {"inputs": "q", "targets": "a", "task": "t"}, QA),
    ("UltraChat", "ultrachat", {"id": "1", "data": ["q", "a"]}, QA),
    (
        "UltraChat 200k",
        "messages",
        {"prompt": "q", "prompt_id": "1", "messages": [turn("user", "q"), turn("assistant", "a")]},
        QA,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "row", "turns"), TRAINING)
def test_a_published_layout_of_training_rows_is_recognized(
    tmp_path: Path, name: str, layout: str, row: dict[str, Any], turns: list[str]
) -> None:
    found = stream(tmp_path, row)
    assert [shown(example.messages) for example in found] == [turns]
    assert found.summary.format == layout


def test_documents_are_read_as_texts(tmp_path: Path) -> None:
    """TRL's language modeling, and the rows of LLaMA-Factory and Axolotl for pre-training."""
    found = stream(tmp_path, {"text": "The sky is blue."})
    assert [(example.kind, example.text) for example in found] == [("text", "The sky is blue.")]
    assert found.summary.format == "text"


@pytest.mark.parametrize(
    ("name", "row", "fields"),
    [
        (
            "Axolotl, oasst",
            {"INSTRUCTION": "q", "RESPONSE": "a"},
            {"prompt": "INSTRUCTION", "completion": "RESPONSE"},
        ),
        (
            "Axolotl, summarizetldr",
            {"article": "q", "summary": "a"},
            {"prompt": "article", "completion": "summary"},
        ),
        (
            "Axolotl, load_camel_ai",
            {"message_1": "q", "message_2": "a"},
            {"prompt": "message_1", "completion": "message_2"},
        ),
        ("Axolotl, metharme", {"prompt": "q", "generation": "a"}, {"completion": "generation"}),
        (
            "Axolotl, creative_acr",
            {"instruction": "q", "revision": "a"},
            {"prompt": "instruction", "completion": "revision"},
        ),
    ],
)
def test_a_published_layout_with_other_columns_is_refused_and_can_be_named(
    tmp_path: Path, name: str, row: dict[str, Any], fields: dict[str, str]
) -> None:
    with pytest.raises(StageError) as caught:
        stream(tmp_path, row)
    assert caught.value.reason == "UnknownFormat"
    assert shown(read(tmp_path, row, fields=fields).messages) == QA


@pytest.mark.parametrize(("name", "layout", "row", "turns"), TRAINING)
def test_the_questions_of_training_rows_are_prompts(
    tmp_path: Path, name: str, layout: str, row: dict[str, Any], turns: list[str]
) -> None:
    (prompt,) = prompts(tmp_path, {k: v for k, v in row.items() if k != "context"})
    assert prompt.messages[-1]["role"] == "user"
    assert prompt.question.startswith("q")


TOOL_ROWS: list[tuple[str, dict[str, Any]]] = [
    (
        "OpenAI and TRL",
        {
            "messages": [
                turn("user", "q"),
                turn("assistant", None, tool_calls=[OPENAI_CALL]),
                turn("tool", "21", tool_call_id="call_1"),
                turn("assistant", "a"),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
            "parallel_tool_calls": False,
        },
    ),
    (
        "OpenAI, before tool_calls",
        {
            "messages": [
                turn("user", "q"),
                turn("assistant", None, function_call=OPENAI_CALL["function"]),
                turn("function", "21", name="weather"),
                turn("assistant", "a"),
            ],
            "functions": [WEATHER],
        },
    ),
    (
        "LLaMA-Factory, ShareGPT",
        {
            "conversations": [
                said("human", "q"),
                said("function_call", json.dumps({"name": "weather", "arguments": CALL.arguments})),
                said("observation", "21"),
                said("gpt", "a"),
            ],
            "tools": json.dumps([WEATHER]),
        },
    ),
]


@pytest.mark.parametrize(("name", "row"), TOOL_ROWS)
def test_tools_are_read_from_every_layout_that_has_them(
    tmp_path: Path, name: str, row: dict[str, Any]
) -> None:
    example = read(tmp_path, row)
    assert [turn.role for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = example.messages[1].calls
    assert (call.name, call.arguments) == (CALL.name, CALL.arguments)
    assert example.messages[2].content == "21"
    assert example.tools == TOOLS


def test_a_text_and_the_call_after_it_are_one_turn(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": name}} for name in ("Paris", "Rome")]
    turns = [
        said("human", "q"),
        said("gpt", "Let me look."),
        said("function_call", json.dumps(calls)),
        said("observation", "21"),
        said("observation", "25"),
        said("gpt", "a"),
    ]
    example = read(tmp_path, {"conversations": turns})
    assert example.messages[1].content == "Let me look."
    assert [call.arguments["city"] for call in example.messages[1].calls] == ["Paris", "Rome"]


@pytest.mark.parametrize("own", [{"reasoning_content": "hm"}, {"weight": 0}])
def test_a_call_with_its_own_reasoning_or_weight_is_not_joined_to_a_text(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    """Joined to the text, the reasoning would be lost, and the call trained on."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [turn("user", "q"), turn("assistant", "a"), call | own, turn("tool", "r")]
    with pytest.raises(StageError, match="turn 3 is by assistant and follows assistant"):
        list(stream(tmp_path, {"messages": [*turns, turn("assistant", "b")]}))


def test_marks_of_parts_of_a_turn_are_refused(tmp_path: Path) -> None:
    """Without the refusal, Axolotl's parts that are not to be trained on would be."""
    detail = [{"begin_offset": 0, "end_offset": 4, "train": False}]
    turns = [turn("user", "q"), turn("assistant", "no, yes", train_detail=detail)]
    with pytest.raises(StageError, match="train_detail marks parts of a turn"):
        list(stream(tmp_path, {"messages": turns}))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "turn 2 is not JSON"),
        ("[1]", "must be {name, arguments}"),
        ('{"name": "f", "arguments": "{"}', "the arguments of f is not JSON"),
        ('{"name": "f", "arguments": [1]}', "the arguments of f must be an object"),
    ],
)
def test_a_call_that_is_none_is_refused_by_its_turn(
    tmp_path: Path, value: str, problem: str
) -> None:
    good = {"conversations": [said("human", "q"), said("gpt", "a")]}
    turns = [said("human", "q"), said("function_call", value), said("observation", "r")]
    with pytest.raises(StageError, match=r"rows\.jsonl row 2: turn 2") as caught:
        list(stream(tmp_path, good, {"conversations": [*turns, said("gpt", "a")]}))
    assert problem in caught.value.message


def test_the_weight_of_a_turn_and_its_reasoning_are_read(tmp_path: Path) -> None:
    messages = [
        turn("user", "q"),
        turn("assistant", "no", weight=0),
        turn("user", "q"),
        turn("assistant", "a", weight=1, reasoning_content="hm"),
    ]
    example = read(tmp_path, {"messages": messages})
    assert [each.train for each in example.messages] == [None, False, None, True]
    assert example.messages[3].reasoning == "hm"
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    example = read(tmp_path, {"messages": [turn("user", "q"), turn("assistant", parts)]})  # type: ignore[arg-type]
    assert example.messages[1] == Message("assistant", "a", reasoning="hm")
    for key in ("thinking", "reasoning"):
        messages = [turn("user", "q"), turn("assistant", "a", **{key: "hm"})]
        assert read(tmp_path, {"messages": messages}).messages[1].reasoning == "hm"
    row = {"prompt": "q", "completion": "a", "why": "hm"}
    assert read(tmp_path, row, fields={"reasoning": "why"}).messages[1].reasoning == "hm"


PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("TRL, explicit prompt", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("TRL, implicit prompt", {"chosen": "q a", "rejected": "q b"}),
    (
        "TRL, conversational, explicit prompt",
        {
            "prompt": [turn("user", "q")],
            "chosen": [turn("assistant", "a")],
            "rejected": [turn("assistant", "b")],
        },
    ),
    (
        "TRL, conversational, implicit prompt",
        {
            "chosen": [turn("user", "q"), turn("assistant", "a")],
            "rejected": [turn("user", "q"), turn("assistant", "b")],
        },
    ),
    (
        "hh-rlhf",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        },
    ),
    (
        "LLaMA-Factory, Alpaca",
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    ),
    (
        "LLaMA-Factory, ShareGPT",
        {
            "conversations": [said("human", "q")],
            "chosen": said("gpt", "a"),
            "rejected": said("gpt", "b"),
        },
    ),
    (
        "Axolotl, chat_template.default",
        {
            "messages": [turn("user", "q")],
            "chosen": turn("assistant", "a"),
            "rejected": turn("assistant", "b"),
        },
    ),
    (
        "Axolotl, chatml.argilla",
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    ),
    (
        "OpenAI, preferences",
        {
            "input": {"messages": [turn("user", "q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [turn("assistant", "a")],
            "non_preferred_output": [turn("assistant", "b")],
        },
    ),
    ("Axolotl, chatml.intel", {"question": "q", "chosen": "a", "rejected": "b"}),
    (
        "Axolotl, chatml.ultra",
        {
            "prompt": "q",
            "chosen": [turn("user", "q"), turn("assistant", "a")],
            "rejected": [turn("user", "q"), turn("assistant", "b")],
        },
    ),
    (
        "Axolotl, zephyr.nectar",
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    ),
    (
        "UltraFeedback, binarized",
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [turn("user", "q"), turn("assistant", "a")],
            "rejected": [turn("user", "q"), turn("assistant", "b")],
            "messages": [turn("user", "q"), turn("assistant", "a")],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        },
    ),
    (
        "UltraFeedback, scored",
        {
            "source": "x",
            "instruction": "q",
            "models": ["m", "n", "o"],
            "completions": [
                {"model": "m", "response": "b", "overall_score": 4.0},
                {"model": "n", "response": "a", "overall_score": 8.5},
                {"model": "o", "response": "c", "overall_score": 4.0},
            ],
        },
    ),
    (
        "Nectar",
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [
                {"answer": "b", "model": "m", "rank": 2.0},
                {"answer": "a", "model": "n", "rank": 1.0},
            ],
            "turns": 1,
        },
    ),
]


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_a_published_layout_of_preferences_is_recognized(name: str, row: dict[str, Any]) -> None:
    (found,) = preferences(row)
    assert shown(found.prompt) == ["user: q"]
    assert shown(found.completions) == ["assistant: a", "assistant: b"]


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_the_questions_of_preferences_are_prompts(
    tmp_path: Path, name: str, row: dict[str, Any]
) -> None:
    (prompt,) = prompts(tmp_path, row)
    assert "q" in prompt.question
    assert prompt.messages[-1]["role"] == "user"


LABELED: list[tuple[str, dict[str, Any]]] = [
    ("TRL, unpaired", {"prompt": "q", "completion": "a", "label": False}),
    (
        "TRL, unpaired and conversational",
        {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")], "label": False},
    ),
    ("Axolotl, KTO, chatml.argilla", {"instruction": "q", "completion": "a", "label": False}),
    ("Axolotl, KTO, chatml.intel", {"question": "q", "completion": "a", "label": False}),
    (
        "Axolotl, KTO, llama3.argilla_chat",
        {"completion": [turn("user", "q"), turn("assistant", "a")], "label": False},
    ),
    (
        "LLaMA-Factory, KTO demo",
        {"messages": [turn("user", "q"), turn("assistant", "a")], "label": False},
    ),
    (
        "LLaMA-Factory, Alpaca",
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
    ),
    (
        "LLaMA-Factory, ShareGPT",
        {"conversations": [said("human", "q"), said("gpt", "a")], "kto_tag": False},
    ),
]


@pytest.mark.parametrize(("name", "row"), LABELED)
def test_a_published_layout_of_labeled_completions_is_recognized(
    name: str, row: dict[str, Any]
) -> None:
    (found,) = preferences(row, labeled=True)
    assert (shown(found.prompt), shown(found.completions), found.label) == (
        ["user: q"],
        ["assistant: a"],
        0.0,
    )


def test_an_implicit_prompt_ends_before_the_word_that_differs() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    explicit = {"prompt": "The sky is", "chosen": "blue.", "rejected": "black."}
    assert preferences(row) == preferences(explicit)
    assert len(preferences(row, labeled=True)) == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "Yes.", "rejected": "No."}, "do not begin with it"),
        ({"chosen": "The lamp.", "rejected": "The desk.", "query": "q"}, "{prompt: query}"),
        ({"chosen": "a", "rejected": "b", "system": "s", "input": "q"}, "{prompt: input}"),
    ],
    ids=["no common beginning", "another column", "Axolotl, chatml.icr"],
)
def test_a_pair_whose_prompt_may_be_in_another_column_has_no_implicit_one(
    row: dict[str, Any], problem: str
) -> None:
    """The first words of two answers would be taken for the question."""
    with pytest.raises(RowError) as caught:
        preferences(row)
    assert problem in str(caught.value)
    assert caught.value.fault == "UnknownShape"


def test_a_manifest_can_name_the_layouts_of_preferences_that_are_read() -> None:
    names = {layout.name for layout in layouts.layouts("preferences")}
    assert set(PREFERENCE_FORMATS) == {"auto", *names}


def test_preferences_hold_calls_of_tools() -> None:
    row = {
        "prompt": [turn("user", "q")],
        "chosen": [turn("assistant", None, tool_calls=[OPENAI_CALL])],
        "rejected": [turn("assistant", "b")],
        "tools": [WEATHER],
    }
    (found,) = preferences(row)
    assert found.completions[0].calls[0].arguments == {"city": "Paris"}
    assert found.examples[0].tools == TOOLS


def test_a_completion_of_several_turns_is_named_as_such() -> None:
    """It was said to begin with another prompt."""
    steps = [turn("assistant", "Wait."), turn("tool", "3"), turn("assistant", "3")]
    row = {"prompt": "1 + 2?", "chosen": steps, "rejected": [turn("assistant", "4")]}
    with pytest.raises(RowError, match="chosen has 3 turns after the prompt"):
        preferences(row)


def test_answers_may_differ_in_their_reasoning_alone() -> None:
    """They were refused as the same completion."""
    answers = [[turn("assistant", "4", reasoning_content=why)] for why in ("2 + 2", "2 x 3")]
    (found,) = preferences({"prompt": "2 + 2?", "chosen": answers[0], "rejected": answers[1]})
    assert [each.reasoning for each in found.completions] == ["2 + 2", "2 x 3"]
    with pytest.raises(RowError, match="the same completion"):
        preferences({"prompt": "2 + 2?", "chosen": answers[0], "rejected": answers[0]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"prompt": [turn("user", "q")]},
        {"prompt": [turn("user", "q")], "tools": [WEATHER]},
    ],
    ids=["TRL", "TRL, conversational", "TRL, with tools"],
)
def test_prompts_alone_are_prompts_and_no_training_rows(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    (prompt,) = prompts(tmp_path, row)
    assert prompt.question == "q"
    assert prompt.tools == (TOOLS if "tools" in row else ())
    with pytest.raises(StageError, match=r"prompt-completion .* has no completion"):
        list(stream(tmp_path, row))


def test_openais_reinforcement_rows_are_prompts_with_their_fields(tmp_path: Path) -> None:
    row = {"messages": [turn("developer", "s"), turn("user", "q")], "reference_answer": {"x": 1}}
    (prompt,) = prompts(tmp_path, row)
    assert [each["role"] for each in prompt.messages] == ["system", "user"]
    assert prompt.row["reference_answer"] == {"x": 1}


def post(key: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": key, "parent_id": parent, "role": role, "text": key, **more}


TREE = post("q", None, "prompter") | {
    "replies": [
        post("b", "q", "assistant", rank=1) | {"replies": []},
        post("a", "q", "assistant", rank=0)
        | {
            "replies": [
                post("r", "a", "prompter")
                | {"replies": [post("c", "r", "assistant", rank=0) | {"replies": []}]}
            ]
        },
    ]
}


def test_a_tree_gives_its_best_conversation_or_all_of_them(tmp_path: Path) -> None:
    best = ["user: q", "assistant: a", "user: r", "assistant: c"]
    assert shown(read(tmp_path, TREE).messages) == best
    every = [shown(example.messages) for example in stream(tmp_path, TREE, paths="all")]
    assert every == [["user: q", "assistant: b"], best]


def test_the_ranks_of_a_tree_are_preferences() -> None:
    (found,) = preferences(TREE)
    assert shown(found.prompt) == ["user: q"]
    assert shown(found.completions) == ["assistant: a", "assistant: b"]


def test_answers_of_one_rank_are_no_preference() -> None:
    tied = [post(name, "q", "assistant", rank=0) | {"replies": []} for name in "ab"]
    assert preferences(post("q", None, "prompter") | {"replies": tied}) == []
    third = post("c", "q", "assistant", rank=1) | {"replies": []}
    (found,) = preferences(post("q", None, "prompter") | {"replies": [third, *tied]})
    assert shown(found.completions) == ["assistant: a", "assistant: c"]


@pytest.mark.parametrize("score", [10**400, float("inf"), float("nan")])
def test_a_score_that_is_no_finite_number_is_refused(score: float) -> None:
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [score, 1]}
    with pytest.raises(RowError, match="every answer needs a score"):
        preferences(row)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": score}
    assert preferences(pair | {"score_rejected": 1})[0].margin is None


def test_a_circle_of_many_messages_is_found_in_their_number_of_steps() -> None:
    """60,000 messages took minutes when each walked around the whole circle."""
    many = 60_000
    rows = [Row(i, post(str(i), str((i + 1) % many), "prompter")) for i in range(many)]
    found = list(link_messages(rows))
    assert len(found) == many
    assert all("its own ancestor" in getattr(row.value, "reason", "") for row in found)


def test_a_circle_of_replies_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [
        post("q", None, "prompter"),
        post("a", "q", "assistant"),
        post("x", "y", "prompter"),
        post("y", "x", "assistant"),
    ]
    with pytest.raises(StageError, match=r"row 3: message_id x is its own ancestor") as caught:
        list(stream(tmp_path, *rows))
    assert "2 of 4 rows" in caught.value.message


def renamed(value: Any, old: str, new: str) -> Any:
    """Return a row whose key has another name, in nested objects too."""
    if isinstance(value, list):
        return [renamed(each, old, new) for each in value]
    if not isinstance(value, dict):
        return value
    return {new if key == old else key: renamed(part, old, new) for key, part in value.items()}


QUESTION = {"text": "q", "role": "prompter", "message_id": "1", "parent_id": None}
REPLIES = [
    {"text": text, "role": "assistant", "rank": rank, "message_id": text, "parent_id": "1"}
    for text, rank in (("a", 1), ("b", 0))
]
LEFT_OUT = [
    REPLIES[0] | {"text": "c", "deleted": True, "rank": -1},
    REPLIES[0] | {"text": "d", "review_result": False, "rank": -2},
]
RANKED = QUESTION | {"replies": [*REPLIES, *LEFT_OUT]}
READ_WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("training", {"messages": [turn("user", "q"), turn("assistant", "a")], "tools": [*TOOLS]}),
    ("training", {"instruction": "q", "input": "i", "output": "a", "system": "s"}),
    ("training", {"instruction": "q", "output": "a", "history": [["x", "y"]]}),
    ("training", {"instruction": "q", "instances": [{"input": "i", "output": "a"}]}),
    ("training", {"instruction": "q", "context": "c", "response": "a"}),
    ("training", {"inputs": "q", "targets": "a"}),
    ("training", {"system_prompt": "s", "question": "q", "response": "a"}),
    ("training", {"conversations": [said("human", "q"), said("gpt", "a")], "system": "s"}),
    ("training", {"prompt": RANKED}),
    ("training", {"data": ["q", "a"]}),
    ("training", {"prompt": "q", "completion": "a", "expected": "a"}),
    ("training", {"text": "t"}),
    ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.8}),
    (
        "preferences",
        {"question": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
    ),
    (
        "preferences",
        {
            "input": {"messages": [turn("user", "q")], "tools": [*TOOLS]},
            "preferred_output": [turn("assistant", "a")],
            "non_preferred_output": [turn("assistant", "b")],
        },
    ),
    ("preferences", {"prompt": "q", "answers": ["a", "b"], "ranks": [2, 1]}),
    ("preferences", {"prompt": "q", "answers": ["a", "b"], "scores": [2, 1]}),
    (
        "preferences",
        {"prompt": "q", "answers": [{"generation": t, "rank": r} for t, r in (("a", 2), ("b", 1))]},
    ),
    (
        "preferences",
        {"prompt": "q", "answers": [{"response": t, "rating": r} for t, r in (("a", 1), ("b", 2))]},
    ),
    ("preferences", {"prompt": "q", "completion": "a", "kto_tag": True}),
    ("preferences", RANKED),
]
"""Rows of each layout all of whose columns are read."""


@pytest.mark.parametrize(("purpose", "row"), READ_WHOLE)
def test_each_column_of_each_layout_has_a_field_that_renames_it(
    purpose: Purpose, row: dict[str, Any]
) -> None:
    """A column that a reader looks up by its published name alone fails here."""

    def read(value: dict[str, Any], fields: FieldMap, name: Any) -> Any:
        (joined,) = layouts.joined([Row(1, value)], name, fields)
        assert not isinstance(joined.value, BrokenRow)
        layout = layouts.layout_of(name, purpose, fields)
        return layouts.read(joined.value, layout, layout.names(fields))

    layout = layouts.match(row, purpose, FieldMap())
    assert layout is not None
    known = read(row, FieldMap(), layout.name)
    assert known

    def keys(value: Any) -> set[str]:
        parts = value.values() if isinstance(value, dict) else value
        nested = [keys(part) for part in parts if isinstance(part, dict | list)]
        return {*(value if isinstance(value, dict) else ()), *(k for ks in nested for k in ks)}

    unnamed = {"message_id", "parent_id"} if "replies" in keys(row) else set()
    for column in keys(row) - keys(TOOLS) - unnamed:
        inner = {"role": ("role", "from"), "content": ("content", "value")}
        fields = [
            field
            for field in layout.fields
            if column in (*layout.fields[field], *inner.get(field, ()))
        ]
        assert fields, f"no field of {layout.name} names {column}"
        other = renamed(row, column, f"x_{column}")
        assert read(other, FieldMap(**{fields[0]: f"x_{column}"}), layout.name) == known, column


def test_the_messages_of_a_tree_can_have_any_names(tmp_path: Path) -> None:
    names = {"message_id": "key", "parent_id": "of", "role": "who", "text": "body", "rank": "r"}
    rows = [QUESTION, *REPLIES]
    for old, new in names.items():
        rows = [renamed(row, old, new) for row in rows]
    rows = [row | {"text": "another column"} for row in rows]
    fields = {"id": "key", "parent": "of", "role": "who", "text": "body", "rank": "r"}
    (example,) = stream(tmp_path, *rows, fields=fields)
    assert shown(example.messages) == ["user: q", "assistant: b"]


@pytest.mark.parametrize("field", sorted(FieldMap.model_fields))
def test_each_field_belongs_to_a_layout(field: str) -> None:
    assert any(field in layout.fields for layout in layouts.LAYOUTS)


def test_a_field_whose_column_no_row_has_is_named(tmp_path: Path) -> None:
    rows = [
        {"ask": "q", "reply": "a", "tools": None},
        {"ask": "q", "reply": "b", "rules": "Be brief."},
    ]
    fields = {"prompt": "ask", "completion": "reply", "system": "rules", "tools": "functoins"}
    found = stream(tmp_path, *rows, fields=fields)
    assert len(list(found)) == 2
    assert found.summary.absent == ("fields.tools: functoins",)
    turns = [{"who": "user", "content": "q"}, {"who": "assistant", "content": "a"}]
    inner = stream(tmp_path, {"messages": turns}, fields={"role": "who"})
    list(inner)
    assert inner.summary.absent == (), "keys of turns are found in the turns"
    asked = turn("user", "q", rules="Be brief.")
    row = {"messages": [asked, turn("assistant", "a")]}
    named = stream(tmp_path, row, fields={"system": "rules"})
    list(named)
    assert named.summary.absent == ("fields.system: rules",), "a column is no key of a turn"


def test_a_column_of_trees_that_no_message_has_is_named(tmp_path: Path) -> None:
    """Deleted answers would be trained on, and nothing would say so."""
    flat = [renamed(row, "text", "body") for row in (QUESTION, *REPLIES)]
    fields = {"text": "body", "deleted": "removd", "rank": "rank"}
    found = stream(tmp_path, *flat, fields=fields)
    list(found)
    assert found.summary.absent == ("fields.deleted: removd",)
    reply = {"message_id": "2", "body": "a", "role": "assistant", "kids": [], "place": 0}
    root = {"message_id": "1", "body": "q", "role": "prompter", "kids": [reply]}
    names = {"prompt": "root", "text": "body", "replies": "kids", "rank": "place", "reviewed": "ok"}
    whole = stream(tmp_path, {"root": root}, fields=names)
    list(whole)
    assert whole.summary.absent == ("fields.reviewed: ok",)


def test_ranks_that_some_answers_lack_are_refused() -> None:
    """The answers would count as written best first, and the worse one would be preferred."""
    answers = [{"text": "bad", "place": 2}, {"text": "good", "place": None}]
    with pytest.raises(RowError, match="place must hold each of 1 to 2 once"):
        preferences({"prompt": "q", "answers": answers}, rank="place")


def test_scores_that_the_manifest_names_have_precedence_over_ranks() -> None:
    """A column that happened to be named `rank` decided, and the named one was not read."""
    answers = [{"text": "a", "points": 1, "rank": 1}, {"text": "b", "points": 9, "rank": 2}]
    row = {"prompt": "q", "answers": answers}
    (found,) = preferences(row, score="points")
    assert (shown(found.completions), found.margin) == (["assistant: b", "assistant: a"], 8.0)
    (found,) = preferences(row, score="points", rank="rank")
    assert shown(found.completions) == ["assistant: a", "assistant: b"]
    whole = {"prompt": "q", "answers": ["a", "b"], "ranks": [1, 2], "points": [1, 9]}
    (found,) = preferences(whole, scores="points")
    assert shown(found.completions) == ["assistant: b", "assistant: a"]


def test_a_named_layout_of_preferences_refuses_a_field_that_it_does_not_have() -> None:
    row, fields = Row(1, {"prompt": "q", "chosen": "a", "rejected": "b"}), FieldMap(scores="s")
    with pytest.raises(StageError, match=r"fields\.scores is 's', and format preference has no"):
        parse_preferences(row, fields, labeled=False, chosen="preference")


def test_keys_of_turns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    asked = turn("user", "q", lang="en", note=None)
    found = stream(tmp_path, {"messages": [asked, turn("assistant", "a", weight=1, score=3)]})
    list(found)
    assert found.summary.unread == ("messages[].lang", "messages[].score")


def test_fields_name_every_column_of_a_layout() -> None:
    row = {"ask": "q", "good": "a", "bad": "b", "about": "s"}
    (found,) = preferences(row, prompt="ask", chosen="good", rejected="bad", system="about")
    assert shown(found.prompt) == ["system: s", "user: q"]
    assert shown(found.completions) == ["assistant: a", "assistant: b"]
    row = {"ask": "q", "tries": ["b", "a"], "points": [1, 2]}
    (found,) = preferences(row, prompt="ask", answers="tries", scores="points")
    assert shown(found.completions) == ["assistant: a", "assistant: b"]
    row = {"ask": "q", "reply": "a", "liked": True}
    (found,) = preferences(row, labeled=True, prompt="ask", completion="reply", label="liked")
    assert found.label == 1.0


def test_the_keys_of_turns_can_be_named(tmp_path: Path) -> None:
    row = {"dialog": [{"who": "user", "said": "q"}, {"who": "bot", "said": "a"}]}
    fields = {"messages": "dialog", "role": "who", "content": "said"}
    assert shown(read(tmp_path, row, fields=fields).messages) == QA


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "generation": "a"}, ["prompt-completion", "{completion: generation}"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["preference", "spec.preferences"]),
        (
            {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
            ["process reward model"],
        ),
        ({"segments": [{"label": True, "text": "a"}]}, ["{role, content, train}"]),
        (
            {"messages": [{"user": "q", "assistant": "a"}]},  # Axolotl's load_ultrachat
            ["messages[0] has user, assistant", "fields: {role: ..., content: ...}"],
        ),
        (
            {"messages": '[{"role": "user", "content": "q"}]'},  # a cell of a table
            ["messages is a text", "as JSONL, with messages as a list"],
        ),
    ],
)
def test_a_shape_that_is_not_read_is_named_with_the_nearest_layout(
    tmp_path: Path, row: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(StageError) as caught:
        list(stream(tmp_path, row))
    assert caught.value.reason == "UnknownFormat"
    assert all(word in f"{caught.value.message} {caught.value.advice}" for word in words)
    assert all(column in caught.value.message for column in row)


def test_steps_with_labels_are_no_ranking() -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
    with pytest.raises(RowError, match="process reward model"):
        preferences(row)


def test_rows_of_several_layouts_are_refused_by_their_rows(tmp_path: Path) -> None:
    chat = {"messages": [turn("user", "q"), turn("assistant", "a")]}
    pair = {"prompt": "q", "completion": "a"}
    with pytest.raises(StageError, match=r"messages \(rows.jsonl row 1\)") as caught:
        stream(tmp_path, chat, chat, pair)
    assert "prompt-completion (rows.jsonl row 3)" in caught.value.message
    assert "data set of its own" in caught.value.advice
    with pytest.raises(StageError, match=r"row 26: messages must be .* this row prompt-completion"):
        list(stream(tmp_path, *[chat] * 25, pair))


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
class TestPublicData:
    def test_gsm8k_is_recognized(self) -> None:
        settings = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
        path = SHARED / "gsm8k-test-500.jsonl"
        found = examples(path, settings, on_invalid="error", name="data")
        assert len(list(found)) == 500
        assert found.summary.format == "question-answer"

    def test_every_conversation_of_openassistants_trees(self) -> None:
        path = SHARED / "oasst-en-100-messages.jsonl.gz"
        counts = []
        for paths in (None, "all"):
            settings = DatasetSettings(
                format="auto",
                fields=FieldMap(),
                weight=1.0,
                limit=None,
                paths=paths,  # type: ignore[arg-type]
            )
            counts.append(len(list(examples(path, settings, on_invalid="error", name="data"))))
        assert counts[1] > 2 * counts[0] > 0

    def test_hh_rlhf_has_prompts_and_pairs(self) -> None:
        path = SHARED / "hh-rlhf-harmless-base.jsonl.gz"
        found, faults = [], set()
        for row in read_data(path):
            try:
                found += parse_preferences(row, FieldMap(), labeled=False)
            except RowError as error:
                faults.add(error.fault)
        assert len(found) > 1750
        assert "UnknownShape" not in faults

    def test_mt_benchs_questions_are_named_with_what_is_expected(self) -> None:
        settings = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
        with pytest.raises(StageError) as caught:
            examples(SHARED / "mt-bench-questions.jsonl", settings, on_invalid="error", name="data")
        assert caught.value.reason == "UnknownFormat"
        assert "turns" in caught.value.message


def test_without_reasoning_only_a_block_at_the_start_of_a_text_is_left_out() -> None:
    def kept(text: str) -> str:
        return str(template_turns([Message("assistant", text)], reasoning=False)[0]["content"])

    assert kept("\n<think>hm</think>\n\nWrite it.") == "Write it."
    assert kept("Write <think>hm</think> first.") == "Write <think>hm</think> first."
