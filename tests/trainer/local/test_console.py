"""The console: log lines, the live display and the result of a run."""

from __future__ import annotations

import io
import re
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finished import (
    EVALUATE_METRICS,
    EXPORT_METRICS,
    SAMPLES,
    TRAIN_METRICS,
    record,
    records,
)
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.errors import StageError
from tuneyard_trainer.local.console import Console
from tuneyard_trainer.reporting.formatting import duration, harmless, number, size
from tuneyard_trainer.reporting.results import Results, headline
from tuneyard_trainer.running import waits
from tuneyard_trainer.running.waits import wait_event
from tuneyard_trainer.worker import Interrupted

MINIMAL = Path(__file__).parents[2] / "golden" / "plans" / "minimal.json"
START = 1767225600.0  # 2026-01-01T00:00:00Z


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal with color, whatever the environment of the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def progress(stage: str = "sft", step: int = 0, total: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "type": "progress",
        "stage": stage,
        "step": step,
        "totalSteps": total,
        "metrics": values.get("metrics", {}),
        "message": values.get("message"),
    }


def staged(name: str, state: str, record: StageRecord | None = None) -> dict[str, Any]:
    value = record.model_dump(mode="json", by_alias=True) if record else None
    return {"type": "stage", "stage": name, "state": state, "record": value}


def lines_of(clock: Clock, *events: tuple[float, dict[str, Any]]) -> list[str]:
    """Return the log lines of events, each shown at its second."""
    err = io.StringIO()
    with Console(out=io.StringIO(), err=err, clock=clock) as console:
        for seconds, event in events:
            clock.now = START + seconds
            console.event(event)
    return err.getvalue().splitlines()


def steps(seconds_each: float, total: int) -> list[tuple[float, dict[str, Any]]]:
    return [
        (step * seconds_each, progress(step=step, total=total, metrics={"loss": 1.0}))
        for step in range(1, total + 1)
    ]


def seconds_in(line: str) -> int:
    minute, second = re.match(r"2026-01-01T00:(\d\d):(\d\d)Z", line).groups()  # type: ignore[union-attr]
    return 60 * int(minute) + int(second)


def step_in(line: str) -> int:
    return int(re.search(r" step=(\d+)", line)[1])  # type: ignore[index]


# ---- log lines ----------------------------------------------------------------------------------


def test_an_event_is_one_line_of_time_level_stage_and_values(clock: Clock) -> None:
    [line] = lines_of(clock, (61, progress(step=5, total=50, metrics={"loss": 1.25, "tokens": 9})))
    assert line == "2026-01-01T00:01:01Z info sft step=5 totalSteps=50 loss=1.25 tokens=9"


def test_the_line_of_a_finished_stage_has_its_time_metrics_and_digest(clock: Clock) -> None:
    running, done = lines_of(
        clock,
        (0, staged("export", "Running")),
        (9, staged("export", "Succeeded", record("export", {"bytes": 1048576.0}))),
    )
    assert running.endswith("info export state=Running")
    assert done.endswith("export state=Succeeded seconds=75 bytes=1048576 digest=sha256:export")


def reused(state: str) -> dict[str, Any]:
    done = record("prepare", {"rows": 10.0}).model_copy(update={"reused": True})
    return staged("prepare", state, done)


def test_the_line_of_a_stage_whose_files_another_job_prepared_says_so(clock: Clock) -> None:
    [line] = lines_of(clock, (0, reused("Succeeded")))
    assert line.endswith(
        "prepare state=Succeeded reused=true seconds=75 rows=10 digest=sha256:prepare"
    )


def test_text_with_special_characters_is_quoted_on_one_line(clock: Clock) -> None:
    message = 'a "b" c=d\nsecond\x1b[2J'
    [line] = lines_of(clock, (0, progress(message=message)))
    assert line.endswith('info sft message="a \\"b\\" c=d\\nsecond\N{REPLACEMENT CHARACTER}[2J"')


