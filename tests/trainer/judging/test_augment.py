"""augment: new rows from paraphrases, inverted answers and templates, marked with their origin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.jobs import manifest, planned
from tests.trainer.judge_server import Answer, JudgeServer, completion
from tests.trainer.several_workers import Notes, spawn
from tuneyard.api.cleaning import Clean, PersonalData
from tuneyard.api.plan import Plan, PlannedStage, SourceInput, TrainRuntime
from tuneyard.api.sources import FieldMap, JudgeEndpoint
from tuneyard.api.stage_settings import (
    AugmentSettings,
    DatasetSettings,
    InversionSettings,
    JudgeSettings,
    ParaphraseSettings,
)
from tuneyard.errors import StageError
from tuneyard_trainer.judging import augment, endpoint
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, emit_nothing
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

WORKER = Worker(rank=0, world_size=1, device=torch.device("cpu"), identity="sha256:one")
DATASET = DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)
PARAPHRASE = ParaphraseSettings(requests=["Paraphrase: {prompt}"], share=1.0)
INVERSION = InversionSettings(request="Invert: {answer}", share=1.0)
LAMPS = 6


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)


def lamp(number: int) -> dict[str, Any]:
    return chat(f"Which port has lamp {number}?", f"Lamp {number} has port {number + 20}.")


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


LAMP_ROWS = [lamp(number) for number in range(LAMPS)]
COLORS = [chat(f"Find the {c} lamp.", f"Behind the {c} wall.") for c in ("red", "blue", "gold")]
"""Rows without numbers and question marks, which the replies of a tiny model do not have."""


def stage_of(judge: JudgeEndpoint | None = None, **changes: Any) -> PlannedStage:
    """Return an augment stage. Without an endpoint the model itself writes."""
    settings: dict[str, Any] = {
        "kind": "augment"
        if judge or not changes.keys() & {"paraphrase", "inversion"}
        else "rewrite",
        "train": [DATASET],
        "on_invalid_row": "error",
        "clean": None,
        "documents": False,
        "chat_template": None,
        "judge": judge
        and JudgeSettings(
            model=judge.model,
            max_requests=judge.max_requests,
            max_tokens=judge.max_tokens,
            label_tokens=judge.label_tokens,
        ),
        "paraphrase": None,
        "inversion": None,
        "templates": [],
        "max_new_tokens": 16,
        "seed": 0,
    }
    return PlannedStage(
        name="augment",
        settings=AugmentSettings(**(settings | changes)),
        inputs={"train.0": SourceInput(uri="file://train.jsonl", path="spec.data.train[0].uri")},
        runtime=TrainRuntime(endpoint=judge),
        fingerprint="sha256:test",
    )


class Scene:
    """The files of an augment stage."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.workdir = folder / "work"
        self.workdir.mkdir()

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        server: JudgeServer | None = None,
        *,
        worker: Worker = WORKER,
        budget: int | None = None,
        **changes: Any,
    ) -> StageOutcome:
        path = self.folder / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = stage_of(server.settings(max_requests=budget) if server else None, **changes)
        inputs = {"model": self.model, "train.0": path}
        return augment.run(StageContext(stage, inputs, self.workdir, worker))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.workdir / "augmented.jsonl").open()]

    @property
    def questions(self) -> list[str]:
        return [row["messages"][-2]["content"] for row in self.rows]


@pytest.fixture
def scene(tmp_path: Path, tiny_model_dir: Path) -> Scene:
    return Scene(tmp_path, tiny_model_dir)


