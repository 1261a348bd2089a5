"""One round of feedback: a tuned model's answers are rated, and the log tunes the next model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.jobs import manifest, planned, write_data
from tuneyard_trainer.local.run import localized
from tuneyard_trainer.running import torchrun

TRAINING = {"epochs": 1, "batchSize": 4, "learningRate": 0.01}


def answers(model: Path, prompts: list[str]) -> list[str]:
    """Return two sampled answers of a model to each prompt, in turn."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = policy.generate(
            **inputs, max_new_tokens=8, min_new_tokens=4, do_sample=True, num_return_sequences=2
        )
        start = inputs["input_ids"].shape[1]
        texts += [tokenizer.decode(row[start:], skip_special_tokens=True) for row in output]
    return texts


def rated(prompts: list[str], texts: list[str]) -> list[dict[str, Any]]:
    """Return a log in which the longer of two answers has a thumb up, and is edited at times."""
    log: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        pair = texts[index // 2 * 2 : index // 2 * 2 + 2]
        is_up = index == index // 2 * 2 + (len(pair[1]) > len(pair[0]))
        log += [
            {"event": "rating", "of": f"a{index}", "thumbs": "up" if is_up else "down"},
            {
                "event": "answer",
                "id": f"a{index}",
                "prompt": prompts[index // 2],
                "completion": text.strip() or f"Nothing {index}.",
            },
        ]
        if index % 5 == 0:
            log.append({"event": "edit", "of": f"a{index}", "completion": f"Lamp {index} is red."})
    return log


def test_a_log_of_rated_answers_tunes_the_next_model_and_the_card_names_both(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_data(tmp_path)
    first = planned(manifest(tiny_model_dir, output="first", training=TRAINING))
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "brighter"},
        "spec": {
            "model": {"uri": "job://lamps"},
            "preferences": {"data": [{"uri": "file://log.jsonl"}], "heldOut": 0.2},
            "optimize": {"dpo": {"loss": "kto", "training": TRAINING}},
            "adapter": {"lora": {"rank": 4, "alpha": 8}},
            "evaluate": {"maxNewTokens": 4, "samples": 1},
            "output": {"uri": "file://second"},
        },
    }
    first, second = localized([first, planned(value)])
    records: dict[str, dict[str, Any]] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["record"]:
            records[event["stage"]] = event["record"]

    def run(plan: Any, output: str) -> None:
        torchrun.run(
            plan,
            str(tmp_path / output),
            base_dir=tmp_path,
            cache_dir=tmp_path / "cache",
            emit=emit,
        )

    run(first, "first")
    prompts = [f"Which color has train lamp {i}?" for i in range(10)]
    log = rated(prompts, answers(tmp_path / "first" / "result" / "model", prompts))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    records.clear()
    run(second, "second")

    edits = sum(event["event"] == "edit" for event in log)
    found = records["pairs"]["metrics"]
    assert found["preferences"] + found["heldOutPreferences"] == 20 + edits
    card = (tmp_path / "second" / "result" / "README.md").read_text()
    assert "job://lamps, aligned with DPO" in card
    inputs = {**records["dpo"]["inputDigests"], **records["pairs"]["inputDigests"]}
    assert f"Base model, job://lamps | `{inputs['model']}`" in card
    assert f"Data, preferences.0, file://log.jsonl | `{inputs['preferences.0']}`" in card
    spec = yaml.safe_load((tmp_path / "second" / "result" / "job.yaml").read_text())["spec"]
    assert spec["model"]["uri"] == "job://lamps"
