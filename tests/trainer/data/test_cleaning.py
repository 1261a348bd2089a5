"""Cleaning: each rule finds what is planted, names it, and leaves clean rows alone."""

from __future__ import annotations

import json
import random
import string
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.chat_templates import CHATML
from tests.trainer.data.test_prepare import DATASET, Job, Row, chat, chats
from tuneyard.api.cleaning import Clean, PersonalData
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.findings import Cleaned
from tuneyard_trainer.data.cleaning.personal_data import is_iban, is_luhn
from tuneyard_trainer.data.cleaning.words import words
from tuneyard_trainer.data.reading.example import Example, Message, ToolCall

SHARED = Path(__file__).parents[4] / "shared" / "data"
STORY = (
    "The keeper of the old lighthouse climbed the winding stairs each evening to light the great "
    "lamp, and the ships far out on the dark water steered by it. One night the oil ran out. He "
    "walked to the village in the rain, woke the grocer, and carried two heavy cans back up the "
    "hill before the first sail appeared on the horizon."
)


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Job:
    return Job(tmp_path, tiny_model_dir)


def row(*texts: str) -> Example:
    roles = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))  # type: ignore[arg-type]
    return Example(1, "chat", turns)


def cleaned(example: Example, **clean: Any) -> Cleaned:
    return Cleaner.of(Clean(**clean))(example)


def rules(example: Example, **clean: Any) -> list[str]:
    return [finding.rule for finding in cleaned(example, **clean).findings]


# ---- personal data ------------------------------------------------------------------------------

