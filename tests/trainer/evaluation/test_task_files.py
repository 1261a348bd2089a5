"""Task files of lm-evaluation-harness give the harness's numbers, and run no code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from tests.trainer.evaluation.measuring import ALONE, evaluate_stage
from tests.trainer.evaluation.test_answer_suites import lines
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.evaluation.suites import harness, local_task, task_file
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.reinforcement import patterns
from tuneyard_trainer.worker import StageContext

FIELD = "spec.evaluate.suites[0].task"
CHOICES = {
    "task": "lamps",
    "dataset_path": "json",
    "test_split": "train",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "options",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "f1"}],
    "metadata": {"version": 1.5},
}
ROWS = [
    {"question": "What is red?", "options": ["the lamp", "a desk"], "right": 0, "topic": "color"},
    {"question": "Who asks?", "options": ["nobody", "the team"], "right": 1, "topic": "team"},
    {"question": "{{ 7 * 7 }}", "options": ["{{ 1 }}", "the button"], "right": 1, "topic": "x"},
    {"question": "Where is it?", "options": ["here", "there"], "right": 0, "topic": "place"},
]
GENERATED = {
    **{name: CHOICES[name] for name in ("task", "dataset_path", "test_split", "fewshot_split")},
    "output_type": "generate_until",
    "doc_to_text": "{{topic | upper}}: {{question | regex_replace('red', 'blue')}}",
    "doc_to_target": "{{options[right]}}",
    "description": "Answer about lamps.\n",
    "target_delimiter": " -> ",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [
        {
            "name": "first",
            "filter": [
                {"function": "regex", "regex_pattern": "(\\w+)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
        },
        {"metric": "chrf"},
    ],
}
SHAPES: dict[str, dict[str, Any]] = {
    "choices": CHOICES,
    "choices with examples": {**CHOICES, "num_fewshot": 2, "fewshot_delimiter": "\n##\n"},
    "listed choices": {**CHOICES, "doc_to_choice": ["yes", "no"]},
    "rendered choices": {
        **CHOICES,
        "doc_to_choice": "{{ options + [topic] }}",
        "doc_to_target": "{{ topic }}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}, {"metric": "brier_score"}],
    },
    "generated": GENERATED,
    "generated, several targets": {
        **GENERATED,
        "doc_to_target": "options",
        "metric_list": [{"metric": "exact_match"}],
    },
    "log-likelihood": {
        **{name: CHOICES[name] for name in ("task", "dataset_path", "test_split")},
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "{{options[right]}}",
    },
}


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> tuple[LlamaForCausalLM, Any]:
    cpu = torch.device("cpu")
    model: Any = load_base(tiny_model_dir, dtype=torch.float32, device=cpu, shards=1)
    return model.eval(), load_tokenizer(tiny_model_dir)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def written(folder: Path, task: dict[str, Any], rows: Sequence[Any] = ROWS) -> tuple[Path, Path]:
    """Return a task file, which `lm_eval` reads too, and its rows."""
    data = lines(folder / "rows.jsonl", rows)
    file = folder / "lamps.yaml"
    file.write_text(yaml.safe_dump({**task, "dataset_kwargs": {"data_files": str(data)}}))
    return file, data


def run(make: Any, model: Any, tokenizer: Any, **changes: Any) -> harness.TaskResult:
    given: dict[str, Any] = {"limit": None, "few_shot": None, "chat_template": False}
    task = harness.Task(name="lamps", field=FIELD, make=make, **(given | changes))
    return harness.run_task(task, model, tokenizer, lambda: None)


# ---- the harness's numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_task_file_gives_the_numbers_that_the_harness_gives_for_it(
    tmp_path: Path, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    file, data = written(tmp_path, SHAPES[shape])
    known = partial(TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness, "known_tasks", known)
    changes = {"chat_template": shape == "generated", "limit": 3}
    expected = run(None, *tiny, **changes)
    found = run(local_task.local_task("lamps", file, data, FIELD), *tiny, **changes)
    assert found.metrics == expected.metrics
    assert {name: each.tolist() for name, each in found.items.items()} == {
        name: each.tolist() for name, each in expected.items.items()
    }
    assert found.higher_is_better == expected.higher_is_better
    assert found.details == expected.details
    assert found.metrics


@pytest.mark.slow
def test_a_suite_gives_the_numbers_of_the_command_line(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    metrics = ["acc", "acc_norm"]  # the command line draws 100,000 samples for an error of f1
    task = {**CHOICES, "num_fewshot": 1, "metric_list": [{"metric": name} for name in metrics]}
    file, data = written(tmp_path, task)
    given = {"model": inputs["model"], "tuned": inputs["tuned"], "suite.0": data, "task.0": file}
    suite = {"name": "mine", "kind": "task", "limit": 3}
    (tmp_path / "out").mkdir()
    stage = evaluate_stage(suites=[suite])
    found = evaluate.run(StageContext(stage, given, tmp_path / "out", ALONE)).metrics
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "lamps"]
    command += ["--model_args", f"pretrained={inputs['model']},dtype=float32", "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--limit", "3", "--batch_size", "1"]
    command += ["--output_path", str(tmp_path / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    expected = json.loads(file.read_text())["results"]["lamps"]
    for metric in metrics:
        assert found[f"mine/base{metric[0].upper()}{metric[1:]}"] == pytest.approx(
            expected[f"{metric},none"], abs=1e-9
        )


def test_the_metrics_and_aggregations_that_a_file_may_name_are_the_harnesss_own() -> None:
    named = {name for names in task_file.METRICS.values() for name in names}
    assert named <= set(METRIC_REGISTRY)
    schema = task_file.MetricEntry.model_json_schema()["properties"]
    for name in named:
        assert task_file.MetricEntry(metric=name).metric == name
    assert set(schema["aggregation"]["anyOf"][0]["enum"]) <= set(AGGREGATION_REGISTRY)


# ---- files that run code ------------------------------------------------------------------------

HOSTILE = {
    "doc_to_text: !function utils.text": "doc_to_text has the tag !function",
    "metric_list: [{metric: !function utils.metric}]": "metric_list[0].metric has the tag",
    "task: !!python/object/apply:os.system ['touch MARK']": "task has the tag !!python/object",
    "include: other.txt": "include is not a key that Tuneyard reads",
    "process_docs: utils.docs": "process_docs is not a key",
    "use_prompt: promptsource": "use_prompt is not a key",
    "custom_dataset: utils.data": "custom_dataset is not a key",
    "unsafe_code: true": "unsafe_code is not a key",
    "metric_list: [{metric: ./evil.py}]": "metric_list.0.metric: './evil.py' is not a metric",
    "metric_list: [{metric: acc, hf_evaluate: true}]": "metric_list.0.hf_evaluate is not a key",
    "generation_kwargs: {custom_generate: ./evil}": "generation_kwargs.custom_generate is not a",
    "generation_kwargs: {do_sample: true}": "generation_kwargs.do_sample: Input should be False",
    "filter_list: [{name: a, filter: [{function: custom}]}]": "filter.0.function: Input should be",
    "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '('}]}]": "no regular exp",
    "metadata: {version: 1, data: x}": "metadata.data is not a key",
    "description: &a text\ntask: *a": "it has an alias",
    "num_fewshot: 100000": "num_fewshot: Input should be less than or equal to 64",
    "doc_to_choice: [a, b]": "doc_to_choice and output_type multiple_choice belong together",
    "metric_list: [{metric: acc}]": "the metric acc is none of output_type generate_until",
    "description: 2020-01-01": "description has the tag !!timestamp",
    "- a list": "it is no mapping",
    "[" * 5000: "the task file cannot be used: ",
    "description: " + "9" * 70_000: "bytes, and 65536 are the most",
    "num_fewshot: " + "9" * 20_000: "the task file cannot be used: ",
    "a: 1\n---\nb: 2": "the task file cannot be used: ",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
def test_a_file_that_could_run_code_is_refused_with_its_key(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(marker)!r}, 'w')\n")
    file = tmp_path / "task.yaml"
    rest = "" if text.startswith(("-", "[")) else "\ndoc_to_target: target\n"
    rest += "" if not rest or "doc_to_text" in text else "doc_to_text: question\n"
    file.write_text(text.replace("MARK", str(marker)) + rest)
    with pytest.raises(StageError) as refused:
        task_file.read_task_file(file, f"{FIELD}.file.uri")
    assert refused.value.reason == "TaskFailed"
    assert refused.value.message.startswith(f"{FIELD}.file.uri: the task file cannot be used: ")
    assert HOSTILE[text] in refused.value.message
    assert not marker.exists()


def test_all_keys_that_are_not_read_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("include: a\nprocess_results: b\nmetric_list: []\n")
    with pytest.raises(StageError) as refused:
        task_file.read_task_file(tmp_path, FIELD)
    for key in ("include", "process_results", "doc_to_text", "doc_to_target", "metric_list"):
        assert key in refused.value.message
    file.write_text("doc_to_text: a\ndoc_to_target: b\n")
    assert task_file.read_task_file(tmp_path, FIELD).doc_to_text == "a"
    (tmp_path / "other.yml").write_text("{}")
    with pytest.raises(StageError, match="the folder has 2 YAML files"):
        task_file.read_task_file(tmp_path, FIELD)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ self.__init__.__globals__['__builtins__'].open('MARK', 'w') }}",
    "{{ question.format.__globals__ }}",
    "{{ '{0.__class__}'.format(question) }}",
    "{% set _ = options.append('x') %}",
    "{{ (question | attr('__class__')).mro() }}",
    "{% include 'MARK' %}",
    "{{ 9 ** (9 ** 9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 'a' * 10 ** 6 }}",
    "{{ question | regex_replace('(a+)+$', '') }}",
    "{{ no_such_column }}",
    "{{ unclosed",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_runs_no_code_and_ends_within_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(local_task, "ROW_SECONDS", 0.5)
    marker = tmp_path / "ran"
    task = {**GENERATED, "doc_to_text": template.replace("MARK", str(marker))}
    rows = [{**ROWS[0], "question": "a" * 40 + "b"}]
    file, data = written(tmp_path, task, rows)
    with pytest.raises(StageError) as refused:
        local_task.local_task("lamps", file, data, FIELD)
    assert refused.value.reason in ("TaskFailed", "InvalidData")
    assert f"{FIELD}.data.uri: " in refused.value.message
    assert "rows.jsonl row 1" in refused.value.message
    assert not marker.exists()


def test_a_regular_expression_of_a_filter_ends_whatever_the_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's own filter would search in exponential time, and nothing could stop it."""
    step = {"function": "regex", "regex_pattern": "^(a+)+$", "fallback": "none"}
    filters = [{"name": "own", "filter": [step, {"function": "take_first"}]}]
    file, rows = written(tmp_path, {**GENERATED, "filter_list": filters})
    task = local_task.local_task("lamps", file, rows, FIELD)()
    (function,) = [
        each["function"] for each in task.config.filter_list[0]["filter"] if len(each) > 1
    ]
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    found = function(regex_pattern="^(a+)+$", fallback="none")
    assert found.apply([["a" * 60 + "b"], ["aaa"]], [{}, {}]) == [["none"], ["aaa"]]