def test_slow_steps_give_at_most_one_line_every_ten_seconds(clock: Clock) -> None:
    times = [seconds_in(line) for line in lines_of(clock, *steps(0.25, 1200))]
    gaps = [later - earlier for earlier, later in pairwise(times[:-1])]
    assert len(times) > 20
    assert min(gaps) >= 10


def test_fast_steps_give_one_line_every_twentieth_of_the_stage(clock: Clock) -> None:
    shown = [step_in(line) for line in lines_of(clock, *steps(0.001, 1000))]
    assert shown[:3] == [1, 51, 101]
    assert shown[-1] == 1000
    assert len(shown) == 21


def test_every_evaluation_and_every_new_message_is_shown(clock: Clock) -> None:
    lines = lines_of(
        clock,
        (0, progress(message="loading the model")),
        (0, progress(step=1, total=1000, metrics={"loss": 3.0})),
        (0, progress(step=2, total=1000, metrics={"loss": 2.9})),
        (0, progress(step=2, total=1000, metrics={"validationLoss": 2.5})),
        (0, progress(step=3, total=1000, metrics={"validationLoss": 2.4})),
        (0, progress(step=3, total=1000, metrics={"heldOutReward": 0.5})),
        (0, progress(step=3, total=1000, message="saving")),
    )
    assert [re.sub(r".* sft | etaSeconds=\d+", "", line) for line in lines] == [
        'message="loading the model"',
        "step=1 totalSteps=1000 loss=3",
        "step=2 totalSteps=1000 validationLoss=2.5",
        "step=3 totalSteps=1000 validationLoss=2.4",
        "step=3 totalSteps=1000 heldOutReward=0.5",
        "step=3 totalSteps=1000 message=saving",
    ]


def test_a_repeated_message_is_shown_once(clock: Clock) -> None:
    events = [(0.0, progress("prepare", step=row, message="reading")) for row in range(1, 500)]
    assert len(lines_of(clock, *events)) <= 2


def test_the_time_left_follows_the_pace_since_resuming(clock: Clock) -> None:
    resumed = [
        (float(index * 10), progress(step=500 + index, total=600, metrics={"loss": 1.0}))
        for index in range(3)
    ]
    assert lines_of(clock, *resumed)[-1].endswith("step=502 totalSteps=600 loss=1 etaSeconds=980")


def test_a_message_of_the_driver_does_not_change_the_pace_of_the_stage(clock: Clock) -> None:
    resumed = [
        (0.0, progress(step=1, total=100, metrics={"loss": 1.0})),
        (5.0, progress("", message="stopping after this step")),
        (20.0, progress(step=3, total=100, metrics={"loss": 1.0})),
    ]
    lines = lines_of(clock, *resumed)
    assert lines[1].endswith('info run message="stopping after this step"')
    assert lines[2].endswith("etaSeconds=970")


def test_a_loss_that_is_not_a_number_is_shown_as_such(clock: Clock) -> None:
    [line] = lines_of(clock, (0, progress(step=1, total=9, metrics={"loss": float("nan")})))
    assert "loss=nan" in line


def test_an_event_from_a_signal_handler_waits_until_the_line_is_written(clock: Clock) -> None:
    class Interrupting(io.StringIO):
        """A stream that delivers an event in the middle of the first write."""

        def write(self, text: str) -> int:
            if not self.tell():
                super().write(text[:10])
                console.event(progress("", message="stopping"))
                return super().write(text[10:])
            return super().write(text)

    err = Interrupting()
    console = Console(out=io.StringIO(), err=err, clock=clock)
    console.event(progress(message="loading"))
    assert [line.split("Z ")[1] for line in err.getvalue().splitlines()] == [
        "info sft message=loading",
        "info run message=stopping",
    ]


def test_a_failure_is_a_line_with_reason_message_and_advice(clock: Clock) -> None:
    err = io.StringIO()
    with Console(out=io.StringIO(), err=err, clock=clock) as console:
        console.event(staged("sft", "Running"))
        console.failure(StageError("LossNotFinite", "the loss became nan.", advice="Lower it."))
    assert (
        err.getvalue()
        .splitlines()[-1]
        .endswith(
            'error sft reason=LossNotFinite message="the loss became nan." advice="Lower it." '
            "retryable=false"
        )
    )


