"""TRL's DistillationTrainer brings a student nearer to its teacher, on its own completions."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.trainer import speaking
from tests.trainer.conftest import VOCABULARY, tiny_llama, tokenizer_of_bytes
from tests.trainer.jobs import planned as planned_job
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.speaking import loop_settings, speaking_model
from tests.trainer.stop_after import StopAfter
from tuneyard.api.plan import PlannedStage, StageInput
from tuneyard.api.stage_settings import ChatSettings, DistillSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.generation.completions import Policy
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.vocabulary import require_same_vocabulary
from tuneyard_trainer.reinforcement.held_out import split
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.trl_engine import distill
from tuneyard_trainer.trl_engine import sampling as sampling_of_trl
from tuneyard_trainer.trl_engine.teacher import divergence
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, speaking_model_dir: Path, tiny_tokenizer: Any
) -> dict[str, Path]:
    """A student that answers with eight letters, and a wider teacher that knows two of them."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaking, "LETTERS", "ab")
        teacher = speaking_model(folder / "model", tiny_tokenizer, hidden_size=48)
    prompts = folder / "prompts.jsonl"
    questions = [f"Say {number}." for number in range(24)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    return {"model": speaking_model_dir, "teacher": teacher, "prompts": prompts}


def stage(
    adapter: Any = None,
    beta: float = 1.0,
    sampling: dict[str, Any] | None = None,
    runtime: Any = None,
    chat_template: str | None = None,
    **training: Any,
) -> PlannedStage:
    settings = DistillSettings.model_validate(
        {
            "adapter": adapter,
            "prompts": {"format": "auto", "fields": {}, "limit": None},
            "chat": {"system_prompt": None, "chat_template": chat_template},
            "sampling": {"max_new_tokens": 8, **(sampling or {})},
            "beta": beta,
            "training": loop_settings(
                **{"engine": "trl", "max_steps": 4, "learning_rate": 1e-2, **training}
            ),
        }
    )
    return PlannedStage(
        name="distill",
        settings=settings,
        inputs={"model": StageInput(stage="model")},
        runtime=runtime or {"microBatchTokens": 64},
        fingerprint="sha256:test",
    )


def run(
    folder: Path, inputs: dict[str, Path], planned: PlannedStage, worker: Worker | None = None
) -> tuple[dict[str, torch.Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    outcome = distill.run(StageContext(planned, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the loss -----------------------------------------------------------------------------------

Micro = tuple[list[list[int]], list[list[int]]]
"""The prompts' and the completions' tokens of a micro-batch, without padding."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Micro]:
    """The micro-batches that TRL's loss gets."""
    return watched(monkeypatch)


def watched(patch: pytest.MonkeyPatch) -> list[Micro]:
    found: list[Micro] = []
    original = distill._Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        prompts, completions = (
            [ids[mask.bool()].tolist() for ids, mask in zip(*each, strict=True)]
            for each in (
                (inputs["prompt_ids"], inputs["prompt_mask"]),
                (inputs["completion_ids"], inputs["completion_mask"]),
            )
        )
        found.append((prompts, completions))
        return original(self, model, inputs, *args, **kwargs)

    patch.setattr(distill._Trainer, "compute_loss", compute_loss)
    return found


def token_divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """The GKD paper's D_JSD(beta) of one position, over the vocabulary in a straight sum; its
    limits at 0 and 1 divided by the vanishing weight."""
    p, q = teacher.softmax(0), student.softmax(0)
    if beta == 0.0:
        return (p * (p.log() - q.log())).sum()
    if beta == 1.0:
        return (q * (q.log() - p.log())).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def by_hand(
    folders: dict[str, Path], rows: list[tuple[list[int], list[int]]], beta: float, heat: float
) -> tuple[float, float]:
    """The mean divergence of the start models over all tokens of the completions, one row and one
    token after the other in float64, and the norm of its gradient."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folders[role], dtype=torch.float64)
        for role in ("model", "teacher")
    )
    terms = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        ours, theirs = student(input_ids=ids).logits[0], teacher(input_ids=ids).logits[0].detach()
        for position in range(len(prompt), ids.shape[1]):
            terms.append(
                token_divergence(ours[position - 1] / heat, theirs[position - 1] / heat, beta)
            )
    loss = torch.stack(terms).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in student.parameters()))
    return float(loss), norm


@pytest.mark.parametrize(("beta", "heat"), [(0.0, 1.0), (0.3, 0.7), (1.0, 1.5)])
def test_a_steps_loss_is_the_mean_divergence_over_its_completions_tokens(
    beta: float, heat: float, tmp_path: Path, inputs: dict[str, Path], seen: list[Micro]
) -> None:
    planned = stage(beta=beta, sampling={"temperature": heat}, max_steps=1)
    run(tmp_path / "run", inputs, planned)
    assert len(seen) == 4, "64 tokens hold two prompts with their completions"
    rows = [row for prompts, answers in seen for row in zip(prompts, answers, strict=True)]
    assert len(rows) == 8
    (line,) = (line for line in lines(tmp_path / "run") if "loss" in line)
    assert (line["loss"], line["gradientNorm"]) == pytest.approx(
        by_hand(inputs, rows, beta, heat), rel=1e-4
    )
    lengths = [len(answer) for _, answer in rows]
    assert line["completionLength"] == pytest.approx(np.mean(lengths))
    assert line["tokens"] == sum(lengths)


def test_the_held_out_divergence_is_of_completions_that_the_teacher_sampled(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(tmp_path / "run", inputs, stage(beta=0.3, max_steps=1))
    entry = (tmp_path / "run" / "held-out" / "journal.jsonl").read_text().splitlines()[1]
    completions = json.loads(entry)["completions"]
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    assert {tokenizer.decode(ids[:-1]) for ids in completions} < {
        "".join(letters) for letters in _words("ab", 8)
    }, "the student knows eight letters, the teacher two"
    prompts = _held_out_prompts(inputs)
    expected, _ = by_hand(inputs, list(zip(prompts, completions, strict=True)), 0.3, 1.0)
    base = lines(tmp_path / "run")[0]["baseValidationLoss"]
    assert base == pytest.approx(expected, rel=1e-4)


def _words(letters: str, most: int) -> set[tuple[str, ...]]:
    return {word for size in range(most + 1) for word in itertools.product(letters, repeat=size)}


def _held_out_prompts(inputs: dict[str, Path]) -> list[list[int]]:
    """The ids of the prompts that are held out, in the order of the rows."""
    chat = ChatSettings(system_prompt=None, chat_template=None)
    policy = Policy.of(inputs, chat, Worker(0, 1, CPU))
    known = PromptSettings.model_validate({"format": "auto", "fields": {}, "limit": None})
    return [list(prompt.ids) for prompt in split(policy.prompts(known, 8, "prompts"))[1]]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_of_equal_models_is_zero_and_no_token_of_certain_models_is_lost(
    beta: float,
) -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [50.0, -50.0, 0.0]])
    other = torch.tensor([[1.0, 1.0, 0.0], [-50.0, 50.0, 0.0]])
    same = divergence(logits, logits, beta=beta, temperature=2.0)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-6, rtol=0)
    pairs = zip(logits, other, strict=True)
    expected = torch.stack(
        [token_divergence(s.double() / 2, t.double() / 2, beta) for s, t in pairs]
    )
    torch.testing.assert_close(
        divergence(logits, other, beta=beta, temperature=2.0).double(), expected
    )


# ---- learning -----------------------------------------------------------------------------------


ADAPTERS: list[Any] = [None, {"lora": {}}, {"qlora": {}}, {"ia3": {}}, {"bottleneck": {}}]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_student_comes_nearer_to_the_teacher_on_prompts_that_are_held_out(
    adapter: Any, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    before = (inputs["model"] / "config.json").read_text()
    rate = 5e-2 if adapter else 1e-2
    planned = stage(adapter, max_steps=12, evaluation_steps=4, learning_rate=rate)
    _, outcome = run(tmp_path / "run", inputs, planned)
    metrics = outcome.metrics
    share = 0.95 if adapter else 0.1  # LoRA: 0.91 on one processor, less on another
    assert metrics["validationLoss"] < share * metrics["baseValidationLoss"]
    assert (outcome.details["prompts"], outcome.details["heldOutPrompts"]) == (22, 2)
    if adapter is None:
        written = json.loads((tmp_path / "run" / "weights" / "config.json").read_text())
        assert written == json.loads(before), "TRL's own settings are in the result"


def test_recomputed_activations_change_nothing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    plain, _ = run(tmp_path / "plain", inputs, stage({"lora": {}}))
    runtime = {"microBatchTokens": 64, "gradientCheckpointing": True}
    again, _ = run(tmp_path / "again", inputs, stage({"lora": {}}, runtime=runtime))
    for name, weight in plain.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-4, atol=1e-5)


def test_arguments_of_trl_reach_its_sampling(tmp_path: Path, inputs: dict[str, Path]) -> None:
    run(tmp_path / "run", inputs, stage(max_steps=1, trl={"top_k": 1}))
    (line,) = (line for line in lines(tmp_path / "run") if "loss" in line)
    run(tmp_path / "free", inputs, stage(max_steps=1))
    assert line["loss"] != next(x for x in lines(tmp_path / "free") if "loss" in x)["loss"]


def test_the_models_own_generation_settings_do_not_apply_and_are_in_the_result(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    greedy = tmp_path / "greedy"
    shutil.copytree(inputs["model"], greedy)
    config = json.loads((greedy / "generation_config.json").read_text())
    config |= {"do_sample": True, "top_k": 1, "repetition_penalty": 1.5, "min_new_tokens": 8}
    (greedy / "generation_config.json").write_text(json.dumps(config))
    run(tmp_path / "own", {**inputs, "model": greedy}, stage(max_steps=1))
    run(tmp_path / "plain", inputs, stage(max_steps=1))
    one, other = (
        [(line["loss"], line["tokens"]) for line in lines(tmp_path / name) if "loss" in line]
        for name in ("own", "plain")
    )
    assert one == other
    written = json.loads((tmp_path / "own" / "weights" / "generation_config.json").read_text())
    assert {name: written[name] for name in config.keys() & written.keys()} == config


def test_a_student_without_finite_numbers_ends_the_job_by_name(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(tmp_path / "run", inputs, stage(learning_rate=1e30))
    assert ended.value.reason == "LossNotFinite"


# ---- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"lora": {"dropout": 0.3}}])
def test_a_stopped_run_goes_on_with_the_next_prompts_and_the_same_completions(
    adapter: Any, tmp_path: Path, inputs: dict[str, Path], seen: list[Micro]
) -> None:
    planned = stage(adapter, keep_best=False)
    whole, _ = run(tmp_path / "whole", inputs, planned)
    expected = list(seen)
    seen.clear()
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "parts", inputs, planned, StopAfter(1).worker())
    assert stopped.value.step == 2
    resumed, outcome = run(tmp_path / "parts", inputs, planned)
    assert outcome.details["resumedAtStep"] == 2
    assert seen == expected
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)
    assert [line.get("tokens") for line in lines(tmp_path / "parts")] == [
        line.get("tokens") for line in lines(tmp_path / "whole")
    ]


class Killed(BaseException):
    """The end of a process at a report."""


def test_a_killed_run_goes_on_from_its_checkpoint_and_measures_the_same_held_out_rows(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = {"microBatchTokens": 64, "checkpointSteps": 2}
    planned = stage(runtime=runtime, keep_best=False)
    whole, _ = run(tmp_path / "whole", inputs, planned)

    def report(*, step: int = 0, **_: Any) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "parts", inputs, planned, Worker(0, 1, CPU, report=report))
    journal = tmp_path / "parts" / "held-out" / "journal.jsonl"
    before = journal.read_text()
    monkeypatch.setattr(distill, "TransformersSampler", lambda *_: None)  # samples nothing again
    resumed, outcome = run(tmp_path / "parts", inputs, planned)
    assert outcome.details["resumedAtStep"] in (2, 3), "after step 3 the epoch's evaluation saves"
    assert journal.read_text() == before
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)


def test_every_batch_has_equally_many_prompts_and_an_epoch_has_each_prompt_once() -> None:
    order = distill.EqualBatches(np.arange(10), 4, seed=1)
    steps = list(order.batches(0, 5))
    assert [len(rows) for rows in steps] == [4] * 5
    assert sorted(np.concatenate(steps)[:10]) == sorted(np.concatenate(steps)[10:]) == [*range(10)]
    assert [rows.tolist() for rows in order.batches(3, 5)] == [rows.tolist() for rows in steps[3:]]
    (many,) = distill.EqualBatches(np.arange(3), 8, seed=1).batches(0, 1)
    assert sorted(np.bincount(many)) == [2, 3, 3]


# ---- refusals -----------------------------------------------------------------------------------


def test_a_teacher_with_other_tokens_is_refused_before_a_model_is_loaded(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "load_base", None)
    monkeypatch.setattr(policies, "load", None)
    other = tmp_path / "other"
    shutil.copytree(inputs["teacher"], other)
    tokenizer = tokenizer_of_bytes()
    tokenizer.add_tokens(["hedgehog"])
    tokenizer.save_pretrained(other)
    with pytest.raises(StageError) as refused:
        run(tmp_path / "run", {**inputs, "teacher": other}, stage())
    assert refused.value.reason == "VocabularyMismatch"
    assert "differs from the model's in 1 of" in refused.value.message
    assert "'hedgehog' (missing and " in refused.value.message
    assert "optimize.distill.teacher.uri" in refused.value.advice


def test_a_teacher_with_more_logits_for_the_same_tokens_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(inputs["teacher"], wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    require_same_vocabulary(inputs["model"], inputs["teacher"])
    with pytest.raises(StageError, match="400 logits and the teacher 512") as refused:
        require_same_vocabulary(inputs["model"], wider)
    assert refused.value.reason == "VocabularyMismatch"


def test_a_wrong_teacher_is_refused_before_the_fine_tuning_that_comes_first(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(inputs["teacher"], wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    turns = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    plan = planned_job(
        {
            "apiVersion": "tuneyard.io/v1alpha1",
            "kind": "AlignmentJob",
            "metadata": {"name": "distilled"},
            "spec": {
                "model": {"uri": f"file://{inputs['model']}"},
                "sft": {"data": {"train": [{"uri": f"file://{tmp_path}/rows.jsonl"}]}},
                "optimize": {
                    "distill": {
                        "teacher": {"uri": f"file://{wider}"},
                        "prompts": {"uri": f"file://{inputs['prompts']}"},
                    }
                },
                "output": {"uri": "file://out"},
            },
        }
    )
    states: dict[str, str] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage":
            states[event["stage"]] = event["state"]

    with pytest.raises(StageError) as refused:
        torchrun.run(
            plan, str(tmp_path / "out"), base_dir=tmp_path, cache_dir=tmp_path / "cache", emit=emit
        )
    assert refused.value.reason == "VocabularyMismatch"
    assert states == {"prepare": "Succeeded"}


def test_a_teacher_that_cannot_read_the_longest_completion_is_refused(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "load", None)
    short = tmp_path / "short"
    shutil.copytree(inputs["teacher"], short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    with pytest.raises(StageError, match="the context of the teacher has 20") as refused:
        run(tmp_path / "run", {**inputs, "teacher": short}, stage())
    assert refused.value.reason == "TeacherContextTooShort"


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_models_that_count_the_padding_before_a_prompt_are_refused(
    role: str, tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with pytest.raises(StageError, match="GPT2LMHeadModel here: it pads prompts") as refused:
        run(tmp_path / "run", {**inputs, role: folder}, stage())
    assert refused.value.reason == "EngineUnsupported"


def test_an_adapter_on_the_head_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    untied = tmp_path / "untied"
    tiny_llama(VOCABULARY, tie_word_embeddings=False).save_pretrained(untied)
    tiny_tokenizer.save_pretrained(untied)
    adapter = {"lora": {"targets": ["q_proj", "lm_head"]}}
    with pytest.raises(StageError, match="without the adapter of the head") as refused:
        run(tmp_path / "run", {**inputs, "model": untied}, stage(adapter))
    assert refused.value.reason == "EngineUnsupported"


def test_rows_that_trl_tokenizes_otherwise_are_named(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, seen: list[Micro]
) -> None:
    ours = sampling_of_trl.for_trl

    def other(prompt: Any, tokenizer: Any) -> Any:
        given = ours(prompt, tokenizer)
        return given * 2 if prompt.prompt.question == "Say 3." else given

    monkeypatch.setattr(sampling_of_trl, "for_trl", other)
    with pytest.raises(StageError) as refused:
        run(tmp_path / "run", inputs, stage())
    assert refused.value.reason == "TokensDiffer"
    assert "1 of 22 prompts" in refused.value.message
    assert "row 4" in refused.value.message
    assert seen == []


@pytest.mark.parametrize(
    "template", [None, "{% for turn in messages %}{{ turn.content }}<|im_end|>{% endfor %}"]
)
def test_trl_continues_the_tokens_that_are_ours(
    template: str | None, tmp_path: Path, inputs: dict[str, Path], seen: list[Micro]
) -> None:
    run(tmp_path / "run", inputs, stage(max_steps=2, chat_template=template))
    chat = ChatSettings(system_prompt=None, chat_template=template)
    policy = Policy.of(inputs, chat, Worker(0, 1, CPU))
    known = PromptSettings.model_validate({"format": "auto", "fields": {}, "limit": None})
    ours = split(policy.prompts(known, 8, "prompts"))[0]
    first = {tuple(ids) for prompts, _ in seen for ids in prompts}
    assert len(first) == 16, "two steps of one epoch"
    assert first < {prompt.ids for prompt in ours}


def test_a_batch_that_the_workers_cannot_share_equally_is_refused() -> None:
    with pytest.raises(StageError) as refused:
        distill.equal_layout(8, 20, 100, 3)
    assert refused.value.reason == "UnevenBatch"
    assert "a multiple of 3" in refused.value.advice
    for longest, expected in ((20, (4, 1)), (30, (2, 2)), (1000, (1, 4))):
        layout = distill.equal_layout(8, longest, 100, 2)
        assert (layout.rows, layout.accumulated) == expected


# ---- several workers ----------------------------------------------------------------------------


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = watched(patch)
        distill.run(StageContext(stage(max_steps=3), inputs, folder, Worker(rank, 2, CPU)))
    (folder / f"seen-{rank}.json").write_text(json.dumps(found))


def test_two_workers_share_a_steps_prompts_and_take_the_mean_over_all_tokens(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    spawn(2, _worker, folder, inputs)
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    rows = [
        row for micros in seen for pair in micros[:2] for row in zip(*pair, strict=True)
    ]  # a step of a worker is two micro-batches of two prompts
    assert len(rows) == 8
    assert len({tuple(prompt) for prompt, _ in rows}) == 8
    first, *_ = (line for line in lines(folder) if "loss" in line)
    expected = by_hand(inputs, rows, 1.0, 1.0)
    assert (first["loss"], first["gradientNorm"]) == pytest.approx(expected, rel=1e-4)
    start = lines(folder)[0]["baseValidationLoss"]
    assert lines(folder)[-1]["validationLoss"] < start
    run(tmp_path / "one", inputs, stage(max_steps=1))
    assert lines(tmp_path / "one")[0]["baseValidationLoss"] == pytest.approx(start, rel=1e-5)
