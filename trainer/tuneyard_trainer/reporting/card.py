"""The model card: README.md with Hugging Face's front matter, the results and code to load them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from tuneyard.api.gates import VERDICT_WORDS
from tuneyard_trainer.reporting.formatting import ABSENT, clipped, count, harmless
from tuneyard_trainer.reporting.model_index import model_index
from tuneyard_trainer.reporting.results import Results
from tuneyard_trainer.reporting.summary import PEFT_KINDS, RunSummary

SHOWN_CHARACTERS = 1200
"""The characters of a prompt or completion that the card shows."""


def write_card(summary: RunSummary) -> str:
    """Return the text of README.md. Text from a model or a data row appears in code blocks only."""
    parts = [
        _front_matter(summary),
        f"# {summary.name}",
        f"{_text(summary.sentence)} Trained with Tuneyard.",
        *_results(summary),
        "![Training and held-out metrics by step](loss.png)",
        *_usage(summary),
        *_samples(summary.results),
        *_data(summary),
        "## Training",
        _table(("Setting", "Value"), summary.settings),
        *_provenance(summary),
        *_license(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- front matter -------------------------------------------------------------------------------


def _front_matter(summary: RunSummary) -> str:
    values: dict[str, Any] = {}
    if summary.base_license:
        values["license"] = summary.base_license
    if summary.hub_id:
        values["base_model"] = summary.hub_id
    values["library_name"] = _library(summary)
    values["pipeline_tag"] = "text-classification" if summary.is_reward_model else "text-generation"
    values["tags"] = ["tuneyard", summary.method, *([summary.adapter] if summary.adapter else [])]
    datasets = sorted({match[1] for match in _hub_datasets(summary)})
    if datasets:
        values["datasets"] = datasets
    if index := model_index(summary.name, values["pipeline_tag"], summary.results.measured):
        values["model-index"] = index
    return f"---\n{harmless(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))}---"


def _library(summary: RunSummary) -> str:
    if summary.has_adapter and not summary.has_model:
        return "peft" if summary.adapter in PEFT_KINDS else "tuneyard"
    return "transformers"


def _hub_datasets(summary: RunSummary) -> Iterable[re.Match[str]]:
    for row in summary.datasets:
        if match := re.match(r"hf://datasets/([^/]+/[^/]+)", row.uri):
            yield match


# ---- sections -----------------------------------------------------------------------------------


def _results(summary: RunSummary) -> list[str]:
    results = summary.results
    parts = ["## Results"]
    if results.comparisons:
        rows = [(row.label, row.base, row.tuned, row.change) for row in results.comparisons]
        parts.append(_table((results.heading, "Base", "Tuned", "Change"), rows))
    else:
        parts.append("No rows were held out, so the result was not measured.")
    if results.gates:
        parts.append(_table(("Gate", "Verdict", "Value", "Evidence", "Bound"), _gates(results)))
    parts += [f"**Warning:** {_text(warning)}" for warning in results.warnings]
    return [*parts, _table(("Training", ""), results.facts)]


def _gates(results: Results) -> list[tuple[str, ...]]:
    return [
        (
            gate.metric if gate.is_required else f"{gate.metric} (advisory)",
            VERDICT_WORDS[gate.verdict],
            gate.measured,
            gate.evidence,
            gate.bound,
        )
        for gate in results.gates
    ]


def _usage(summary: RunSummary) -> list[str]:
    parts = ["## How to use"]
    for title, code in usage(summary):
        parts += [title, f"```python\n{code}\n```"]
    return parts if len(parts) > 1 else []


def _samples(results: Results) -> list[str]:
    parts = [f"## {results.samples_heading}"] if results.samples else []
    for sample in results.samples:
        parts += ["**Prompt**", fenced(sample.prompt)]
        if sample.base is not None:
            parts += ["Base model:", fenced(sample.base)]
        parts += ["Tuned model:", fenced(sample.tuned)]
        if sample.reference:
            parts += ["Reference:", fenced(sample.reference)]
    return parts


def _data(summary: RunSummary) -> list[str]:
    if not summary.datasets:
        return []
    header = ("Data set", "Use", "Format", "Rows", "Kept", "Row outcomes")
    rows = [
        (_code(row.uri), row.split, row.format, count(row.rows), count(row.kept), row.outcomes)
        for row in summary.datasets
    ]
    made = [f"- {_text(kind.heading)}" for kind in summary.augmented]
    augmented = ["Augmented rows, made from the training rows:", "\n".join(made)] if made else []
    return ["## Data", _table(header, rows), *augmented, _table(("Total", ""), summary.data_facts)]


def _provenance(summary: RunSummary) -> list[str]:
    if not summary.digests:
        return []
    parts = ["## Provenance", _table(("Content", "Digest"), _coded(summary.digests))]
    if summary.checked:
        parts.append(_text(summary.checked))
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return [*parts, f"Versions: {_text(versions)}. The manifest is `job.yaml`."]


def _license(summary: RunSummary) -> list[str]:
    sentence = (
        f"The base model of these weights has the license {_code(summary.base_license)}."
        if summary.base_license
        else "The base model of these weights states no license. Find out its terms before you "
        "share these weights."
    )
    return ["## License", sentence]


# ---- code ---------------------------------------------------------------------------------------


def usage(summary: RunSummary) -> list[tuple[str, str]]:
    """Return a title and a Python program for each way to load the result."""
    ways = []
    if summary.is_reward_model:
        return [("The reward model, with transformers only:", _scoring())]
    if summary.has_model:
        ways.append(("The model, with transformers only:", _with_transformers(summary)))
    if summary.has_adapter and summary.adapter in PEFT_KINDS:
        ways.append(("The adapter on its base model, with PEFT:", _with_peft(summary)))
    elif summary.has_adapter:
        title = "The adapter on its base model, with Tuneyard, since PEFT has no such adapters:"
        ways.append((title, _with_tuneyard(summary)))
    return ways


_FOLDER = '"PATH/TO/THIS/FOLDER/{}"'
_TRANSFORMERS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
_LOAD = "AutoModelForCausalLM.from_pretrained"
_CHAT = """\
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TEXT = 'inputs = tokenizer("...", return_tensors="pt")'
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _with_transformers(summary: RunSummary) -> str:
    return _program(summary, "model", [_TRANSFORMERS], [f"model = {_LOAD}(folder)"])