PLANTED = {
    "email": "write to ada.lovelace@analytical-engines.co.uk today",
    "phone": "call +49 30 901820 or come by",
    "card": "pay with 4111 1111 1111 1111 until May",
    "iban": "send it to DE89 3704 0044 0532 0130 00 TODAY",
    "key": "export TOKEN=hf_" + "Ab3" * 11,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_personal_data_is_found_and_named(kind: str) -> None:
    example = row("How do I reach you?", PLANTED[kind])
    result = cleaned(example, personal_data=PersonalData())
    assert [finding.rule for finding in result.findings] == [f"personalData.{kind}"]
    assert result.findings[0].action == "reported"
    assert result.example is example
    assert result.removed_by is None


@pytest.mark.parametrize("kind", PLANTED)
def test_an_example_of_what_was_found_does_not_show_it(kind: str) -> None:
    """Records and reports are read by more people than the data."""
    everything = "; ".join(PLANTED.values())
    result = cleaned(row("Hi.", everything * 3), personal_data=PersonalData())
    for finding in result.findings:
        assert len(finding.excerpt) <= 120
        for secret in ("ada.lovelace", "901820", "1111", "0532", "Ab3Ab3"):
            assert secret not in finding.excerpt
    shown = {finding.rule: finding.excerpt for finding in result.findings}
    assert f"[{kind.upper()}]" in shown[f"personalData.{kind}"]


def test_redacted_data_leaves_a_placeholder_in_every_text_of_the_row() -> None:
    """A completion's text is there twice: as its turns and as prompt and completion."""
    turns = (
        Message("user", "Mail ada@engines.org."),
        Message("assistant", "Mail ada@engines.org."),
    )
    example = Example(1, "completion", turns, turns[0].content, turns[1].content)
    result = cleaned(example, personal_data=PersonalData(email="redact"))
    assert [turn.content for turn in result.example.messages] == ["Mail [EMAIL]."] * 2
    assert (result.example.prompt, result.example.completion) == ("Mail [EMAIL].",) * 2
    assert result.findings[0].action == "rewritten"


QUESTION, ANSWER = Message("user", "Mail it."), Message("assistant", "Done.")
EMAIL = "ada@engines.org"


def with_call(**arguments: Any) -> tuple[Message, ...]:
    call = Message("assistant", "", (ToolCall("send_mail", arguments, "call_1"),))
    return QUESTION, call, Message("tool", "Sent.", call_id="call_1"), ANSWER


@pytest.mark.parametrize(
    "example",
    [
        Example(1, "chat", with_call(to=EMAIL)),
        Example(1, "chat", with_call(message={"to": [{"address": f"<{EMAIL}>"}]})),
        Example(1, "chat", with_call(text=f"To:\n{EMAIL}")),
        Example(1, "chat", with_call(names={EMAIL: "Ada"})),
        Example(1, "chat", (QUESTION, Message("assistant", "Done.", reasoning=f"To {EMAIL}."))),
        Example(1, "chat", (*with_call()[:2], Message("tool", f"Sent to {EMAIL}."), ANSWER)),
        Example(1, "chat", (QUESTION, ANSWER), expected=("Done.", EMAIL)),
        Example(
            1,
            "chat",
            (QUESTION, ANSWER),
            tools=({"type": "function", "function": {"name": "f", "description": EMAIL}},),
        ),
    ],
    ids=["argument", "nested", "line", "name", "reasoning", "result", "expected", "tool"],
)
def test_personal_data_is_redacted_wherever_a_row_has_it(example: Example) -> None:
    result = cleaned(example, personal_data=PersonalData(email="redact"))
    assert [found.rule for found in result.findings] == ["personalData.email"]
    assert EMAIL not in repr(result.example)
    assert repr(example).replace(EMAIL, "[EMAIL]") == repr(result.example)
    dropped = cleaned(example, personal_data=PersonalData(email="drop"))
    assert dropped.removed_by == "personalData.email"


def test_a_number_in_a_call_is_redacted_only_if_it_is_personal_data() -> None:
    example = Example(
        1, "chat", with_call(card=4111111111111111, amount=12.5, count=3, urgent=True)
    )
    result = cleaned(example, personal_data=PersonalData(card="redact"))
    (call,) = result.example.messages[1].calls
    assert call.arguments == {"card": "[CARD]", "amount": 12.5, "count": 3, "urgent": True}
    assert call.arguments["urgent"] is True
    assert (call.name, call.id) == ("send_mail", "call_1")


def test_calls_count_as_words_of_a_row() -> None:
    example = Example(1, "chat", with_call(subject="one two three four five six"))
    assert rules(example, min_words=12) == []
    assert rules(Example(1, "chat", with_call()), min_words=12) == ["length.minWords"]


def test_rows_with_data_to_drop_are_removed() -> None:
    result = cleaned(row("Hi.", PLANTED["iban"]), personal_data=PersonalData(iban="drop"))
    assert result.removed_by == "personalData.iban"


def test_ignored_data_is_not_searched() -> None:
    assert rules(row("Hi.", PLANTED["email"]), personal_data=PersonalData(email="ignore")) == []


@pytest.mark.parametrize(
    "text",
    [
        "write to someone@example.com, or to test@mail.example.org",
        "the ratio is 3.14159265358979323846 and 1234-5678",
        "pay with 4111 1111 1111 1112",
        "the number 0000 0000 0000 0000 is no card",
        "send it to DE89 3704 0044 0532 0130 01",
        "from 1990-2000 to 2010-2020, 10.000.000 people, ISBN 978-3-16-148410-0",
        "id 550e8400-e29b-41d4-a716-446655440000, commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
        "task-management-systems-and-risk-assessments 2, sk-learn",
        "def f(x): return x @ y  # 192.168.100.200:8080",
        "at 2024-05-06T07:08:09+02:00, 1,234,567,890.12 dollars",
        "logo@2x.png and getty@tty1.service",
        "order NO9386011117947ABC",
        "the bar code 4006381334013",
        "y = x@self.weight + b",
        "y = x@self.data",
        "scores = q@k.to(device)",
        "scores = q@k.data.to(device)",
        "git clone git@github.com:acme/lamps.git",
        "log in as git@github.com",
        '<div class="sk-toggleable__label-arrow:before{margin:0.25em}">',
        ".sk-cube-grid-animation .sk-cube-4-delayed-by-2 {margin: 3px}",
        "sk-Button-primaryLarge2-withIcon, sk-col-12-sm-6-md-4-lg-3-xl-2",
        "github_pat_token_environment_variable_name_2",
        "xoxb-your-own-token-goes-here-2",
        "hf_modelConfigurationLoader2",
        "ASIAPACIFICREGIONSALES2024",
        "sk-" + "x" * 40 + "1",
    ],
)
def test_texts_that_are_no_personal_data_are_left_alone(text: str) -> None:
    assert rules(row("Hi.", text), personal_data=PersonalData()) == []


@pytest.mark.parametrize(
    "address",
    [
        "ada@engines.museum",
        "ada@mail.corp",
        "ADA@ENGINES.ORG",
        "<ada@engines.io>(work)",
        "gitta@engines.org",
        "self@engines.org",
        "ada@selfmade.data",
    ],
)
def test_addresses_that_look_like_code_are_found(address: str) -> None:
    assert rules(row("Hi.", f"Write to {address}."), personal_data=PersonalData()) == [
        "personalData.email"
    ]


ALPHANUMERIC = string.ascii_letters + string.digits


@pytest.mark.parametrize(
    ("start", "characters", "length"),
    [
        ("hf_", string.ascii_letters, 34),
        ("sk-", ALPHANUMERIC, 48),
        ("sk-", "0123456789abcdef", 32),
        ("sk-proj-", ALPHANUMERIC + "-_", 120),
        ("sk-ant-api03-", ALPHANUMERIC + "-_", 95),
        ("ghp_", ALPHANUMERIC, 36),
        ("github_pat_", ALPHANUMERIC, 82),
        ("glpat-", ALPHANUMERIC + "-_", 20),
        ("AIza", ALPHANUMERIC + "-_", 35),
        ("AKIA", string.ascii_uppercase + "234567", 16),
        ("xoxb-123456789012-", ALPHANUMERIC, 24),
    ],
)
def test_random_keys_of_each_service_are_found(start: str, characters: str, length: int) -> None:
    """At least 90 of 100: one in fifteen of AWS and of GitLab has no digit."""
    chance, found = random.Random(0), 0
    for _ in range(100):
        key = start + "".join(chance.choice(characters) for _ in range(length))
        found += bool(rules(row("Hi.", f"export TOKEN={key}"), personal_data=PersonalData()))
    assert found >= 90


def test_digits_without_end_are_searched_in_their_number_of_steps() -> None:
    """1,000 of them took 7 s: every way to cut the digits into groups was tried."""
    text = ("+" + "1" * 40 + " ") * 2_000
    start = time.process_time()
    assert rules(row("Hi.", text), personal_data=PersonalData()) == []
    assert time.process_time() - start < 3


def test_no_value_of_a_call_is_lost_if_two_of_its_names_are_redacted() -> None:
    call = ToolCall("count", {"ada@engines.org": 1, "charles@engines.org": 2})
    turns = (QUESTION, Message("assistant", "", (call,)), Message("tool", "3"), ANSWER)
    result = cleaned(Example(1, "chat", turns), personal_data=PersonalData(email="redact"))
    assert result.example.messages[1].calls[0].arguments == {"[EMAIL]": 1, "[EMAIL]_": 2}


def test_words_have_their_vowels_in_every_script() -> None:
    """Without them, words that differ in a vowel alone are equal, and one word is many."""
    assert words("हिन्दी में की, का") == ["हिन्दी", "में", "की", "का"]
    assert words("مَرْحَبًا שָׁלוֹם") == ["مَرْحَبًا", "שָׁלוֹם"]
    assert words("தமிழ் cafe\u0301") == ["தமிழ்", "cafe\u0301"]
    assert words("漢字 and 仮名") == ["漢", "字", "and", "仮", "名"]


@pytest.mark.parametrize("end", ["।", "؟", "።"])
def test_lines_may_end_with_the_marks_of_their_script(end: str) -> None:
    lines = "\n".join(f"यह एक काफी लंबा वाक्य है जो समाप्त होता है {i}{end}" for i in range(5))
    assert rules(row(lines, f"और एक लंबा वाक्य जो कहीं समाप्त होता है{end}"), quality=["fineweb"]) == []


def test_check_digits_are_those_of_the_standards() -> None:
    """The examples of ISO/IEC 7812 and ISO 13616; any other check digit is wrong."""
    assert [digit for digit in "0123456789" if is_luhn("7992739871" + digit)] == ["3"]
    assert is_iban("GB82WEST12345698765432")
    assert not is_iban("GB83WEST12345698765432")


# ---- encoding, language, length -----------------------------------------------------------------


def test_mojibake_is_repaired_and_the_rest_stays() -> None:
    text = "The cafÃ© â€œLâ€™Ã©toileâ€\x9d &amp; bar"
    result = cleaned(row("Where?", text), repair_encoding=True)
    assert result.example.messages[1].content == "The café “L\u2019étoile” &amp; bar"
    assert result.findings[0].rule == "encoding.mojibake"
    plain = row("Où?", "Le café “L\u2019étoile” — naïve, 日本語, <b>&lt;</b>")
    assert cleaned(plain, repair_encoding=True).example is plain


def test_rows_in_another_language_are_removed_unless_they_are_short() -> None:
    german = "Der Leuchtturmwärter stieg jeden Abend die Treppe hinauf, um die Lampe anzuzünden."
    found = cleaned(row("Was tat er?", german), languages=["en", "fr"])
    assert found.removed_by == "language.other"
    assert found.findings[0].excerpt.startswith("de (")
    assert rules(row("Was tat er?", german), languages=["de"]) == []
    assert rules(row("Was?", "Ja, gern."), languages=["en"]) == []
    assert rules(row("What did he do?", STORY), languages=["en"]) == []


def test_code_blocks_do_not_decide_about_the_language() -> None:
    code = "```python\n" + "für_alle = lambda wert: [zähler for zähler in wert]\n" * 20 + "```"
    assert rules(row("Explain this code to me, please.", STORY + code), languages=["en"]) == []


def test_a_language_that_is_not_known_is_refused() -> None:
    with pytest.raises(StageError, match="names xx") as caught:
        cleaned(row("Hi.", "Ho."), languages=["en", "xx"])
    assert caught.value.reason == "UnknownLanguage"
    assert "de, " in caught.value.advice


def test_rows_outside_the_limits_of_words_are_removed() -> None:
    """A system turn is no part of the length."""
    assert rules(row("One two?", "Three."), min_words=4) == ["length.minWords"]
    assert rules(row("One two?", "Three."), min_words=3, max_words=3) == []
    assert rules(row("One two?", "Three."), max_words=2) == ["length.maxWords"]
    turns = (Message("system", "Be kind and brief."), *row("One two?", "Three.").messages)
    assert rules(Example(1, "chat", turns), max_words=3) == []


# ---- quality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("\n".join([STORY, STORY, "End."]), "repetition.lines"),
        (f"{STORY}\n\nNo.\n\n{STORY}\n\nNo.", "repetition.lines"),
        (STORY + " yes no" * 30, "repetition.top2Words"),
        (f"{STORY} {STORY[:110]}", "repetition.sequences5Words"),
    ],
)
def test_repetition_inside_a_row_is_found(answer: str, rule: str) -> None:
    assert rules(row("Tell a story.", answer), quality=["repetition"]) == [rule]