def test_texts_of_rows_are_no_templates(tmp_path: Path) -> None:
    evil = "{{ cycler.__init__.__globals__.os.getcwd() }}"
    rows = [{**ROWS[0], "question": evil, "options": [evil, "b"]}]
    task = task_file.read_task_file(written(tmp_path, CHOICES)[0], FIELD)
    found = local_task.rendered(task, {"row 1": rows[0]}, FIELD)
    assert found["text"] == [f"Question: {evil}\nAnswer:"]
    assert found["choices"] == [[evil, "b"]]


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ({**GENERATED, "doc_to_choice": None, "doc_to_target": "options"}, {}, "exact_match alone"),
        ({"doc_to_text": "right"}, {}, "doc_to_text is a text, and it is 0"),
        ({"doc_to_text": "{{right}}"}, {}, "renders 0, which the harness takes for an option"),
        ({}, {"right": 2}, "the place or the text of an option, and it is 2"),
        ({"doc_to_target": "topic"}, {}, "the place or the text of an option, and it is 'color'"),
        ({}, {"options": ["one"]}, "doc_to_choice is at least two texts, and it is ['one']"),
        ({}, {"options": [1, 2]}, "doc_to_choice is at least two texts"),
        ({"doc_to_text": "extra"}, {}, "doc_to_text is a text, and it is None"),
    ],
)
def test_a_row_that_the_fields_do_not_fit_is_named(
    tmp_path: Path, task: dict[str, Any], row: dict[str, Any], said: str
) -> None:
    first = [{**ROWS[1], "extra": "x"}] if row or task.get("doc_to_text") == "extra" else []
    rows = [*first, {**ROWS[0], **row}]
    file, data = written(tmp_path, CHOICES | task, rows)
    with pytest.raises(StageError) as refused:
        local_task.local_task("lamps", file, data, FIELD)
    assert refused.value.reason == "InvalidData"
    assert f"1 of {len(rows)} rows are no items" in refused.value.message
    assert f"rows.jsonl row {len(rows)}: " in refused.value.message
    assert said in refused.value.message
