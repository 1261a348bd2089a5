"""The question whether a job fits: when it is asked, and what becomes of the answer."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.rows import Row, write_prepared
from tuneyard.api.job_facts import ChosenSettings, Device, JobFacts, PromptFacts, RowFacts
from tuneyard.api.plan import Plan, StageRecord, TrainRuntime
from tuneyard.api.report import JobReport
from tuneyard.errors import StageError
from tuneyard_trainer import machine as machine_module
from tuneyard_trainer.machine import memory_limit
from tuneyard_trainer.running import facts as facts_module
from tuneyard_trainer.running import kept_settings, runner
from tuneyard_trainer.running.facts import device_of, job_facts
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

REFUSAL = {"refusal": {"reason": "DoesNotFit", "message": "too large", "advice": "Set this."}}
SMALLER = {"settings": {"sft": {"microBatchTokens": 64, "gradientCheckpointing": True}}}


class Run:
    """A run of a plan, its questions and its events."""

    def __init__(self, plan: Plan, folder: Path, answer: Any) -> None:
        self.plan, self.folder, self._answer = plan, folder, answer
        self.asked: list[JobFacts] = []
        self.log: list[str] = []
        self.step = -1
        """The newest step of the stage sft. -1: it has not begun."""

    def ask(self, event: dict[str, Any]) -> Any:
        assert event["type"] == "facts"
        self.asked.append(JobFacts.model_validate(event["facts"]))
        self.log.append("asked")
        return self._answer

    def emit(self, event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["stage"] == "sft":
            self.step = max(self.step, event["step"])
        if event["type"] == "stage" and event["state"] != "Running":
            self.log.append(event["stage"])

    def go(self, stop_at: int | None = None) -> dict[str, StageRecord]:
        """Run the plan. `stop_at`: the step after which it is asked to stop."""
        store = Store(str(self.folder / "out"), self.folder / "scratch")
        store.claim(self.plan.job, attempt=1)
        return PlanRunner(
            stage_inputs=StageInputs(self.plan, store, self.folder, self.folder / "cache"),
            worker=Worker(
                rank=0,
                world_size=1,
                device=torch.device("cpu"),
                stop=lambda: stop_at is not None and self.step >= stop_at,
            ),
            emit=self.emit,
            ask=self.ask,
        ).run()


@pytest.fixture
def start(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Run]:
    write_data(tmp_path)
    training = {"maxSteps": 5, "checkpointSteps": 1, "learningRate": 0.01}
    plan = planned(manifest(tiny_model_dir, training=training, evaluate={"samples": 0}))
    return lambda answer=None: Run(plan, tmp_path, answer)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runtime of each stage that runs, in order."""
    seen: list[Any] = []
    original = runner._stage_function

    def recorded(kind: Any) -> Callable[[StageContext], StageOutcome]:
        def run(context: StageContext) -> StageOutcome:
            seen.append((context.stage.name, context.stage.runtime))
            return original(kind)(context)

        return run

    monkeypatch.setattr(runner, "_stage_function", recorded)
    return seen


def test_the_question_comes_once_after_the_data_is_prepared_and_before_the_training(
    start: Callable[..., Run],
) -> None:
    run = start()
    records = run.go()
    assert run.log == ["prepare", "asked", "sft", "evaluate", "export"]
    (facts,) = run.asked
    assert facts.model is not None
    assert facts.model.architecture == "llama"
    assert facts.rows == {"prepare": RowFacts(longest=49, held_out=54)}
    assert records["prepare"].metrics["longestRow"] == 54
    assert facts.done == ["prepare"]
    assert facts.device is not None
    assert facts.device.gpu is None
    again = start()
    again.go()
    assert again.log == ["prepare", "sft", "evaluate", "export"]
    assert not again.asked, "a job without a stage left that trains asks nobody"


def test_a_job_that_does_not_fit_ends_before_its_training_and_leaves_nothing_half_trained(
    start: Callable[..., Run],
) -> None:
    run = start(REFUSAL)
    with pytest.raises(StageError) as error:
        run.go()
    assert (error.value.reason, error.value.advice) == ("DoesNotFit", "Set this.")
    assert not error.value.retryable
    assert run.log == ["prepare", "asked"]
    assert not (run.folder / "out/stages/sft/weights").exists()
    assert not (run.folder / "out/result").exists()


