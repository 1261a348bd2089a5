"""The model card: README.md with Hugging Face's front matter, and how to load the result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from tuneyard_trainer.reporting.formatting import ABSENT, count, harmless
from tuneyard_trainer.reporting.results import Figures
from tuneyard_trainer.reporting.summary import PEFT_KINDS, RunSummary

SHOWN_CHARACTERS = 1200
"""An answer's start is shown so far."""


def write_card(account: RunSummary) -> str:
    """The whole README.md. Text that came from a model or a row stands in code blocks alone."""
    parts = [
        _front_matter(account),
        f"# {account.name}",
        f"{_text(account.sentence)} Made with Tuneyard.",
        *_results(account),
        "![Training and held-out figures over the steps](loss.png)",
        *_usage(account),
        *_samples(account.figures),
        *_data(account),
        "## Training",
        _table(("Setting", "Value"), account.settings),
        *_provenance(account),
        *_licence(account),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- front matter -------------------------------------------------------------------------------


def _front_matter(account: RunSummary) -> str:
    values: dict[str, Any] = {}
    if account.licence:
        values["license"] = account.licence
    if account.hub_id:
        values["base_model"] = account.hub_id
    values["library_name"] = _library(account)
    values["pipeline_tag"] = "text-classification" if account.is_reward_model else "text-generation"
    values["tags"] = ["tuneyard", account.method, *([account.adapter] if account.adapter else [])]
    datasets = sorted({found[1] for found in _hub_datasets(account)})
    if datasets:
        values["datasets"] = datasets
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _library(account: RunSummary) -> str:
    if account.has_adapter and not account.has_model:
        return "peft" if account.adapter in PEFT_KINDS else "tuneyard"
    return "transformers"


def _hub_datasets(account: RunSummary) -> Iterable[re.Match[str]]:
    for row in account.datasets:
        if found := re.match(r"hf://datasets/([^/]+/[^/]+)", row.uri):
            yield found


# ---- sections -----------------------------------------------------------------------------------


def _results(account: RunSummary) -> list[str]:
    figures = account.figures
    parts = ["## Results"]
    if figures.comparisons:
        lines = [(line.label, line.base, line.tuned, line.change) for line in figures.comparisons]
        parts.append(_table((figures.heading, "Base", "Tuned", "Change"), lines))
    else:
        parts.append("No rows were held out, so the result was not measured.")
    parts += [f"**Warning:** {_text(warning)}" for warning in figures.warnings]
    return [*parts, _table(("Training", ""), figures.facts)]


def _usage(account: RunSummary) -> list[str]:
    parts = ["## How to use"]
    for title, code in usage(account):
        parts += [title, f"```python\n{code}\n```"]
    return parts if len(parts) > 1 else []


def _samples(figures: Figures) -> list[str]:
    parts = [f"## {figures.samples_heading}"] if figures.samples else []
    for sample in figures.samples:
        parts += ["**Prompt**", fenced(sample.prompt)]
        if sample.base is not None:
            parts += ["Base model:", fenced(sample.base)]
        parts += ["Tuned model:", fenced(sample.tuned), "Reference:", fenced(sample.reference)]
    return parts


def _data(account: RunSummary) -> list[str]:
    if not account.datasets:
        return []
    header = ("Data set", "Use", "Format", "Rows", "Kept", "The others")
    lines = [
        (_code(row.uri), row.split, row.format, count(row.rows), count(row.kept), row.fates)
        for row in account.datasets
    ]
    return ["## Data", _table(header, lines), _table(("Total", ""), account.data_facts)]


def _provenance(account: RunSummary) -> list[str]:
    if not account.digests:
        return []
    parts = ["## Provenance", _table(("Content", "Digest"), _coded(account.digests))]
    if account.reloaded:
        compared = "; ".join(f"{name}: {value}" for name, value in account.reloaded)
        parts.append(
            f"Loaded again after writing; largest difference of a logit: {_text(compared)}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in account.versions.items())
    return [*parts, f"Versions: {_text(versions)}. The manifest is `job.yaml`."]


def _licence(account: RunSummary) -> list[str]:
    sentence = (
        f"These weights derive from a base model under the licence {_code(account.licence)}."
        if account.licence
        else "These weights derive from a base model that names no licence: find out its terms "
        "before you pass them on."
    )
    return ["## Licence", sentence]


# ---- code ---------------------------------------------------------------------------------------


def usage(account: RunSummary) -> list[tuple[str, str]]:
    """A sentence and a Python program for each of the ways to load the result."""
    ways = []
    if account.is_reward_model:
        return [("The reward model, with transformers alone:", _scoring())]
    if account.has_model:
        ways.append(("The whole model, with transformers alone:", _whole(account)))
    if account.has_adapter and account.adapter in PEFT_KINDS:
        ways.append(("The adapter on its base, with PEFT:", _with_peft(account)))
    elif account.has_adapter:
        title = "The adapter on its base; PEFT has no such adapters, Tuneyard loads it:"
        ways.append((title, _with_tuneyard(account)))
    return ways


_PLACE = '"PATH/TO/THIS/FOLDER/{}"'
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


def _whole(account: RunSummary) -> str:
    return _program(account, "model", [_TRANSFORMERS], [f"model = {_LOAD}(folder)"])


def _scoring() -> str:
    return "\n".join(
        [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"folder = {_PLACE.format('model')}",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForSequenceClassification.from_pretrained(folder)",
            "",
            'turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            "text = tokenizer.apply_chat_template(turns, tokenize=False).strip()",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
            "print(float(model(**inputs).logits))  # higher is better",
        ]
    )


def _with_peft(account: RunSummary) -> str:
    imports, base = _base(account)
    return _program(
        account,
        "adapter",
        [*imports, "from peft import PeftModel", _TRANSFORMERS],
        [*base, "model = PeftModel.from_pretrained(base, folder)"],
    )


def _with_tuneyard(account: RunSummary) -> str:
    imports, base = _base(account)
    return _program(
        account,
        "adapter",
        [*imports, "import pathlib", _TRANSFORMERS, "from tuneyard_trainer.models import adapters"],
        [*base, "model = adapters.load(base, pathlib.Path(folder))"],
    )


def _program(account: RunSummary, folder: str, imports: list[str], load: list[str]) -> str:
    asks = _CHAT if account.has_chat_template and account.method != "pretrain" else _TEXT
    lines = [
        *imports,
        "",
        f"folder = {_PLACE.format(folder)}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *load,
        "",
        asks,
        _GENERATE,
    ]
    return "\n".join(lines)


def _base(account: RunSummary) -> tuple[list[str], list[str]]:
    """Imports and lines that load the base model: by its hub name, from its package, or from
    wherever it lies."""
    scheme, _, rest = account.base.partition("://")
    gguf = f", gguf_file={_quoted(rest.split('/')[-1])}" if rest.endswith(".gguf") else ""
    if account.hub_id:
        revision = account.spec["model"].get("revision")
        at = f", revision={_quoted(revision)}" if revision else ""
        return [], [f"base = {_LOAD}({_quoted(account.hub_id)}{gguf}{at})"]
    if scheme == "pkg":
        package, _, inside = rest.partition("/")
        folder = inside.rpartition("/")[0] if gguf else inside
        below = f' + "/" + {_quoted(folder)}' if folder else ""
        return ["import importlib.util"], [
            f"package = importlib.util.find_spec({_quoted(package)})",
            f"place = package.submodule_search_locations[0]{below}",
            f"base = {_LOAD}(place{gguf})",
        ]
    return [], [f'base = {_LOAD}("PATH/TO/THE/BASE/MODEL"{gguf})  # {_one_line(account.base)}']


def _quoted(text: str) -> str:
    """As a Python string in double quotes: JSON's are."""
    return json.dumps(text)


# ---- Markdown -----------------------------------------------------------------------------------


def fenced(text: str) -> str:
    """Text of unknown origin as a code block that it cannot break out of."""
    text = harmless(text.strip())
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}…"
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
    """A cell's text; what is code already stays so."""
    if value.startswith("`"):
        return value.replace("|", "\\|")
    return _text(value or ABSENT)


def _code(value: str) -> str:
    return f"`{_one_line(value).replace('`', '')}`"


def _text(value: str) -> str:
    """Plain text: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", _one_line(value))


def _one_line(value: str) -> str:
    return " ".join(harmless(value).split())