def _scoring() -> str:
    return "\n".join(
        [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"folder = {_FOLDER.format('model')}",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForSequenceClassification.from_pretrained(folder)",
            "",
            'turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            "text = tokenizer.apply_chat_template(turns, tokenize=False).strip()",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
            "print(float(model(**inputs).logits))  # higher is better",
        ]
    )


def _with_peft(summary: RunSummary) -> str:
    imports, base = _base(summary)
    return _program(
        summary,
        "adapter",
        [*imports, "from peft import PeftModel", _TRANSFORMERS],
        [*base, "model = PeftModel.from_pretrained(base, folder)"],
    )


def _with_tuneyard(summary: RunSummary) -> str:
    imports, base = _base(summary)
    return _program(
        summary,
        "adapter",
        [*imports, "import pathlib", _TRANSFORMERS, "from tuneyard_trainer.models import adapters"],
        [*base, "model = adapters.load(base, pathlib.Path(folder))"],
    )


def _program(summary: RunSummary, folder: str, imports: list[str], load: list[str]) -> str:
    tokenize = _CHAT if summary.has_chat_template and summary.method != "pretrain" else _TEXT
    lines = [
        *imports,
        "",
        f"folder = {_FOLDER.format(folder)}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *load,
        "",
        tokenize,
        _GENERATE,
    ]
    return "\n".join(lines)


def _base(summary: RunSummary) -> tuple[list[str], list[str]]:
    """Return imports and lines that load the base model: by its name on the Hub, from its package,
    or from a path for the reader to fill in."""
    scheme, _, rest = summary.base.partition("://")
    gguf = f", gguf_file={_quoted(rest.split('/')[-1])}" if rest.endswith(".gguf") else ""
    if summary.hub_id:
        revision = summary.spec["model"].get("revision")
        pinned = f", revision={_quoted(revision)}" if revision else ""
        return [], [f"base = {_LOAD}({_quoted(summary.hub_id)}{gguf}{pinned})"]
    if scheme == "pkg":
        package, _, path = rest.partition("/")
        folder = path.rpartition("/")[0] if gguf else path
        suffix = f' + "/" + {_quoted(folder)}' if folder else ""
        return ["import importlib.util"], [
            f"package = importlib.util.find_spec({_quoted(package)})",
            f"path = package.submodule_search_locations[0]{suffix}",
            f"base = {_LOAD}(path{gguf})",
        ]
    return [], [f'base = {_LOAD}("PATH/TO/THE/BASE/MODEL"{gguf})  # {_one_line(summary.base)}']


def _quoted(text: str) -> str:
    """Return a Python string literal in double quotes, which a JSON string also is."""
    return json.dumps(text)


# ---- Markdown -----------------------------------------------------------------------------------


def fenced(text: str) -> str:
    """Return text of unknown origin as a code block with a fence that the text cannot close."""
    text = clipped(text, SHOWN_CHARACTERS)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _coded(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, _code(value)) for label, value in rows]


def _cell(value: str) -> str:
    """Return the text of a table cell: code from `_code` as it is, other text escaped."""
    if value.startswith("`"):
        return value.replace("|", "\\|")
    return _text(value or ABSENT)


def _code(value: str) -> str:
    return f"`{_one_line(value).replace('`', '')}`"


def _text(value: str) -> str:
    """Return text in which all Markdown and HTML is escaped."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", _one_line(value))


def _one_line(value: str) -> str:
    return " ".join(harmless(value).split())