def test_short_and_plain_rows_do_not_repeat_themselves() -> None:
    assert rules(row("Say yes.", "Yes."), quality=["repetition"]) == []
    assert rules(row("Sing.", "la " * 20), quality=["repetition"]) == []
    assert rules(row("Tell a story.", STORY), quality=["repetition"]) == []


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("Too short.", "gopher.wordCount"),
        ("a b c d e f " * 20 + STORY, "gopher.meanWordLength"),
        (STORY + " ####" * 10, "gopher.hashes"),
        (STORY + " so…" * 12, "gopher.ellipses"),
        ("\n".join(f"- {line}." for line in STORY.split(". ")) * 3, "gopher.bulletLines"),
        (STORY + " 1234 5678 4321" * 12, "gopher.wordsWithoutLetters"),
        ("Leuchtturm Treppe Lampe Abend Wasser " * 20, "gopher.stopWords"),
    ],
)
def test_each_rule_of_gopher_is_named(answer: str, rule: str) -> None:
    question = "-" if rule == "gopher.bulletLines" else "Go."
    assert rules(row(question, answer), quality=["gopher"]) == [rule]


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("\n".join(["a line without an end of any kind"] + [f"line {i} of it" for i in range(20)]),
         "fineweb.unfinishedLines"),
        ("\n".join([STORY, STORY]), "fineweb.repeatedLines"),
        ("\n".join(f"Line {number}." for number in range(60)), "fineweb.shortLines"),
    ],
)  # fmt: skip
def test_each_rule_of_fineweb_is_named(answer: str, rule: str) -> None:
    question = "A question" if rule == "fineweb.unfinishedLines" else STORY[:60]
    assert rules(row(question, answer), quality=["fineweb"]) == [rule]