def test_the_calculated_memory_of_a_stage_that_trains_is_in_its_record_and_in_the_report(
    start: Callable[..., Run],
) -> None:
    run = start({"plannedBytes": {"sft": 3 << 30, "evaluate": 1 << 30}})
    records = run.go()
    assert records["sft"].details["plannedMemoryBytes"] == 3 << 30
    assert "plannedMemoryBytes" not in records["evaluate"].details
    report = JobReport.model_validate_json((run.folder / "out/result/report.json").read_text())
    assert [(each.stage, each.planned_bytes) for each in report.memory] == [("sft", 3 << 30)]
    assert report.memory[0].measured_bytes == records["sft"].metrics["peakMemoryBytes"]


def test_the_chosen_settings_run_the_stage_and_change_neither_identity_nor_other_stages(
    start: Callable[..., Run], settings: list[Any]
) -> None:
    plain = start().go()
    shutil.rmtree(start().folder / "out")
    settings.clear()
    chosen = start(SMALLER).go()
    runtimes = dict(settings)
    assert runtimes["sft"].micro_batch_tokens == 64
    assert runtimes["sft"].gradient_checkpointing
    assert runtimes["sft"].checkpoint_steps == 1, "as the manifest says"
    assert runtimes["evaluate"].micro_batch_tokens == "auto"
    assert chosen["sft"].identity == plain["sft"].identity


def interrupted(run: Run) -> None:
    """Run a plan until its first checkpoint."""
    with pytest.raises(Interrupted):
        run.go(stop_at=2)


def test_a_resumed_stage_keeps_the_settings_of_its_checkpoint_and_reaches_the_same_weights(
    start: Callable[..., Run], settings: list[Any]
) -> None:
    """The first attempt asks before more is known, or its question is lost."""
    start(None).go()
    whole = load_file(next((start().folder / "out/stages/sft/weights").glob("*.safetensors")))
    shutil.rmtree(start().folder / "out")
    interrupted(start(None))
    settings.clear()
    start(SMALLER).go()
    runtimes = dict(settings)
    assert runtimes["sft"].micro_batch_tokens == "auto"
    assert not runtimes["sft"].gradient_checkpointing
    file = next((start().folder / "out/stages/sft/weights").glob("*.safetensors"))
    for name, weight in load_file(file).items():
        assert torch.equal(weight, whole[name]), name
    assert not (start().folder / "out/stages/sft/checkpoints").exists()