# ---- a terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "text"), [("Succeeded", "reused"), ("Skipped", "done before")])
def test_a_terminal_says_what_was_reused(
    state: str, text: str, clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(reused(state))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(rf"✔ prepare +{text} ", shown), shown


def test_a_terminal_shows_one_line_per_finished_stage(clock: Clock, terminal: Terminal) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(staged("evaluate", "Running"))
        console.event(staged("evaluate", "Succeeded", record("evaluate", EVALUATE_METRICS)))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "✔ evaluate   1 min 15 s held-out loss 2.000 → 1.000 · 14/16 answers right" in shown


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_the_cursor_is_visible_after_any_end_of_the_run(
    clock: Clock, terminal: Terminal, end: type[BaseException] | None
) -> None:
    def watch() -> None:
        with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
            console.event(staged("sft", "Running"))
            console.event(progress(step=1, total=10, metrics={"loss": 1.0}))
            if end:
                raise end

    if end:
        with pytest.raises(end):
            watch()
    else:
        watch()
    hidden, shown = (terminal.getvalue().rfind(f"\x1b[?25{letter}") for letter in "lh")
    assert 0 <= hidden < shown


def test_the_running_stage_shows_bar_position_loss_and_speed(
    clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(staged("sft", "Running"))
        for step in (10, 20):
            clock.now += 5
            metrics = {"loss": 1.25, "tokensPerSecond": 110.0}
            console.event(progress(step=step, total=40, metrics=metrics))
        console.event(progress(step=20, total=40, metrics={"validationLoss": 1.5}))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"sft +━+.*20/40 +10 s left", shown)
    assert "loss 1.250 · held out 1.500 · 110 tokens/s" in shown


def test_a_reinforcement_stage_shows_rewards_and_kl_divergence(
    clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(progress("ppo", 0, 40, metrics={"heldOutReward": 0.5, "heldOutKl": 0.0}))
        clock.now += 5
        console.event(progress("ppo", 1, 40, metrics={"reward": 0.25, "kl": 1.5}))
        clock.now += 1
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "reward 0.250 · held out 0.500 · KL 1.500" in shown


def test_a_terminal_shows_what_is_waited_for_and_how_long_already(
    clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(wait_event("importing Ray"))
        clock.now += 2
        console.event(wait_event("starting Ray"))
        clock.now += 7
        console.event(staged("prepare", "Running"))
        console.event(wait_event("importing the libraries of prepare"))
        clock.now += 4
        console.event(staged("prepare", "Succeeded", record("prepare", {})))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"starting +9 s\n +starting Ray · 7 s", shown)
    assert re.search(r"prepare +4 s\n +importing the libraries of prepare · 4 s", shown)


def test_a_log_tells_a_wait_that_lasts_and_repeats_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    class Log(io.StringIO):
        def write(self, text: str) -> int:
            count = super().write(text)
            if "seconds=" in text:
                told.set()
            return count

    monkeypatch.setattr(waits, "FIRST_SECONDS", 0.01)
    log = Log()
    with Console(out=io.StringIO(), err=log, clock=clock) as console:
        console.event(wait_event("starting Ray"))
        assert told.wait(60)
    assert 'info run waiting="starting Ray" seconds=0' in log.getvalue()


def test_markup_and_control_characters_in_messages_are_shown_as_text(
    clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(progress("", message="[red]stop[/red] :smile: \x1b[2J"))
        console.failure(StageError("Broken", "row [bold]1[/bold]", advice="[link=x]y[/link]"))
    for text in ("[red]stop[/red] :smile: ", "row [bold]1[/bold]", "[link=x]y[/link]"):
        assert text in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_escape_sequences_shows_log_lines(
    clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.event(staged("sft", "Running"))
    assert terminal.getvalue() == "2026-01-01T00:00:00Z info sft state=Running\n"


def test_an_interrupted_run_shows_its_step_and_how_to_continue(
    clock: Clock, terminal: Terminal
) -> None:
    with Console(out=io.StringIO(), err=terminal, clock=clock) as console:
        console.interrupted(Interrupted("sft", 128))
    assert "Stopped in sft after step 128. Run the same command to continue." in (
        terminal.getvalue()
    )


# ---- the result ---------------------------------------------------------------------------------


def summarized(
    found: dict[str, StageRecord], *, output: str = "/jobs/out", skipped_all: bool = False
) -> str:
    out, err = io.StringIO(), io.StringIO()
    with Console(out=out, err=err) as console:
        console.start(Plan.model_validate_json(MINIMAL.read_text()))
        before = err.getvalue()
        console.summary(found, output, Path("/jobs/out/result"), skipped_all=skipped_all)
    assert err.getvalue() == before, "the result must be written to standard output only"
    return out.getvalue()


def cells(text: str, label: str) -> list[str]:
    """Return the cells after a label on its line."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_the_result_compares_base_and_tuned_and_shows_time_tokens_and_memory() -> None:
    shown = summarized(records())
    assert cells(shown, "Held-out loss") == ["2.000", "1.000", "\N{MINUS SIGN}50 %"]
    assert cells(shown, "Held-out perplexity") == ["7.389", "2.718", "\N{MINUS SIGN}63 %"]
    assert cells(shown, "Answers right") == ["1/16", "14/16", "+13"]
    # The stage was resumed: its last attempt took 75 of the 120 s of training.
    assert cells(shown, "Time") == ["2 min training, 5 min 45 s in total"]
    assert cells(shown, "Evaluation") == ["1 min 15 s, 22 % of the time of all stages"]
    assert cells(shown, "Tokens trained on") == ["18,000"]
    assert cells(shown, "Peak memory") == ["1.5 GiB"]
    assert cells(shown, "Trained parameters") == ["5,000,000 of 100,000,000 (5 %)"]


def test_the_result_names_an_engine_that_the_manifest_chose_and_no_share_of_an_unfinished_job() -> (
    None
):
    found = records()
    evaluation = found["evaluate"]
    details = {**evaluation.details, "engine": "vllm"}
    found["evaluate"] = evaluation.model_copy(update={"details": details})
    assert cells(summarized(found), "Evaluation")[0].endswith("stages, answered by vllm")
    del found["export"]
    assert "of the time of all stages" not in summarized(found)


ALIGNED = {"baseReward": 0.25, "reward": 0.75, "steps": 12.0, "trainingSeconds": 600.0}


def test_the_result_of_an_alignment_shows_its_last_training_and_the_prompts_used() -> None:
    found = {
        "sft": record("sft", TRAIN_METRICS),
        "grpo": record("grpo", ALIGNED),
        "evaluate": record("assess", {"startReward": 0.2, "reward": 0.7}, promptsHeldOut=False),
    }
    shown = summarized(found)
    assert cells(shown, "Steps") == ["12"]
    assert cells(shown, "Time")[0].startswith("10 min training")
    assert cells(shown, "Reward")[:2] == ["0.200", "0.700"]
    assert "On training prompts" in shown
    assert "held-out" not in shown
    assert headline("grpo", ALIGNED, {}) == ["12 steps", "held-out reward 0.250 → 0.750"]


UNSURE = {"answerAccuracy": {"differenceInterval": [-0.1, 0.3]}}


def test_a_difference_whose_interval_contains_0_is_not_called_one() -> None:
    found = records()
    found["evaluate"] = record("evaluate", EVALUATE_METRICS, evidence=UNSURE)
    shown = summarized(found)
    assert cells(shown, "Answers right") == ["1/16", "14/16", "+13, no clear difference"]
    assert cells(shown, "Held-out loss") == ["2.000", "1.000", "\N{MINUS SIGN}50 %"]
    clear = {"answerAccuracy": {"differenceInterval": [0.1, 0.9]}}
    found["evaluate"] = record("evaluate", EVALUATE_METRICS, evidence=clear)
    assert cells(summarized(found), "Answers right") == ["1/16", "14/16", "+13"]


def test_a_share_that_may_be_chance_is_not_called_better() -> None:
    metrics = {"winRate": 0.6, "preferenceAccuracy": 0.7}
    evidence = {"winRate": {"interval": [0.45, 0.75]}, "preferenceAccuracy": {"interval": [0.6, 1]}}
    shown = summarized({"evaluate": record("assess", metrics, evidence=evidence)})
    assert cells(shown, "Win rate") == ["50 % by chance", "60 %", "no clear difference"]
    assert cells(shown, "Preference accuracy") == ["50 % by chance", "70 %"]


def test_verdicts_are_shown_and_a_missed_advisory_gate_is_a_warning() -> None:
    gates = [
        {"metric": "lossReduction", "atLeast": 0.3, "verdict": "pass", "value": 0.5,
         "low": 0.4, "high": 0.6, "items": 20},
        {"metric": "answerAccuracy", "atLeast": 0.9, "tier": "advisory", "verdict": "breach",
         "value": 0.875},
    ]  # fmt: skip
    found = records()
    found["evaluate"] = record("evaluate", EVALUATE_METRICS, gates=gates)
    shown = summarized(found)
    assert cells(shown, "lossReduction") == ["pass", "0.5", "0.4 to 0.6", "at least 0.3"]
    assert cells(shown, "answerAccuracy (advisory)")[0] == "breach"
    warning = "Warning: The advisory gate is not met: answerAccuracy is 0.875, below 0.9."
    assert warning in " ".join(shown.split())
    assert "Gate " not in summarized(records())


def test_right_answers_are_shares_if_the_number_of_questions_is_unknown() -> None:
    found = records()
    metrics = {name: value for name, value in EVALUATE_METRICS.items() if name != "questions"}
    found["evaluate"] = record("evaluate", metrics)
    assert cells(summarized(found), "Answers right") == ["6 %", "88 %", "+81 points"]


@pytest.mark.parametrize(
    ("gain", "error", "verdict"),
    [
        (0.5, 0.1, "tuning was worth it"),
        (-0.5, 0.1, "examples in the prompt do better"),
        (0.5, 0.3, "no clear difference"),
    ],
)
def test_the_result_says_in_words_whether_tuning_beat_examples_and_what_these_cost(
    gain: float, error: float, verdict: str
) -> None:
    metrics = EVALUATE_METRICS | {
        "answerAccuracy": 0.75,
        "baseFewShotAnswerAccuracy": 0.75 - gain,
        "answerAccuracyFewShotGain": gain,
        "answerAccuracyFewShotGainError": error,
        "fewShotExamples": 4.0,
        "fewShotTokens": 1312.0,
    }
    shown = dict(Results.of({"evaluate": record("evaluate", metrics)}).facts)["Tuning or examples"]
    assert shown == (
        f"{verdict}: answers right 75 % after tuning and {75 - 100 * gain:.0f} % of the base model "
        "with 4 examples, which cost 1,312 tokens in each request"
    )


def test_metrics_of_answers_are_rows_of_the_comparison() -> None:
    metrics = {
        "validationLoss": 1.0,
        "rougeL": 0.5,
        "baseRougeL": 0.25,
        "bleu": 12.5,
        "baseBleu": 20.0,
    }
    shown = summarized({"evaluate": record("evaluate", metrics)})
    assert cells(shown, "ROUGE-L")[:2] == ["25 %", "50 %"]
    assert cells(shown, "BLEU")[:2] == ["20.00", "12.50"]


def test_without_held_out_rows_the_result_has_facts_and_no_comparison() -> None:
    training = record("sft", {"steps": 4.0, "tokens": 10.0, "trainingSeconds": 3.0})
    shown = summarized({"sft": training, "export": record("export", EXPORT_METRICS)})
    assert "Base" not in shown
    assert cells(shown, "Tokens trained on") == ["10"]


def test_a_base_model_that_was_not_measured_is_shown_as_a_dash() -> None:
    shown = summarized({"evaluate": record("evaluate", {"validationLoss": 1.0})})
    assert cells(shown, "Held-out loss") == ["\N{EN DASH}", "1.000"]


def test_completions_are_shown_unchanged_without_control_characters() -> None:
    answer = "[red]hot[/red] \x1b[2J\x9b3m :fire:"
    shown = summarized(records([{**SAMPLES[0], "base": answer}]))
    assert "[red]hot[/red]" in shown
    assert ":fire:" in shown
    assert "\x1b" not in shown
    assert "\x9b" not in shown


def test_right_and_wrong_answers_are_marked() -> None:
    shown = summarized(records([{**SAMPLES[0], "base": "A year."}]))
    assert "✘ A year." in shown
    assert "✔ It is 30 MONTHS." in shown


def test_held_out_rows_in_the_training_data_cause_a_warning() -> None:
    found = records()
    found["prepare"] = record("prepare", {}, datasets=[], contaminated=3)
    assert "Warning: 3 of the held-out rows are also in the training data" in summarized(found)


def test_leaks_cause_a_warning_with_the_span() -> None:
    found = records()
    example = {"heldOut": "held row 2", "training": "train row 9", "span": "the red lamp"}
    leaks = {"rows": 1, "checked": 20, "examples": [example]}
    found["prepare"] = record("prepare", {}, datasets=[], leaks=leaks)
    shown = " ".join(summarized(found).split())
    assert "Warning: 1 of 20 held-out rows have text that is also in the training data" in shown
    assert "held row 2 in train row 9: the red lamp" in shown


def test_a_job_that_is_already_done_says_so_and_shows_its_result() -> None:
    shown = summarized(records(), skipped_all=True)
    assert shown.startswith("Nothing to do: every stage of minimal is already done.\n")
    assert cells(shown, "Answers right") == ["1/16", "14/16", "+13"]
    assert "Nothing to do" not in summarized(records())


def test_the_result_lists_only_files_that_were_written() -> None:
    shown = summarized(records())
    assert cells(shown, "Adapter") == ["/jobs/out/result/adapter"]
    assert cells(shown, "Report") == ["/jobs/out/result/report.html"]
    assert not any(line.startswith("Model ") for line in shown.splitlines() if "card" not in line)


def test_files_in_an_object_store_are_shown_with_their_uri() -> None:
    shown = summarized(records(), output="s3://models/minimal")
    assert cells(shown, "Model card") == ["s3://models/minimal/result/README.md"]


def test_characters_that_the_output_cannot_encode_become_question_marks() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with Console(out=out, err=io.StringIO()) as console:
        console.summary(records([{**SAMPLES[0], "tuned": "naïve 答え"}]), "/out", Path("/out"))
    out.flush()
    assert b"na?ve" in raw.getvalue()


# ---- numbers and text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (9.97, "10 s"),
        (59.6, "1 min"),
        (72, "1 min 12 s"),
        (7500, "2 h 5 min"),
        (3600 * 76, "3 d 4 h"),
        (float("nan"), "\N{EN DASH}"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.8714, "2.871"),
        (17.654, "17.65"),
        (1234.5, "1,234"),
        (1e-5, "1e-05"),
        (0.0, "0.000"),
        (None, "\N{EN DASH}"),
        (float("nan"), "not a number"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_have_four_significant_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_sizes_have_the_largest_fitting_unit() -> None:
    assert [size(value) for value in (0, 900, 1536, 1.4 * 2**30, 2.0**45)] == [
        "0 bytes",
        "900 bytes",
        "1.5 KiB",
        "1.4 GiB",
        "32 TiB",
    ]


def test_control_and_bidirectional_characters_are_replaced_and_no_others() -> None:
    kept = "a\tb\nc é 漢 עברית 👩‍🔧"
    assert harmless(kept) == kept
    assert harmless("a\x1bb\x00c\x9bd\u202ee\r\nf") == "a\ufffdb\ufffdc\ufffdd\ufffde\nf"