def test_prose_passes_all_rules_of_quality() -> None:
    example = row("Would you please tell me a story about the sea?", STORY)
    assert rules(example, quality=["repetition", "gopher", "fineweb"]) == []


# ---- duplicates ---------------------------------------------------------------------------------


def story(chance: random.Random, words: int = 60) -> str:
    return " ".join(chance.choice(STORY.lower().split()) for _ in range(words))


def test_planted_duplicates_are_found_across_data_sets(job: Job) -> None:
    """The near one has one word replaced, is in another data set and at another position."""
    chance = random.Random(0)
    first = [chat(f"Story {i}?", story(chance, 60)) for i in range(20)]
    original = first[3]["messages"][1]["content"]
    near = chat("Story 3?", original.replace(original.split()[30], "sparrow", 1))
    second = [*chats(4), near, first[7], *chats(9)[4:]]
    outcome = job.run(
        {"train.0": first, "train.1": second},
        train=[DATASET] * 2,
        clean=Clean(duplicates="near"),
    )
    ledger = outcome.details["ledger"]
    assert ledger["sources"][0]["rows"]["duplicate"] == {}
    assert ledger["sources"][1]["rows"]["duplicate"] == {"exact": 1, "near": 1}
    assert outcome.metrics["rows"] == 29
    assert outcome.metrics["duplicateRows"] == 2
    found = outcome.details["cleaning"]
    (exact,) = found["duplicates.exact"]["examples"]
    (planted,) = found["duplicates.near"]["examples"]
    assert exact["where"] == "spec.data.train.1 train.1.jsonl row 6"
    assert exact["text"].startswith("100% as in spec.data.train.0 train.0.jsonl row 8: ")
    assert planted["where"] == "spec.data.train.1 train.1.jsonl row 5"
    assert "as in spec.data.train.0 train.0.jsonl row 4: " in planted["text"]