@pytest.mark.parametrize("change", ["device", "manifest", "no checkpoint"])
def test_new_settings_are_chosen_on_another_device_for_another_manifest_and_at_the_start(
    start: Callable[..., Run], settings: list[Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run = start(SMALLER)
    if change == "no checkpoint":
        with pytest.raises(Interrupted):
            run.go(stop_at=0)
    else:
        interrupted(run)
    again = start({"settings": {"sft": {"microBatchTokens": 32}}})
    if change == "device":
        limit = facts_module.memory_limit()
        monkeypatch.setattr(facts_module, "memory_limit", lambda: limit // 2)
    if change == "manifest":
        stages = [
            stage.model_copy(update={"runtime": TrainRuntime(micro_batch_tokens=128)})
            if stage.name == "sft"
            else stage
            for stage in again.plan.stages
        ]
        again.plan = again.plan.model_copy(update={"stages": stages})
    settings.clear()
    again.go()
    assert dict(settings)["sft"].micro_batch_tokens == 32
    assert not dict(settings)["sft"].gradient_checkpointing


def test_settings_count_once_a_checkpoint_was_made_with_them(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """An attempt whose question was lost, and that came to nothing, decides for no later one."""
    stage = start().plan.stages[1]
    small = ChosenSettings(micro_batch_tokens=64)
    first, second = Device(gpu="A", memory=80), Device(gpu="B", memory=24)

    def tokens(device: Device, chosen: ChosenSettings | None) -> int | str:
        settled = kept_settings.settle(stage, chosen, tmp_path, device, 1)
        assert settled.identity({}) == stage.identity({})
        return settled.runtime.micro_batch_tokens

    assert tokens(first, None) == "auto"
    assert tokens(first, small) == 64, "no checkpoint was made"
    (tmp_path / "checkpoints/step-00000002").mkdir()
    assert tokens(first, None) == 64
    assert tokens(second, None) == "auto"
    assert tokens(second, small) == 64, "no checkpoint was made on this device"
    (tmp_path / "checkpoints/step-00000004").mkdir()
    assert tokens(second, None) == 64
    assert tokens(first, None) == 64
    (tmp_path / "checkpoints/settings.json").write_text("[{")
    assert tokens(first, None) == "auto"


def test_settings_that_cannot_be_kept_end_the_attempt_with_the_disks_reason(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_settings, "write_atomically", full)
    with pytest.raises(StageError) as error:
        start().go()
    assert error.value.reason == "DiskFull"


def test_facts_that_cannot_be_read_end_the_attempt_with_the_disks_reason(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(facts_module, "job_facts", broken)
    with pytest.raises(StageError) as error:
        start().go()
    assert error.value.reason == "WriteFailed"


def test_without_an_answer_the_job_trains_as_planned(
    start: Callable[..., Run], settings: list[Any]
) -> None:
    start(None).go()
    assert dict(settings)["sft"].micro_batch_tokens == "auto"


# ---- facts --------------------------------------------------------------------------------------

CPU = torch.device("cpu")


Hands = dict[tuple[str, str], Path]
"""The inputs that are at hand, by stage and role."""


def known(plan: Plan, model: Path, hands: Hands, devices: int = 1) -> JobFacts:
    return job_facts(
        plan,
        model,
        {},
        lambda stage, role: hands.get((stage.name, role)),
        CPU,
        devices=devices,
        neighbors=1,
    )


def row(length: int, prompt: int) -> Row:
    """Return a row of `length` tokens whose first `prompt` are no targets."""
    return [7] * length, [int(position >= prompt) for position in range(length)]


def alignment(model: Path, **spec: Any) -> Plan:
    return planned(
        {
            "apiVersion": "tuneyard.io/v1alpha1",
            "kind": "AlignmentJob",
            "metadata": {"name": "job"},
            "spec": {
                "model": {"uri": f"file://{model}"},
                "output": {"uri": "file://out"},
                "adapter": {"lora": {}},
                **spec,
            },
        }
    )


def test_the_rows_that_are_trained_on_count_and_not_those_that_are_held_out(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    pairs = {"data": [{"uri": "file://pairs.jsonl"}]}
    plan = alignment(tiny_model_dir, preferences=pairs, optimize={"dpo": {}})
    held_out = [row(64, 9), row(22, 17), row(30, 2)]
    write_prepared(tmp_path, tiny_tokenizer, [row(20, 5), row(31, 5)], held_out)
    facts = known(plan, tiny_model_dir, {("dpo", "data"): tmp_path}, devices=4)
    assert facts.rows == {"pairs": RowFacts(longest=31, held_out=64)}
    assert not facts.prompts, "the evaluation's own input is not at hand"
    both = {("dpo", "data"): tmp_path, ("evaluate", "pairs"): tmp_path}
    facts = known(plan, tiny_model_dir, both, devices=4)
    assert facts.prompts == {"evaluate": PromptFacts(longest=17, count=3)}
    assert facts.devices == 4


def test_prompts_and_models_that_are_at_hand_are_measured_and_others_left_out(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "why " * n}) + "\n" for n in (3, 40, 7)))
    grpo = {"prompts": {"uri": "file://prompts.jsonl"}, "sampling": {"maxNewTokens": 4}}
    terms = [{"model": {"uri": "hf://org/other"}, "weight": 1.0}]
    plan = alignment(
        tiny_model_dir,
        optimize={"grpo": grpo},
        rewardModel={"model": {"uri": "file://reward"}},
        rewardTerms=terms,
    )
    hands = {
        (stage, role): path
        for stage in ("grpo", "evaluate")
        for role, path in (("prompts", prompts), ("reward", tiny_model_dir))
    }
    facts = known(plan, tiny_model_dir, hands)
    assert facts.prompts.keys() == {"grpo", "evaluate"}
    assert facts.prompts["grpo"].count == 3
    messages = [{"role": "user", "content": "why " * 40}]
    text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert facts.prompts["grpo"].longest == len(expected)
    assert facts.models.keys() == {"grpo/reward", "evaluate/reward"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    size = sum(p.numel() for p in model.parameters()) - model.score.weight.numel()
    assert facts.models["grpo/reward"] == size


def test_a_teacher_that_is_at_hand_is_counted_with_its_head(tiny_model_dir: Path) -> None:
    prompts = {"uri": "file://prompts.jsonl"}
    distill = {"teacher": {"uri": "file://teacher"}, "prompts": prompts}
    plan = alignment(tiny_model_dir, optimize={"distill": distill})
    facts = known(plan, tiny_model_dir, {("distill", "teacher"): tiny_model_dir})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert facts.models == {"distill/teacher": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize("text", ["", "no json", '{"answer": 1}\n'])
def test_prompts_that_cannot_be_read_end_nothing_here(
    tmp_path: Path, tiny_model_dir: Path, text: str
) -> None:
    """The stage that completes them reports what is wrong."""
    (tmp_path / "prompts.jsonl").write_text(text)
    grpo = {"prompts": {"uri": "file://prompts.jsonl"}}
    rule = {"rule": {"exactMatch": "answer"}}
    plan = alignment(tiny_model_dir, optimize={"grpo": grpo}, rewardModel=rule)
    hands = {("grpo", "prompts"): tmp_path / "prompts.jsonl"}
    assert known(plan, tiny_model_dir, hands).prompts == {}


def test_an_input_is_at_hand_if_nothing_has_to_be_downloaded(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    plan = alignment(
        tiny_model_dir,
        optimize={"grpo": {"prompts": {"uri": "file://missing.jsonl"}}},
        rewardModel={"model": {"uri": "hf://org/reward"}},
    )
    store = Store(str(tmp_path / "out"), tmp_path / "scratch")
    inputs = StageInputs(plan, store, tmp_path, tmp_path / "cache")
    grpo = plan.stages[0]
    assert inputs.at_hand(grpo, "model") == tiny_model_dir
    assert inputs.at_hand(grpo, "prompts") is None
    assert inputs.at_hand(grpo, "reward") is None
    assert inputs.at_hand(plan.stages[1], "tuned") is None, "no stage has trained it"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "mamba"}', "\xff"])
def test_a_model_that_is_not_described_gives_the_reason_and_ends_nothing(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    facts = known(planned(manifest(tmp_path)), tmp_path, {})
    assert facts.model is None
    assert facts.unknown_model
    assert facts.rows == {}


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/jobs/one", "jobs/memory.max"),
        ("0::/jobs/one", "jobs/one/memory.max"),
        ("4:cpu:/a\n9:memory:/jobs/one\n0::/", "memory/jobs/one/memory.limit_in_bytes"),
        ("9:cpu,memory:/of/the/host", "memory/memory.limit_in_bytes"),
    ],
    ids=["around its own", "version 2", "version 1", "a container's root"],
)
def test_the_limit_of_the_cgroup_is_shared_by_the_workers_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, file: str
) -> None:
    monkeypatch.setattr(machine_module, "MOUNT", tmp_path)
    monkeypatch.setattr(machine_module, "OWN_GROUPS", tmp_path / "own")
    machine = memory_limit()
    (tmp_path / "own").write_text(groups)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text("max\n")
    assert memory_limit() == machine
    limit.write_text(f"{64 << 20}\n")
    assert device_of(CPU, 4).memory == 16 << 20


@pytest.mark.parametrize(
    ("limit", "swap"),
    [(None, 256 << 20), ("max", 256 << 20), (f"{96 << 20}", 96 << 20), ("0", 0)],
    ids=["no file", "no limit", "a limit", "a pod of Kubernetes"],
)
def test_no_process_can_go_beyond_the_memory_of_all_with_the_swap_that_they_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, swap: int
) -> None:
    for name in ("MOUNT", "OWN_GROUPS", "MEMORY"):
        monkeypatch.setattr(machine_module, name, tmp_path / name)
    (tmp_path / "OWN_GROUPS").write_text("0::/jobs/one")
    (tmp_path / "MEMORY").write_text(f"MemTotal: 99 kB\nSwapTotal:   {256 << 10} kB\n")
    group = tmp_path / "MOUNT/jobs/one"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{64 << 20}")
    if limit is not None:
        (group / "memory.swap.max").write_text(limit)
    assert device_of(CPU, 4).most == (64 << 20) + swap