def asked(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a request asks for, and of which text."""
    kind, _, text = body["messages"][-1]["content"].partition(": ")
    return kind, text


def writer(body: dict[str, Any], _number: int) -> Answer:
    """Reply with another question, which names the same lamp."""
    kind, text = asked(body)
    words = text.rstrip("?.").split()
    return completion(
        f"To which port does lamp {words[-1]} belong?"
        if kind == "Paraphrase"
        else f"Where is lamp {words[1]}?"
    )


# ---- rows ---------------------------------------------------------------------------------------


def test_a_template_repeats_each_question_and_the_answer_stays(scene: Scene) -> None:
    templates = ["Question: {prompt}", "{prompt} Answer briefly."]
    outcome = scene.run(LAMP_ROWS[:2], templates=templates)
    assert scene.questions == [
        "Question: Which port has lamp 0?",
        "Which port has lamp 0? Answer briefly.",
        "Question: Which port has lamp 1?",
        "Which port has lamp 1? Answer briefly.",
    ]
    assert scene.rows[0]["messages"][-1] == LAMP_ROWS[0]["messages"][-1]
    assert outcome.metrics["augmentedRows"] == outcome.metrics["templatedRows"] == 4
    assert outcome.contents == ("augmented.jsonl",)


def test_each_row_says_what_made_it_and_from_which_row(scene: Scene) -> None:
    with JudgeServer(writer) as server:
        scene.run(
            LAMP_ROWS, server, paraphrase=PARAPHRASE, inversion=INVERSION, templates=["Q: {prompt}"]
        )
    marks = [row["augmented"] for row in scene.rows]
    assert [mark["by"] for mark in marks[:3]] == ["paraphrase", "inversion", "template"]
    assert [mark.get("model") for mark in marks[:3]] == ["judge-1", "judge-1", None]
    assert marks[3]["of"] == {"dataset": 0, "file": "train.jsonl", "row": 2, "example": 1}
    assert scene.questions[:2] == ["To which port does lamp 0 belong?", "Where is lamp 0?"]
    answers = {row["messages"][-1]["content"] for row in scene.rows}
    assert answers == {row["messages"][-1]["content"] for row in LAMP_ROWS}


def test_the_model_sees_the_question_or_the_answer_and_nothing_else(scene: Scene) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *lamp(3)["messages"]]}]
    with JudgeServer(writer) as server:
        scene.run(rows, server, paraphrase=PARAPHRASE, inversion=INVERSION)
    requests = [body["messages"] for body in server.bodies]
    assert [len(messages) for messages in requests] == [1, 1]
    texts = {messages[0]["content"] for messages in requests}
    assert texts == {"Paraphrase: Which port has lamp 3?", "Invert: Lamp 3 has port 23."}
    assert all(row["messages"][0] == system for row in scene.rows)


def test_of_several_turns_the_last_question_is_rewritten(scene: Scene) -> None:
    """The turns before it stay, and such a row is not inverted: its answer depends on them."""
    row = chat("Hello?", "Hello.", "Which port has lamp 4?", "Port 24.")
    with JudgeServer(writer) as server:
        outcome = scene.run([row], server, paraphrase=PARAPHRASE, inversion=INVERSION)
    (new,) = scene.rows
    assert [turn["content"] for turn in new["messages"]] == [
        *("Hello?", "Hello.", "To which port does lamp 4 belong?", "Port 24.")
    ]
    assert outcome.details["leftOut"]["inversion"]["severalTurns"]["rows"] == 1


def test_calls_of_tools_and_weights_of_turns_stay(scene: Scene) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "find", "arguments": {"lamp": 5}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    turns = [
        {"role": "user", "content": "Which port has lamp 5?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "25", "tool_call_id": "1"},
        {"role": "assistant", "content": "Port 25."},
    ]
    scene.run([{"messages": turns, "tools": [tool]}], templates=["Q: {prompt}"])
    (new,) = scene.rows
    assert new["messages"][0]["content"] == "Q: Which port has lamp 5?"
    assert new["messages"][1]["tool_calls"] == [call]
    assert (new["messages"][1]["train"], new["tools"]) == (False, [tool])


def test_each_paraphrase_of_a_row_is_asked_for_in_another_way(scene: Scene) -> None:
    def both(body: dict[str, Any], _number: int) -> Answer:
        kind, text = asked(body)
        lamp_number = text.rstrip("?").split()[-1]
        return completion(f"{kind}, lamp {lamp_number}: which port?")

    two = ParaphraseSettings(requests=["First: {prompt}", "Second: {prompt}"], share=1.0)
    with JudgeServer(both) as server:
        scene.run(LAMP_ROWS[:1], server, paraphrase=two)
    assert scene.questions == ["First, lamp 0: which port?", "Second, lamp 0: which port?"]


def test_a_share_chooses_as_many_rows_and_always_the_same(scene: Scene) -> None:
    half = ParaphraseSettings(requests=["Paraphrase: {prompt}"], share=0.5)
    found = []
    for seed in (0, 0, 1, 2):
        worker = replace(WORKER, identity=f"sha256:{len(found)}")  # without the replies before
        with JudgeServer(writer) as server:
            scene.run(LAMP_ROWS, server, paraphrase=half, seed=seed, worker=worker)
            assert len(server.bodies) == LAMPS // 2
        found.append(scene.rows)
    assert found[0] == found[1]
    assert found[2] != found[0] or found[3] != found[0]


def test_a_model_without_a_chat_template_gets_prompts_and_completions(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = tmp_path / "base"
    tiny_llama(VOCABULARY).save_pretrained(model)
    template, tiny_tokenizer.chat_template = tiny_tokenizer.chat_template, None
    try:
        tiny_tokenizer.save_pretrained(model)
    finally:
        tiny_tokenizer.chat_template = template
    scene = Scene(tmp_path, model)
    rows = [{"prompt": "Port of lamp 1?", "completion": " 21"}]
    scene.run(rows, templates=["Q: {prompt}"])
    (new,) = scene.rows
    assert (new["prompt"], new["completion"]) == ("Q: Port of lamp 1?", " 21")
    with pytest.raises(StageError, match="no chat template") as caught:
        scene.run(rows, paraphrase=PARAPHRASE)
    assert caught.value.reason == "JudgeUnusable"
    assert "spec.data.augment.by" in str(caught.value)


# ---- what a model may see -----------------------------------------------------------------------


def test_a_row_that_a_rule_removes_or_redacts_is_not_sent_as_it_was(scene: Scene) -> None:
    clean = Clean(max_words=30, personal_data=PersonalData(email="redact"))
    rows = [
        chat("Who gets the mail to anna@firma.de?", "The office."),
        chat("Where is it? " * 20, "There."),
    ]
    with JudgeServer(lambda _body, _number: completion("Who reads mail to [EMAIL]?")) as server:
        outcome = scene.run(rows, server, paraphrase=PARAPHRASE, clean=clean)
    (body,) = server.bodies
    assert "[EMAIL]" in body["messages"][0]["content"]
    assert "anna@firma.de" not in json.dumps(server.bodies) + json.dumps(scene.rows)
    assert outcome.details["unusable"] == {"length.maxWords": 1}


# ---- replies that are not used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("which port HAS lamp 1", "unchanged"),
        ('Question: ""', "empty"),
        ("Which port, of all the ports that there are, has lamp 1? " * 4, "tooLong"),
        ("Which one is lamp 1 on?\nIt is on port 21.", "severalLines"),
        ("Is it true that lamp 1 has port 21?", "containsAnswer"),
        ("Lamp 1 is on the port of the harbor.", "noQuestionMark"),
        ("Which port has the first lamp?", "lostNumber"),
    ],
)
def test_a_reply_that_is_no_paraphrase_is_left_out_and_counted(
    scene: Scene, reply: str, reason: str
) -> None:
    def respond(body: dict[str, Any], number: int) -> Answer:
        return completion(reply) if "lamp 1" in asked(body)[1] else writer(body, number)

    with JudgeServer(respond) as server:
        outcome = scene.run(LAMP_ROWS, server, paraphrase=PARAPHRASE)
    (found,) = outcome.details["leftOut"]["paraphrase"].items()
    assert (found[0], found[1]["rows"]) == (reason, 1)
    assert found[1]["examples"][0].startswith("train.jsonl row 2")
    assert len(scene.rows) == outcome.metrics["augmentedRows"] == LAMPS - 1
    assert outcome.metrics["leftOutRows"] == 1


def test_a_row_that_exists_already_is_not_written_again(scene: Scene) -> None:
    rows = [*LAMP_ROWS[:1], chat("Q: Which port has lamp 0?", "Lamp 0 has port 20.")]
    outcome = scene.run(rows, templates=["Q: {prompt}"])
    assert scene.questions == ["Q: Q: Which port has lamp 0?"]
    assert outcome.details["leftOut"]["template"]["duplicate"]["rows"] == 1


def test_two_equal_paraphrases_of_a_row_are_one(scene: Scene) -> None:
    two = ParaphraseSettings(requests=["Paraphrase: {prompt}"] * 2, share=1.0)
    with JudgeServer(writer) as server:
        outcome = scene.run(LAMP_ROWS[:2], server, paraphrase=two)
    assert len(scene.rows) == 2
    assert outcome.details["leftOut"]["paraphrase"]["duplicate"]["rows"] == 2


def test_rows_with_one_answer_do_not_get_the_same_question_twice(scene: Scene) -> None:
    """A model knows no other question for "Yes."."""
    rows = [chat(f"Is the {color} lamp on?", "Yes.") for color in ("red", "blue", "gold")]
    with JudgeServer(lambda _body, _number: completion("Is it on?")) as server:
        outcome = scene.run(rows, server, inversion=INVERSION, templates=["Q: {prompt}"])
    assert scene.questions.count("Is it on?") == 1
    assert len(scene.rows) == 1 + 3
    assert outcome.details["leftOut"]["inversion"]["duplicate"]["rows"] == 2


def test_documents_have_no_question(scene: Scene) -> None:
    with pytest.raises(StageError, match=r"no row was made of 0 rows .*2 noQuestion") as caught:
        scene.run([{"text": "One."}, {"text": "Two."}], templates=["Q: {prompt}"])
    assert caught.value.reason == "NothingAugmented"
    assert caught.value.advice == "Add rows with other questions, or remove spec.data.augment."


# ---- requests -----------------------------------------------------------------------------------


def test_a_killed_stage_repeats_no_request(scene: Scene) -> None:
    def failing(body: dict[str, Any], number: int) -> Answer:
        return Answer(b"gone", status=401) if number >= 3 else writer(body, number)

    asks = {"paraphrase": PARAPHRASE, "inversion": INVERSION}
    with JudgeServer(failing) as server:
        with pytest.raises(StageError, match="gone") as caught:
            scene.run(LAMP_ROWS, server, **asks)
        journal = (scene.workdir / "checkpoints" / "journal.jsonl").read_text().splitlines()
        server.respond = writer
        del server.bodies[:]
        outcome = scene.run(LAMP_ROWS, server, **asks)
    assert "Correct spec.data.augment.by.endpoint.key" in str(caught.value)
    assert len(journal) > 1
    assert len(server.bodies) == 2 * LAMPS - (len(journal) - 1)
    assert outcome.metrics["augmentedRows"] == 2 * LAMPS


@pytest.mark.parametrize(
    "later", [[*LAMP_ROWS, lamp(9)], LAMP_ROWS[:-1], LAMP_ROWS[::-1]], ids=["more", "less", "other"]
)
def test_rows_that_change_while_the_model_writes_end_the_stage(
    scene: Scene, later: list[dict[str, Any]]
) -> None:
    """The questions of a row were put before the answer of another one."""

    def changing(body: dict[str, Any], number: int) -> Answer:
        path = scene.folder / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in later))
        return writer(body, number)

    with JudgeServer(changing) as server, pytest.raises(StageError) as caught:
        scene.run(LAMP_ROWS, server, paraphrase=PARAPHRASE)
    assert (caught.value.reason, caught.value.retryable) == ("SourceUnavailable", True)
    assert "spec.data.train[0] changed" in caught.value.message


def test_a_spent_budget_leaves_the_rows_that_it_paid_for(scene: Scene) -> None:
    """The first paraphrase of every row comes before the second of any row."""
    two = ParaphraseSettings(requests=["Paraphrase: {prompt}", "Again: {prompt}"], share=1.0)
    with JudgeServer(writer) as server:
        outcome = scene.run(LAMP_ROWS, server, paraphrase=two, budget=LAMPS)
    assert {row["augmented"]["of"]["row"] for row in scene.rows} == {*range(1, LAMPS + 1)}
    assert (outcome.metrics["budgetSpent"], outcome.metrics["judgeRequests"]) == (1.0, LAMPS)
    assert outcome.details["leftOut"]["paraphrase"]["noReply"]["rows"] == LAMPS


def test_a_stop_request_ends_the_stage_before_it_asks(scene: Scene) -> None:
    with JudgeServer(writer) as server, pytest.raises(Interrupted):
        scene.run(
            LAMP_ROWS, server, paraphrase=PARAPHRASE, worker=replace(WORKER, stop=lambda: True)
        )
    assert not server.bodies


def test_an_invalid_row_fails_the_stage_before_it_asks(scene: Scene) -> None:
    broken = {"messages": [{"role": "user", "content": "?"}]}
    with JudgeServer(writer) as server, pytest.raises(StageError) as caught:
        scene.run([*LAMP_ROWS, broken], server, paraphrase=PARAPHRASE)
    assert caught.value.reason == "InvalidData"
    assert not server.bodies
    with JudgeServer(writer) as server:
        scene.run([*LAMP_ROWS, broken], server, paraphrase=PARAPHRASE, on_invalid_row="skip")
    assert len(scene.rows) == LAMPS


def test_a_model_that_replies_with_nothing_fails_the_stage(scene: Scene) -> None:
    silent = JudgeServer(lambda _body, _number: completion(""))
    with silent as server, pytest.raises(StageError) as caught:
        scene.run(LAMP_ROWS, server, paraphrase=PARAPHRASE)
    assert caught.value.reason == "JudgeNonsense"
    assert "spec.data.augment.by" in str(caught.value)


# ---- a model of the job -------------------------------------------------------------------------


def fluent_model(folder: Path, tokenizer: Any) -> Path:
    """Write a tiny model with untied embeddings, whose likeliest completion is not white space."""
    tiny_llama(VOCABULARY, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _worker(rank: int, notes: Notes, folder: Path, model: Path) -> None:
    worker = Worker(rank, 2, torch.device("cpu"), identity="sha256:one" if rank == 0 else "")
    written = folder / f"work-{os.getpid()}"
    written.mkdir()
    stage = stage_of(paraphrase=PARAPHRASE, inversion=INVERSION)
    inputs = {"model": model, "train.0": folder / "train.jsonl"}
    outcome = augment.run(StageContext(stage, inputs, written, worker))
    rows = written / "augmented.jsonl"
    notes[rank] = (rows.read_text() if rows.exists() else "", dict(outcome.metrics))


def test_the_model_itself_writes_and_two_workers_write_the_same_rows(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = fluent_model(tmp_path / "model", tiny_tokenizer)
    scene = Scene(tmp_path, model)
    outcome = scene.run(COLORS, paraphrase=PARAPHRASE, inversion=INVERSION)
    assert outcome.details["by"] == "the model itself"
    assert {row["augmented"]["model"] for row in scene.rows} == {"the model itself"}
    notes = spawn(2, _worker, tmp_path, model)
    assert notes[1] == ("", {})
    rows, metrics = notes[0]
    assert rows == (scene.workdir / "augmented.jsonl").read_text()
    assert metrics == outcome.metrics


def test_another_model_of_the_job_writes_in_the_place_of_the_model(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    judge = fluent_model(tmp_path / "judge", tiny_tokenizer)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in COLORS))
    stage = stage_of(paraphrase=PARAPHRASE)
    source = SourceInput(uri="hf://org/judge")
    stage = stage.model_copy(update={"inputs": {**stage.inputs, "judge": source}})
    inputs = {"model": tiny_model_dir, "train.0": path, "judge": judge}
    outcome = augment.run(StageContext(stage, inputs, tmp_path, WORKER))
    assert outcome.details["by"] == "hf://org/judge"


# ---- whole jobs ---------------------------------------------------------------------------------


def job_with(folder: Path, model: Path, augment: dict[str, Any]) -> Plan:
    """Return the plan of a job on the lamps, of which a fifth is held out."""
    rows = "".join(json.dumps(lamp(number)) + "\n" for number in range(10))
    (folder / "train.jsonl").write_text(rows)
    data = {
        "train": [{"uri": "file://train.jsonl"}],
        "validation": {"fraction": 0.2},
        "augment": augment,
    }
    training = {"maxSteps": 2, "batchSize": 4}
    return planned(manifest(model, data=data, training=training))


def run_plan(plan: Plan, folder: Path) -> dict[str, Any]:
    """Run the plan and return the records of its stages, by name, in the order of completion."""
    done: dict[str, Any] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["record"]:
            done[event["stage"]] = event["record"]

    output, cache = str(folder / "out"), folder / "cache"
    torchrun.run(plan, output, base_dir=folder, cache_dir=cache, emit=emit)
    return done


def test_a_job_trains_on_its_augmented_rows_and_its_report_marks_them(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with JudgeServer(writer) as server:
        augment = {
            "by": {"endpoint": {"url": server.url, "model": "judge-1"}},
            "paraphrase": {"requests": ["Paraphrase: {prompt}"]},
            "templates": ["Q: {prompt}"],
        }
        plan = job_with(tmp_path, tiny_model_dir, augment)
        done = run_plan(plan, tmp_path)
        assert run_plan(plan, tmp_path) == done
    assert len(server.bodies) == 10
    assert list(done) == ["augment", "prepare", "sft", "evaluate", "export"]
    assert done["augment"]["metrics"]["augmentedRows"] == 20
    assert done["prepare"]["metrics"]["augmentedRows"] == 2 * 8
    assert done["prepare"]["metrics"]["heldOutRows"] == 2
    source = done["prepare"]["details"]["ledger"]["sources"][1]
    assert (source["name"], source["rows"]["heldOut"]) == ("spec.data.augment", 0)
    report = (tmp_path / "out/result/report.html").read_text()
    assert "Paraphrased questions by judge-1: 8 rows" in report
    assert "To which port does lamp" in report
    assert "Questions in templates: 8 rows" in report
    assert "<td>training, augmented</td>" in report
    card = (tmp_path / "out/result/README.md").read_text()
    assert "- Paraphrased questions by judge-1: 8 rows" in card


def test_the_leading_stages_make_the_rows_before_there_are_workers(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    plan = job_with(tmp_path, tiny_model_dir, {"templates": ["Q: {prompt}"]})
    store = Store(str(tmp_path / "out"), tmp_path / "read", "uid")
    store.claim(plan.job, 1)
    inputs = StageInputs(plan, store, tmp_path, tmp_path / "cache")
    worker = Worker(0, 1, torch.device("cpu"))
    records = PlanRunner(inputs, worker, emit_nothing, preparing=True).run()
    assert list(records) == ["augment", "prepare"]