def test_only_exact_duplicates_are_removed_if_no_others_are_asked_for(job: Job) -> None:
    chance = random.Random(0)
    text = story(chance)
    rows = [chat("Story?", text), chat("Story?", text + " and"), chat("Story?", text + " ")]
    outcome = job.train(rows, clean=Clean(duplicates="exact"))
    assert outcome.details["ledger"]["total"]["rows"]["duplicate"] == {"exact": 1}
    assert len(job.data.train) == 2


def test_rows_that_only_share_a_system_prompt_or_a_form_are_no_duplicates(job: Job) -> None:
    system = {"role": "system", "content": STORY[:120]}
    rows: list[Row] = [{"messages": [system, *each["messages"]]} for each in chats(12)]
    outcome = job.train(rows, clean=Clean(duplicates="near"))
    assert outcome.metrics["duplicateRows"] == 0


def test_rows_with_another_system_prompt_are_no_duplicates(job: Job) -> None:
    rows: list[Row] = [
        {"messages": [{"role": "system", "content": content}, *chat("Hi?", STORY[:99])["messages"]]}
        for content in ("Be kind.", "Be brief.", "Be kind.")
    ]
    outcome = job.train(rows, clean=Clean(duplicates="near"))
    assert outcome.details["ledger"]["total"]["rows"]["duplicate"] == {"exact": 1}


