"""An evaluation by vLLM measures what one by transformers does.

Needs vLLM, on CPU or GPU (`make test-vllm`). Tests that need no vLLM are in `test_evaluate.py`,
`models/test_adapters.py` and `planning/test_evaluation_engine.py`.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.evaluation.measuring import ALONE, alignment_stage, evaluate_stage, measured
from tests.trainer.evaluation.test_answer_suites import ROWS, lines
from tests.trainer.ports import free_port
from tuneyard.api.adapters import Adapter
from tuneyard.api.alignment import Sampling
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.vllm import ModelCopy, VllmEngine
from tuneyard_trainer.models import adapters, layers
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares float32 numbers of the CPU"),
]

PAD = 3
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32 numbers: the smallest that vLLM's attention supports."""
SHARED_TOKENS = [4 + number % 300 for number in range(140)]
"""More than a block of vLLM's cache."""
PROMPTS = [[*SHARED_TOKENS, *own] for own in ([5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15])]
SHORT = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
NEW = 12


def wide(**changes: Any) -> Any:
    """Return a model whose answers are not one token over and over."""
    return tiny_llama(VOCABULARY, **(WIDE | {"tie_word_embeddings": False} | changes)).eval()


def noisy(model: Any, scale: float) -> Any:
    """Change what is trained of a model, so that its answers differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(kind: str, tokenizer: Any) -> Any:
    settings = {"lora": {"decomposed": True}} if kind == "dora" else {kind: {}}
    adapter = Adapter.model_validate(settings)
    return noisy(adapters.attach(wide(), adapter, seed=0, tokenizer=tokenizer), 0.3)


@pytest.fixture
def engines() -> Iterator[Any]:
    """Make engines, and close them after the test."""
    made: list[VllmEngine] = []

    def make(model: Any) -> VllmEngine:
        made.append(VllmEngine(model, SharedStage(ALONE)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def complete(engine: Any, prompts: list[list[int]], new: int = NEW) -> list[tuple[int, ...]]:
    engine.prepare(max(map(len, prompts)) + new)
    found: list[tuple[int, ...]] = engine.complete(
        prompts, max_new_tokens=new, before_batch=lambda: None
    )
    return found


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_answers_are_those_of_transformers(tied: bool, engines: Any) -> None:
    model = wide(tie_word_embeddings=tied)
    engine = engines(model)
    own = complete(TransformersEngine(model, PAD), PROMPTS)
    assert complete(engine, PROMPTS) == own
    assert complete(engine, PROMPTS[::-1]) == own[::-1]
    assert len(set(own)) > 1


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_answers_while_it_is_on_and_its_base_while_it_is_off(
    kind: str, engines: Any, tiny_tokenizer: Any
) -> None:
    model = adapted(kind, tiny_tokenizer)
    engine, own = engines(model), TransformersEngine(model, PAD)
    tuned = complete(engine, PROMPTS)
    assert tuned == complete(own, PROMPTS)
    with adapters.disabled(model):
        before = complete(engine, PROMPTS)
        assert (
            before == complete(own, PROMPTS) == complete(TransformersEngine(wide(), PAD), PROMPTS)
        )
    assert before != tuned
    assert complete(engine, PROMPTS) == tuned


def test_an_answer_ends_with_the_first_stop_token_of_the_model(engines: Any) -> None:
    model = wide()
    plain = complete(TransformersEngine(model, PAD), SHORT)
    model.generation_config.eos_token_id = [plain[0][2], plain[1][4]]
    engine = engines(model)
    stopped = complete(engine, SHORT)
    assert stopped == complete(TransformersEngine(model, PAD), SHORT)
    assert len(stopped[0]) < NEW


def test_a_longer_prompt_gets_another_engine_and_the_first_one_is_freed(engines: Any) -> None:
    model = wide()
    engine = engines(model)
    complete(engine, SHORT)
    (first,) = engine._copy.llm.apply_model(weakref.ref)
    complete(engine, SHORT[:1])
    assert first() is not None, "a shorter prompt needs no other engine"
    assert complete(engine, PROMPTS) == complete(TransformersEngine(model, PAD), PROMPTS)
    assert first() is None
    (second,) = engine._copy.llm.apply_model(weakref.ref)
    engine.close()
    assert second() is None


def test_an_answer_ends_at_the_models_context_and_a_prompt_that_fills_it_is_refused(
    engines: Any,
) -> None:
    model = wide(max_position_embeddings=150)
    engine = engines(model)
    whole = complete(TransformersEngine(wide(), PAD), PROMPTS[:1], 7)
    assert complete(engine, PROMPTS[:1], 20) == whole
    for prompt in (SHARED_TOKENS + [5] * 10, []):
        engine.prepare(200)
        with pytest.raises(StageError, match=f"a prompt of {len(prompt)} tokens") as caught:
            engine.complete([prompt], max_new_tokens=4, before_batch=lambda: None)
        assert caught.value.reason == "EngineUnsupported"
        assert "remove evaluate.engine" in caught.value.advice


def test_an_engine_that_runs_another_model_answers_nothing(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = wide(initializer_range=0.3)
    merged = adapters.merged_weights
    monkeypatch.setattr(adapters, "merged_weights", lambda _, **named: merged(other, **named))
    with pytest.raises(StageError, match="does not run the model that is measured") as caught:
        complete(engines(wide()), SHORT)
    assert caught.value.reason == "SamplerMismatch"
    assert "evaluate.engine" in caught.value.advice


def test_a_request_to_stop_ends_the_call_before_the_engine_answers(engines: Any) -> None:
    def stop() -> None:
        raise Interrupted("evaluate", 0)

    engine = engines(wide())
    engine.prepare(100)
    with pytest.raises(Interrupted):
        engine.complete(SHORT, max_new_tokens=4, before_batch=stop)


def test_sampled_completions_depend_on_prompt_and_key_alone(engines: Any) -> None:
    engine = engines(wide())
    engine.prepare(100)
    settings = Sampling.model_validate({"max_new_tokens": NEW})

    def sample(prompts: list[list[int]], keys: list[int]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = engine.sample(
            prompts, keys, stop=(2,), settings=settings, before_batch=lambda: None
        )
        return found

    together = sample(SHORT, [1, 2, 3])
    assert together == [sample([p], [key])[0] for p, key in zip(SHORT, [1, 2, 3], strict=True)]
    assert together != sample(SHORT, [4, 5, 6])
    assert together != complete(engine, SHORT)


# ---- the stage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path], tiny_tokenizer: Any
) -> dict[str, Path]:
    """The inputs of evaluations: a model, an adapter and whole weights that are tuned from it."""
    folder = tmp_path_factory.mktemp("given")
    wide().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    adapters.save(adapted("lora", tiny_tokenizer), folder / "adapter" / "weights")
    wide(initializer_range=0.1).save_pretrained(folder / "whole" / "weights")
    shutil.copytree(inputs["prepared"], folder / "data")
    return {
        "model": folder / "model",
        "adapter": folder / "adapter",
        "whole": folder / "whole",
        "data": folder / "data",
        "pairs": inputs["pairs"],
        "reward": inputs["reward"],
        "suite.0": lines(folder / "capitals.jsonl", ROWS),
    }


SUITE = {
    "name": "capitals",
    "kind": "answers",
    "limit": None,
    "answers": {
        "metrics": ["exactMatch", "tokenF1"],
        "answerSchema": None,
        "answerPattern": ".",
        "maxNewTokens": 20,
    },
}


def run(
    folder: Path, stage: PlannedStage, given: dict[str, Path], tuned: str, worker: Worker = ALONE
) -> StageOutcome:
    folder.mkdir(exist_ok=True)
    settings = stage.settings
    assert isinstance(settings, EvaluateSettings)
    inputs = {"model": given["model"], "tuned": given[tuned]}
    if settings.completions:
        inputs |= {"pairs": given["pairs"], "reward": given["reward"], "judge": given["model"]}
        inputs["reward.independent"] = given["reward"]
    else:
        inputs |= {"data": given["data"], "suite.0": given["suite.0"]}
    digests = {role: role for role in inputs} if worker.is_main else {}
    return evaluate.run(StageContext(stage, inputs, folder, worker, digests))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[ModelCopy]:
    """The engines that are built."""
    made: list[ModelCopy] = []
    build = ModelCopy.of

    def of(*given: Any, **named: Any) -> ModelCopy:
        made.append(build(*given, **named))
        return made[-1]

    monkeypatch.setattr(ModelCopy, "of", of)
    return made


@pytest.mark.parametrize(("tuned", "count"), [("adapter", 1), ("whole", 2)])
def test_a_stage_measures_what_one_by_transformers_measures_and_frees_its_engines(
    tuned: str, count: int, tmp_path: Path, given: dict[str, Path], copies: list[ModelCopy]
) -> None:
    plain = run(tmp_path / "plain", evaluate_stage(suites=[SUITE]), given, tuned)
    assert not copies
    found = run(tmp_path / "vllm", evaluate_stage(suites=[SUITE], engine="vllm"), given, tuned)
    assert found.metrics == pytest.approx(plain.metrics)
    one, other = measured(tmp_path / "plain"), measured(tmp_path / "vllm")
    for name in ("answers", "samples", "suiteAnswers"):
        assert one[name] == other[name]
    assert any(answer["base"] != answer["tuned"] for answer in one["answers"])
    assert found.details["engine"] == "vllm"
    assert "engine" not in plain.details
    assert len({id(copy.model) for copy in copies}) == count
    assert all(copy.llm is None for copy in copies)


def test_an_engine_is_freed_after_an_error_too(
    tmp_path: Path,
    given: dict[str, Path],
    copies: list[ModelCopy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise StageError("SuiteFailed", "no answers", advice="")

    monkeypatch.setattr(VllmEngine, "complete", broken)
    with pytest.raises(StageError, match="no answers"):
        run(tmp_path / "out", evaluate_stage(engine="vllm"), given, "adapter")
    assert [copy.llm for copy in copies] == [None]


def test_an_alignment_samples_with_vllm_and_repeats_itself(
    tmp_path: Path, given: dict[str, Path], copies: list[ModelCopy]
) -> None:
    stage = alignment_stage(engine="vllm")
    found = [run(tmp_path / name, stage, given, "adapter") for name in ("one", "two")]
    assert len(copies) == 2
    assert all(copy.llm is None for copy in copies)
    one, two = (measured(tmp_path / name) for name in ("one", "two"))
    assert one["answers"] == two["answers"]
    assert found[0].metrics == pytest.approx(found[1].metrics)
    plain = run(tmp_path / "plain", alignment_stage(), given, "adapter")
    assert plain.metrics.keys() == found[0].metrics.keys()
    same = ("preferenceAccuracy", "preferenceMargin", "sycophancyShift", "completions")
    for name in same:  # what is not sampled
        assert found[0].metrics[name] == pytest.approx(plain.metrics[name])
    assert measured(tmp_path / "plain")["answers"] != one["answers"]


def _worker(rank: int, port: int, folder: Path, given: dict[str, Path]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # as Ray Train sets them
    dist.init_process_group("gloo", rank=rank, world_size=2)
    worker = Worker(rank, 2, torch.device("cpu"), identity=ALONE.identity if rank == 0 else "")
    stage = evaluate_stage(suites=[SUITE], engine="vllm")
    run(folder / "two", stage, given, "whole", worker)
    dist.destroy_process_group()


def test_two_workers_share_the_prompts_and_measure_what_one_does(
    tmp_path: Path, given: dict[str, Path]
) -> None:
    mp.spawn(_worker, args=(free_port(), tmp_path, given), nprocs=2)
    run(tmp_path / "one", evaluate_stage(suites=[SUITE]), given, "whole")
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-5)
    assert two["answers"] == one["answers"]