def with_tool(name: str, call_id: str, value: str = "here") -> Row:
    function = {"name": name, "parameters": {}}
    call = {"name": name, "arguments": json.dumps({"place": value})}
    return {
        "messages": [
            {"role": "user", "content": STORY[:40]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": call_id, "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": call_id, "content": "Sunny."},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [{"type": "function", "function": function}],
    }


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_the_ids_of_calls_make_no_row_different_and_its_tools_do(job: Job, kind: str) -> None:
    """Every log has other ids. With other tools, the same question teaches another behavior."""
    rows = [with_tool("weather", "call_a1"), with_tool("weather", "call_b2"), with_tool("sky", "c")]
    other = with_tool("weather", "call_d")
    other["tools"] = with_tool("sky", "call_d")["tools"]
    clean = Clean(duplicates="near" if kind == "near" else "exact")
    outcome = job.train([*rows, other], clean=clean, chat_template=CHATML)
    assert outcome.details["ledger"]["total"]["rows"]["duplicate"] == {"exact": 1}
    assert outcome.metrics["rows"] == 3


def test_calls_with_other_values_are_no_exact_duplicates(job: Job) -> None:
    rows = [with_tool("weather", "call_a", "here"), with_tool("weather", "call_a", "there")]
    outcome = job.train(rows, clean=Clean(duplicates="exact"), chat_template=CHATML)
    assert outcome.metrics["duplicateRows"] == 0


def test_held_out_rows_are_searched_for_duplicates_too(job: Job) -> None:
    outcome = job.run(
        {"train.0": chats(4), "validation.0": [*chats(8)[4:], *chats(8)[4:]]},
        validation=[DATASET],
        clean=Clean(duplicates="near"),
    )
    assert outcome.metrics["heldOutRows"] == 4
    assert outcome.details["ledger"]["sources"][1]["rows"]["duplicate"] == {"exact": 4}


def test_duplicates_are_removed_before_rows_are_held_out(job: Job) -> None:
    outcome = job.train(chats(20) * 3, clean=Clean(duplicates="near"), validation_fraction=0.25)
    assert (outcome.metrics["rows"], outcome.metrics["heldOutRows"]) == (15, 5)
    assert not (job.workdir / ".spool").exists()


# ---- the stage ----------------------------------------------------------------------------------


def test_rules_are_counted_with_their_first_examples(job: Job) -> None:
    rows = [*chats(3), *[chat(f"Number {i}?", PLANTED["email"]) for i in range(5)]]
    clean = Clean(personal_data=PersonalData(email="drop", phone="redact"))
    rows.append(chat("Which lamp has number 9?", PLANTED["phone"]))
    outcome = job.train(rows, clean=clean)
    total = outcome.details["ledger"]["total"]
    assert total["rows"]["filtered"] == {"personalData.email": 5}
    assert total["tokens"]["filtered"]["personalData.email"] > 50
    assert total["changes"] == {"personalData.phone": 1}
    found = outcome.details["cleaning"]["personalData.email"]
    assert (found["action"], found["rows"], len(found["examples"])) == ("removed", 5, 3)
    assert found["examples"][0]["where"] == "spec.data.train.0 train.0.jsonl row 4"
    text = json.dumps(job.data.summary) + (job.workdir / "data.json").read_text()
    assert "ada.lovelace" not in text
    assert "901820" not in text


def test_a_redacted_row_is_trained_on_with_its_placeholder(job: Job, tiny_tokenizer: Any) -> None:
    job.train([chat("Phone?", PLANTED["phone"])], clean=Clean(
        personal_data=PersonalData(phone="redact")
    ))  # fmt: skip
    assert "call [PHONE] or come by" in tiny_tokenizer.decode(job.data.train.ids(0))


def test_the_rows_without_rules_are_those_of_0_2(job: Job) -> None:
    """The search for leaks reads rows and changes none; nothing is cleaned unasked."""
    job.run({"train.0": chats(9), "validation.0": chats(12)[9:]}, validation=[DATASET])
    arrays = {name: data for name, data in job.files().items() if name.endswith((".npy", "l"))}
    job.run({"train.0": chats(9), "validation.0": chats(12)[9:]}, validation=[DATASET], leaks="off")
    assert {name: data for name, data in job.files().items() if name in arrays} == arrays
    assert "leaks" not in job.data.summary
    assert "cleaning" not in job.data.summary


def test_if_the_rules_remove_all_rows_the_message_says_so(job: Job) -> None:
    with pytest.raises(StageError, match="3 removed by rules") as caught:
        job.train(chats(3), clean=Clean(min_words=100))
    assert caught.value.reason == "EmptyData"
    assert "spec.data.clean" in caught.value.advice


@pytest.mark.parametrize("seed", range(4))
def test_the_ledger_balances_with_rules(job: Job, seed: int) -> None:
    chance = random.Random(seed)
    rows = [
        chat(chance.choice(["Who?", "Why?", "Where is it?"]), chance.choice(
            [story(chance, chance.randint(1, 90)), *PLANTED.values(), "Yes."]
        ))
        for _ in range(80)
    ]  # fmt: skip
    outcome = job.train(
        [*chats(3), *rows],
        clean=Clean(
            duplicates="near",
            min_words=2,
            quality=["repetition"],
            personal_data=PersonalData(email="drop", card="redact"),
        ),
        validation_fraction=0.2,
        max_length=64,
        on_overlength=chance.choice(["drop", "truncate", "split"]),
        on_invalid_row="skip",
    )
    total = outcome.details["ledger"]["total"]
    assert sum(total["rows"]["duplicate"].values()) > 0
    assert sum(total["rows"]["filtered"].values()) > 0
    assert total["rows"]["in"] == 83


# ---- false alarms -------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_false_alarms_on_a_thousand_clean_rows_are_few() -> None:
    """Of real questions and answers; the counts are printed (pytest -s)."""
    path = SHARED / "gsm8k-train-1500.jsonl"
    if not path.exists():
        pytest.skip("shared/data is not beside the checkout")
    values = [json.loads(line) for line in path.open()][:1000]
    cleaner = Cleaner.of(
        Clean(
            repair_encoding=True,
            min_words=3,
            languages=["en"],
            personal_data=PersonalData(),
        )
    )
    counts: dict[str, int] = {}
    for value in values:
        for finding in cleaner(row(value["question"], value["answer"])).findings:
            counts[finding.rule] = counts.get(finding.rule, 0) + 1
    print(f"false alarms in {len(values)} rows: {counts or 'none'}")
    assert sum(counts.values()) <= 2
