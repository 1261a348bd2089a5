"""The report: the plot of the curves, the HTML page and the model card."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image, ImageColor
from transformers import AutoModelForCausalLM

from tests.trainer.finished import HOSTILE, LINES, MANIFEST, folders, record
from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import StageRecord
from tuneyard.api.report import JobReport
from tuneyard_trainer.data.encoding.masks import Run
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.ledger import Ledger, ledger_details
from tuneyard_trainer.data.prepared import RowWriter
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.models import adapters
from tuneyard_trainer.reporting import plots, report
from tuneyard_trainer.reporting.card import fenced, write_card
from tuneyard_trainer.reporting.document import document
from tuneyard_trainer.reporting.model_index import model_index
from tuneyard_trainer.reporting.page import Pictures, render
from tuneyard_trainer.reporting.results import Results
from tuneyard_trainer.reporting.summary import RunSummary, shareable


def run_summary(
    root: Path,
    *,
    exported: tuple[str, ...] = ("adapter",),
    base_license: str | None = "apache-2.0",
    **spec: Any,
) -> RunSummary:
    """Return the facts about a finished job. `spec` replaces fields of the manifest's `spec`."""
    inputs = folders(root / "stages")
    for name in exported:
        (root / "result" / name).mkdir(parents=True)
    manifest = {**MANIFEST, "spec": {**MANIFEST["spec"], **spec}}
    return RunSummary.of(root / "result", inputs, manifest, {}, base_license)


def card(root: Path, **changes: Any) -> str:
    return write_card(run_summary(root, **changes))


def reported(root: Path, *exported: str) -> Path:
    """Write a whole report and return its folder."""
    inputs = folders(root / "stages")
    for name in exported:
        (root / "result" / name).mkdir(parents=True)
    measured = {"adapterTensors": 28.0, "modelTensors": 21.0, "mergedWeightDifference": 3.21e-8}
    report.write(
        root / "result", inputs, manifest=MANIFEST, measured=measured, base_license="apache-2.0"
    )
    return root / "result"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report on a job that trained an adapter."""
    return reported(tmp_path_factory.mktemp("job"), "adapter")


def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def front_matter(text: str) -> dict[str, Any]:
    opening, matter, _ = text.split("---\n", 2)
    assert opening == ""
    value: dict[str, Any] = yaml.safe_load(matter)
    return value


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Page(HTMLParser):
    """The tags of a page, the URLs that they load or link to, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action"):
                self.loaded.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_loads_no_external_resource_and_runs_its_own_script_alone(folder: Path) -> None:
    found = Page(page(folder))
    assert found.tags.count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", page(folder), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page(folder)
    assert len(found.loaded) == 2
    assert all(value.startswith("data:image/png;base64,") for value in found.loaded)
    assert not {"link", "iframe", "object", "embed", "form"} & set(found.tags)
    assert not [link for link in found.links if ":" in link]
    assert "url(" not in page(folder)
    assert "@import" not in page(folder)
    assert "default-src 'none'" in page(folder)


def test_the_page_shows_completions_as_plain_text(folder: Path) -> None:
    text = Page(page(folder)).text
    assert "<script>alert(1)</script>" in text
    assert "[bold red]loud[/bold red]" in text
    assert "\x1b" not in text
    assert "train.jsonl row 7: no <answer>" in text


def test_the_page_shows_result_data_settings_stages_and_usage(folder: Path) -> None:
    text = Page(page(folder)).text
    for part in (
        "88 %",
        "2.718",
        "file://data/train.jsonl",
        "2 skipped",
        "LoRA; rank 8, alpha 16, targets all-linear",
        "2026-01-01T00:01:15Z",
        "1 min 15 s",
        "sha256:base",
        "sha256:rows",
        "PeftModel.from_pretrained",
        "adapter/",
    ):
        assert part in text


GATES = [
    {"metric": "answerAccuracy", "notWorseThanBaseBy": 0.05, "verdict": "pass", "value": 0.875,
     "base": 0.0625, "worseBy": -0.8125, "low": -0.99, "high": -0.6, "items": 16},
    {"metric": "lossReduction", "atLeast": 0.9, "tier": "advisory",
     "verdict": "insufficientEvidence", "value": 0.5, "minItems": 50, "items": 16},
]  # fmt: skip
FLIPS = {
    "gained": 25,
    "lost": 1,
    "pValue": 0.00125,
    "gainedItems": ["row 3"],
    "lostItems": ["row 9"],
}


def test_verdicts_flipped_answers_and_unclear_differences_are_on_the_page_and_the_card(
    tmp_path: Path,
) -> None:
    inputs = folders(tmp_path / "stages")
    (tmp_path / "result/adapter").mkdir(parents=True)
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    evidence = {"answerAccuracy": {"differenceInterval": [-0.1, 0.9], "flips": FLIPS}}
    value["details"] |= {"gates": GATES, "evidence": evidence}
    path.write_text(json.dumps(value))
    report.write(
        tmp_path / "result", inputs, manifest=MANIFEST, measured={}, base_license="apache-2.0"
    )
    shown = "".join(Page(page(tmp_path / "result")).text.split())  # cells have no space between
    for text in (
        "+81 points, no clear difference \N{MINUS SIGN}10 to +90 points",
        "answerAccuracy pass 0.875, base 0.0625 worse by -0.99 to -0.6 16",
        "lossReduction advisory insufficient evidence 0.5",
        "The advisory gate is not met: lossReduction is 0.5, on fewer than 50 items",
        "Right only after the training 25: row 3, …",
        "p = 0.001",
    ):
        assert "".join(text.split()) in shown
    card = (tmp_path / "result/README.md").read_text()
    assert "| answerAccuracy | pass | 0.875, base 0.0625 | 95% interval worse by" in card
    assert "| lossReduction (advisory) | insufficient evidence | 0.5 | 16 items |" in card


def test_the_page_names_the_model_folder_only_if_it_exists(folder: Path, tmp_path: Path) -> None:
    assert "model/" not in Page(page(folder)).links
    merged = reported(tmp_path, "adapter", "model")
    assert {"adapter/", "model/"} <= set(Page(page(merged)).links)


def test_the_report_says_if_no_rows_were_held_out(tmp_path: Path) -> None:
    lines = [line for line in LINES if "loss" in line]
    inputs = folders(tmp_path / "stages", lines=lines)
    del inputs["evaluation"]
    path = inputs["tuned"] / "record.json"
    value = json.loads(path.read_text())
    value["metrics"] = {"steps": 40.0, "finalLoss": 0.5}
    path.write_text(json.dumps(value))
    result = tmp_path / "result"
    result.mkdir()
    report.write(result, inputs, manifest=MANIFEST, measured={}, base_license=None)
    for text in (page(result), (result / "README.md").read_text("utf-8")):
        assert "No rows were held out" in text
        assert "Perplexity" not in text
        assert "Completions of held-out prompts" not in text


def test_the_report_has_the_table_of_classes_if_they_are_few(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    for names in (["<b>refund", "shipping"], [f"class {number}" for number in range(21)]):
        counts = [[0] * (len(names) + 1) for _ in names]
        counts[1] = [7, 12, *[0] * (len(names) - 2), 345]
        table = {"classes": [*names, "(other)"], "counts": counts}
        value["details"]["classification"] = {"tuned": table}
        path.write_text(json.dumps(value))
        result = tmp_path / names[1]
        result.mkdir()
        report.write(result, inputs, manifest=MANIFEST, measured={}, base_license=None)
        shown = page(result)
        if len(names) > 20:
            assert "Classes of the held-out rows" not in shown
            continue
        cells = re.findall(
            r"<td[^>]*>(\d+)</td>", shown.partition("Classes of the held-out rows")[2]
        )
        assert cells[:6] == ["0", "0", "0", "7", "12", "345"]
        assert "named (other)" in shown
        assert "&lt;b&gt;refund" in shown


def test_suites_are_compared_by_the_direction_of_each_metric(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    value["metrics"] |= {
        "sense/accuracy": 0.75,
        "sense/baseAccuracy": 0.5,
        "sense/accuracyChange": 0.25,
        "manners/overRefusal": 0.5,
        "manners/baseOverRefusal": 0.25,
        "other/unknown": 3.0,
        "other/baseUnknown": 2.0,
    }
    value["details"]["evidence"] = {
        "sense/accuracy": {"higherIsBetter": True, "differenceInterval": [0.1, 0.4]},
        "manners/overRefusal": {"higherIsBetter": False, "differenceInterval": [0.1, 0.4]},
    }
    record = StageRecord.model_validate(value)
    found = {each.label: each for each in Results.of({"evaluate": record}).comparisons}
    shown = {label: each.verdict for label, each in found.items() if ":" in label}
    assert shown == {
        "sense: accuracy": "better",
        "manners: overRefusal": "worse",
        "other: unknown": "",
    }
    assert (found["sense: accuracy"].base, found["sense: accuracy"].tuned) == ("0.500", "0.750")
    assert Results.of({"evaluate": record}).heading == "On held-out rows and suites"
    del value["metrics"]
    alone = StageRecord.model_validate({**value, "metrics": {"sense/accuracy": 0.75}})
    assert Results.of({"evaluate": alone}).heading == "On suites"


def test_a_report_can_be_written_without_records(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    for path in inputs.values():
        (path / "record.json").unlink()
    result = tmp_path / "result"
    result.mkdir()
    report.write(result, inputs, manifest={}, measured={}, base_license=None)
    assert page(result).count("<h2>Settings</h2>") == 1


def test_the_same_job_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = reported(tmp_path, "adapter")
    for name in ("loss.png", "report.html", "report.json", "README.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_passwords_and_signatures_in_uris_are_removed(tmp_path: Path) -> None:
    secret = "https://user:hunter2@host.example/rows.jsonl?X-Signature=hunter3#part"
    data = {"train": [{"uri": secret, "format": "auto"}]}
    found = run_summary(tmp_path, data=data)
    assert found.spec["data"]["train"][0]["uri"] == "https://host.example/rows.jsonl"
    assert "hunter" not in write_card(found)
    assert shareable({"uri": "file://a b/c#1?.txt"}) == {"uri": "file://a b/c#1?.txt"}
    judge = {"endpoint": {"url": "https://me:hunter4@judge.example/v1?key=hunter5", "model": "j"}}
    found = run_summary(tmp_path / "judged", evaluate={"winRate": {"judge": judge}})
    shown = found.spec["evaluate"]["winRate"]["judge"]["endpoint"]
    assert shown == {"url": "https://judge.example/v1", "model": "j"}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:se@cret@bucket/a/b", "s3://bucket/a/b"),
        ("s3://user:x@[bucket/a?b", "s3://[bucket/a"),
        ("folder/a@b", "folder/a@b"),
        ("pkg://package/a.gguf", "pkg://package/a.gguf"),
    ],
)
def test_secrets_are_removed_from_any_uri(uri: str, shown: str) -> None:
    assert shareable([{"uri": uri}]) == [{"uri": shown}]


# ---- the card -----------------------------------------------------------------------------------


def test_the_front_matter_has_the_measurements_of_this_model_as_the_hub_reads_them(
    folder: Path, tmp_path: Path
) -> None:
    metrics = {
        "validationLoss": 0.5,
        "baseValidationLoss": 2.0,
        "lossReduction": 0.75,
        "answerAccuracy": math.nan,
        "sense/accuracy": 0.75,
        "sense/baseAccuracy": 0.5,
        "sense/accuracyChange": 0.25,
        "arc/acc_norm": 0.25,
    }
    (index,) = model_index("job", "text-generation", metrics)
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'model-index': [index]})}---\n")
    found = {
        (each.dataset_name, each.metric_name, each.metric_type): each.metric_value
        for each in ModelCard.load(tmp_path / "README.md").data.eval_results or ()
    }
    assert found == {
        ("held-out rows", "validationLoss", "loss"): 0.5,
        ("sense", "accuracy", "accuracy"): 0.75,
        ("arc", "acc_norm", "acc_norm"): 0.25,
    }
    shown = front_matter((folder / "README.md").read_text("utf-8"))["model-index"]
    assert shown[0]["results"][0]["metrics"][0]["type"] == "loss"
    assert model_index("job", "text-generation", {"baseValidationLoss": 2.0}) == []


def test_the_front_matter_states_license_base_library_task_and_tags(folder: Path) -> None:
    found = front_matter((folder / "README.md").read_text("utf-8"))
    del found["model-index"]
    assert found == {
        "license": "apache-2.0",
        "base_model": "acme/small-model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tuneyard", "sft", "lora"],
    }


def test_the_front_matter_leaves_unknown_values_out(tmp_path: Path) -> None:
    model = {"uri": "file://models/mine"}
    text = card(tmp_path, base_license=None, model=model, adapter=None, exported=("model",))
    found = front_matter(text)
    del found["model-index"]
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tuneyard", "sft"],
    }
    assert "states no license" in text


def test_the_front_matter_names_data_sets_from_the_hub(tmp_path: Path) -> None:
    data = {"train": [{"uri": "hf://datasets/acme/chats/train.parquet", "format": "auto"}]}
    assert front_matter(card(tmp_path, data=data))["datasets"] == ["acme/chats"]


def test_completions_cannot_close_their_code_blocks(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert fenced(HOSTILE).startswith("````text\n")
    assert fenced(HOSTILE) in text
    assert "\x1b" not in text
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "# heading" not in outside


def test_a_bar_in_a_uri_does_not_split_its_table_cell(tmp_path: Path) -> None:
    data = {"train": [{"uri": "file://a|b`<i>.jsonl", "format": "auto"}]}
    assert "| `file://a\\|b<i>.jsonl` | training |" in card(tmp_path, data=data)


@pytest.mark.parametrize(
    ("model", "loads"),
    [
        ({"uri": "hf://acme/small"}, 'from_pretrained("acme/small")'),
        (
            {"uri": "hf://acme/small", "revision": "v1"},
            'from_pretrained("acme/small", revision="v1")',
        ),
        ({"uri": "hf://acme/q/m.gguf"}, 'from_pretrained("acme/q", gguf_file="m.gguf")'),
        ({"uri": "pkg://llm_small/m.gguf"}, 'from_pretrained(path, gguf_file="m.gguf")'),
        ({"uri": "file://../base"}, "# file://../base"),
    ],
)
def test_the_card_loads_the_base_model_from_its_source(
    tmp_path: Path, model: dict[str, str], loads: str
) -> None:
    [program] = programs(card(tmp_path, model=model))
    ast.parse(program)
    assert loads in program
    assert "PeftModel.from_pretrained(base, folder)" in program


def test_an_adapter_that_peft_lacks_is_loaded_by_tuneyard(tmp_path: Path) -> None:
    text = card(tmp_path, adapter={"bottleneck": {"size": 64}})
    [program] = programs(text)
    ast.parse(program)
    assert "adapters.load(base, pathlib.Path(folder))" in program
    assert "peft" not in program
    assert front_matter(text)["library_name"] == "tuneyard"


def test_the_card_of_a_merged_model_loads_the_model_and_the_adapter(tmp_path: Path) -> None:
    merged, adapter = programs(card(tmp_path, exported=("adapter", "model")))
    assert "PeftModel" not in merged
    assert "PeftModel" in adapter
    assert "apply_chat_template" in merged


def test_the_card_of_a_model_pretrained_on_text_uses_no_chat_template(tmp_path: Path) -> None:
    [program] = programs(card(tmp_path, method="pretrain"))
    assert "apply_chat_template" not in program


@pytest.mark.parametrize(
    "adapter", [{"lora": {"rank": 2}}, {"prompt": {"length": 2}}, {"bottleneck": {"size": 4}}]
)
def test_the_programs_of_the_card_run(
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    adapter: dict[str, Any],
) -> None:
    text = card(
        tmp_path, model={"uri": "file://base"}, adapter=adapter, exported=("adapter", "model")
    )
    result = tmp_path / "result"
    shutil.copytree(tiny_model_dir, result / "model", dirs_exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    kind = Adapter.model_validate(adapter)
    adapters.save(adapters.attach(base, kind, seed=0, tokenizer=tiny_tokenizer), result / "adapter")
    tiny_tokenizer.save_pretrained(result / "adapter")
    outputs = []
    for program in programs(text):
        located = program.replace("PATH/TO/THIS/FOLDER", str(result))
        exec(located.replace("PATH/TO/THE/BASE/MODEL", str(tiny_model_dir)), {})
        outputs.append(capsys.readouterr().out)
    assert len(outputs) == 2
    assert all(outputs)


# ---- the curve ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(LINES, id="a run"),
        pytest.param([], id="nothing"),
        pytest.param([{"step": 1, "loss": 2.0, "learningRate": 1e-4}], id="one step"),
        pytest.param(
            [
                {"step": 0, "baseValidationLoss": math.nan},
                {"step": 1, "loss": math.nan, "learningRate": 0.0},
                {"step": 2, "loss": math.inf, "learningRate": 0.0},
                {"step": 2, "validationLoss": math.nan},
            ],
            id="not a number",
        ),
        pytest.param([{"step": s, "loss": 1.0} for s in range(1, 30)], id="flat, no rate"),
    ],
)
def test_any_history_is_plotted_without_a_warning(
    tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "loss.png").write_bytes(plots.draw(plots.Curves.read(path), "A $name_x"))
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1600, 1000)


def test_a_long_title_is_inside_the_plot() -> None:
    """A name of 40 characters, and the longest of the first rows of a comparison."""
    name = "support-assistant-in-english-and-danish"
    title = f"{name}: reward model accuracy 50 % by chance → 100 %"
    curves = plots.Curves((plots.Panel("Loss", "loss", [(1, 1.0)], []),), [(1, 1.0)])
    with Image.open(io.BytesIO(plots.draw(curves, title))) as image:
        edge = image.convert("L").crop((image.width - 20, 0, image.width, 120))
    assert edge.getextrema() == (255, 255)


def test_curves_ignore_a_missing_file_and_an_incomplete_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    empty = plots.Panel("Loss (nats per token)", "loss", [], [], metric="loss")
    assert plots.Curves.read(path) == plots.Curves((empty,), [])
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert plots.Curves.read(path).panels[0].training == [(1, 2.0)]


def test_reinforcement_learning_has_curves_of_reward_and_kl_divergence(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "heldOutReward": 0.25, "heldOutKl": 0.0},
        {"step": 1, "reward": 0.5, "kl": 0.1, "learningRate": 1e-4},
        {"step": 1, "heldOutReward": 0.75, "heldOutKl": 0.2},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = plots.Curves.read(path, "grpo")
    assert [panel.label for panel in curves.panels] == ["Reward", "KL (nats)"]
    assert [panel.training for panel in curves.panels] == [[(1, 0.5)], [(1, 0.1)]]
    assert [panel.held_out for panel in curves.panels] == [
        [(0, 0.25), (1, 0.75)],
        [(0, 0.0), (1, 0.2)],
    ]
    with Image.open(io.BytesIO(plots.draw(curves, "aligned"))) as image:
        assert image.size == (1600, 1000)


def test_the_independent_reward_is_in_the_panel_of_the_reward_and_length_in_one_of_its_own(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "heldOutReward": 0.25, "heldOutIndependentReward": 9.0},
        {"step": 1, "reward": 0.5, "rewardLengthCorrelation": 0.3, "learningRate": 1e-4},
        {"step": 1, "heldOutReward": 0.75, "heldOutIndependentReward": 4.0},
        {"step": 1, "heldOutRewardLengthCorrelation": 0.6},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = plots.Curves.read(path, "ppo")
    reward, _, correlation = curves.panels
    assert reward.held_out == [(0, 0.25), (1, 0.75)]
    assert reward.independent == [(0, 9.0), (1, 4.0)]
    assert (correlation.training, correlation.held_out) == ([(1, 0.3)], [(1, 0.6)])
    themes: tuple[plots.Theme, ...] = ("light", "dark")
    for theme in themes:
        drawn = plots.draw(curves, "aligned", theme)
        assert drawn == plots.draw(curves, "aligned", theme)
        with Image.open(io.BytesIO(drawn)) as image:
            assert image.size == (1600, 1000)
            color = ImageColor.getrgb(plots.COLORS[theme]["independent"])
            assert color in {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or ()}


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("pretrain", "Loss (nats per token)"),
        ("distill", "Loss (nats per token)"),
        ("dpo", "Loss"),
        ("reward", "Loss"),
    ],
)
def test_a_loss_per_token_has_a_unit(kind: str, label: str, tmp_path: Path) -> None:
    (panel,) = plots.Curves.read(tmp_path / "none", kind).panels
    assert panel.label == label


def test_smoothing_starts_at_the_first_value_and_skips_nan() -> None:
    values = [(step, 3.0) for step in range(1, 50)]
    smooth = plots.smoothed([*values, (50, math.nan), (51, 3.0)])
    assert [value for step, value in smooth if step != 50] == pytest.approx([3.0] * 50)
    assert math.isnan(dict(smooth)[50])


def test_a_long_run_is_thinned_and_keeps_its_last_step() -> None:
    points = [(step, 1.0) for step in range(1, 100_001)]
    thin = plots.thinned(points)
    assert len(thin) <= plots.MAX_POINTS + 1
    assert (thin[0], thin[-1]) == (points[0], points[-1])


@pytest.mark.parametrize("file", ["README.md", "report.html"])
def test_the_checks_of_the_written_files_are_named_with_what_they_measured(
    folder: Path, file: str
) -> None:
    text = (folder / file).read_text("utf-8")
    assert "bit for bit right: 28 tensors of the adapter, 21 tensors of the model. " in text
    assert "differs from float64 arithmetic by at most 3.2e-08 of its terms." in text


def test_the_report_marks_what_is_trained_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A row cannot add elements to the page."""
    inputs = folders(tmp_path / "stages")
    turns = (Message("user", "Which <b>?"), Message("assistant", "The <i> one."))
    (row,) = Encoder(tiny_tokenizer, "assistant").encode([Example(1, "chat", turns)])
    assert isinstance(row, Encoded)
    with RowWriter(inputs["data"], "train") as writer:
        writer.append(row.ids, row.mask, 0)
    tiny_tokenizer.save_pretrained(inputs["data"] / "tokenizer")
    (tmp_path / "result").mkdir()
    report.write(
        tmp_path / "result", inputs, manifest=MANIFEST, measured={}, base_license="apache-2.0"
    )
    page = (tmp_path / "result" / "report.html").read_text()
    assert "<mark>The &lt;i&gt; one.&lt;|im_end|&gt;</mark>" in page
    assert "Which &lt;b&gt;?&lt;|im_end|&gt;" in page


# ---- the ledger ---------------------------------------------------------------------------------


def test_the_page_shows_the_ledger_with_rules_and_leaks(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    ledger = Ledger("train.0", "spec.data.train[0]", read=9)
    ledger.lose("invalid", "InvalidData")
    ledger.lose("filtered", "personalData.email", tokens=11)
    for _ in range(7):
        ledger.keep(10, cut=1)
    ledger.settle("duplicate", "near", rows=2, tokens=18)
    ledger.settle("trained", rows=4, tokens=36, targets=16)
    ledger.settle("heldOut", rows=1, tokens=9, targets=4)
    ledger.check()
    path = inputs["data"] / "record.json"
    value = json.loads(path.read_text())
    text = {"where": "train.jsonl row 3", "text": "write to [EMAIL]"}
    found = {"action": "removed", "rows": 1, "examples": [text]}
    leak = {"heldOut": "row 4", "training": "row 8", "span": "one two", "spanWords": 2}
    value["details"] |= {
        "ledger": ledger_details([ledger]),
        "cleaning": {"personalData.email": found},
        "leaks": {"rows": 1, "checked": 1, "examples": [leak | {"rowWords": 5}]},
    }
    path.write_text(json.dumps(value))
    trained = inputs["tuned"] / "record.json"
    value = json.loads(trained.read_text())
    packing = {"sequences": 4, "rows": 2, "tokens": 36, "positions": 40}
    value["details"] |= {"packed": True, "packing": packing}
    trained.write_text(json.dumps(value))
    summary = RunSummary.of(tmp_path / "result", inputs, MANIFEST, {}, None)
    assert summary.ledger == [
        ("In", "9", "81"),
        ("Invalid: InvalidData", "1", "0"),
        ("Filtered: personalData.email", "1", "11"),
        ("Duplicate: near", "2", "18"),
        ("Dropped as too long", "0", "0"),
        ("Cut off", "", "7"),
        ("Held out", "1", "9"),
        ("Trained on", "4", "36"),
        ("of these, context", "", "20"),
        ("Packed: 4 sequences of the first epoch, 10% padding", "2", "40"),
    ]
    (tmp_path / "result").mkdir()
    report.write(tmp_path / "result", inputs, manifest=MANIFEST, measured={}, base_license=None)
    shown = " ".join(Page(page(tmp_path / "result")).text.split())
    html = page(tmp_path / "result")
    assert "<h2>Ledger</h2>" in html
    cells = ["<td>Duplicate: near</td>", '<td class="number">2</td>', '<td class="number">18</td>']
    assert "".join(cells) in html
    assert "personalData.email: 1 removed train.jsonl row 3: write to [EMAIL]" in shown
    assert "row 4 is in row 8 with 2 of its 5 words in sequence: one two" in shown


def test_the_search_for_items_of_suites_is_in_the_lineage_with_its_warning(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    leak = {"item": "the suite sense, row 1", "training": "row 8", "span": "one two"}
    found = {"checked": 9, "items": 1, "examples": [leak]}
    searched = record("leaks", {"searchedItems": 9.0, "leakedItems": 1.0}, leaks=found)
    inputs["leaks"] = tmp_path / "stages" / "leaks"
    inputs["leaks"].mkdir()
    value = searched.model_dump_json(by_alias=True)
    (inputs["leaks"] / "record.json").write_text(value)
    (tmp_path / "result").mkdir()
    report.write(tmp_path / "result", inputs, manifest=MANIFEST, measured={}, base_license=None)
    html = page(tmp_path / "result")
    lineage = html.partition('<section id="lineage">')[2].partition("</section>")[0]
    assert '<th scope="row">leaks</th>' in lineage
    assert "sha256:leaks" in lineage
    written = JobReport.model_validate_json((tmp_path / "result" / "report.json").read_text())
    assert [each.name for each in written.stages] == ["prepare", "leaks", "sft", "evaluate"]
    (warning,) = (each for each in written.warnings if "items of suites" in each)
    assert "the suite sense, row 1 in row 8: one two" in warning
    assert "Suites in the training data" in (tmp_path / "result" / "README.md").read_text()


def test_documents_replayed_data_and_gaps_are_named_and_counted(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    path = inputs["data"] / "record.json"
    value = json.loads(path.read_text())
    contexts = {"documents": 10, "passages": 12, "rows": 30, "withRightPassage": 22}
    value["details"] |= {
        "retrieval": contexts | {"namedDocuments": 29},
        "fillInTheMiddle": {"sequences": {"asItWas": 6, "changed": 4, "unclear": 1}, "gaps": 5},
    }
    value["inputDigests"] |= {"train.1": "sha256:replayed", "documents": "sha256:documents"}
    path.write_text(json.dumps(value))
    data = MANIFEST["spec"]["data"] | {
        "replay": {"data": [{"uri": "file://data/general.jsonl"}], "share": 0.1},
        "retrieval": {"documents": {"uri": "file://data/manuals"}},
    }
    manifest = MANIFEST | {"spec": MANIFEST["spec"] | {"data": data}}
    summary = RunSummary.of(tmp_path / "result", inputs, manifest, {}, None)
    facts = dict(summary.data_facts)
    assert facts["Documents"] == "10, in 12 passages"
    assert facts["Contexts with the right passage"] == "22 of 30"
    assert facts["Rows without a document, whose passage BM25 chose"] == "1"
    assert facts["Sequences whose middle comes last"] == "4 of 11"
    assert facts["Held-out documents with a gap"] == "5"
    labels = dict(summary.digests)
    assert labels["Data, train.1, file://data/general.jsonl"] == "sha256:replayed"
    assert labels["Data, documents, file://data/manuals"] == "sha256:documents"
    assert "| Contexts with the right passage | 22 of 30 |" in write_card(summary)


def test_names_and_places_on_the_page_have_no_control_characters(tmp_path: Path) -> None:
    name = "\x1b[2J\u202e<b>"
    inputs = folders(tmp_path / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    value["metrics"][f"{name}/accuracy"] = 0.5
    path.write_text(json.dumps(value))
    data = {"train": [{"uri": f"file://{name}.jsonl", "format": "auto"}]}
    manifest = MANIFEST | {"spec": MANIFEST["spec"] | {"data": data}}
    (tmp_path / "result").mkdir()
    report.write(
        tmp_path / "result", inputs, manifest=manifest, measured={}, base_license=None
    )  # fmt: skip
    for file in ("report.html", "README.md"):
        text = (tmp_path / "result" / file).read_text("utf-8")
        assert "\ufffd[2J" in text
        assert not set("\x1b\u202e") & set(text)
    assert "&lt;b&gt;: accuracy" in (tmp_path / "result/report.html").read_text("utf-8")


def test_completions_of_preferences_are_said_to_be_better_and_worse_ones(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    said = "the better and the worse ones"
    for kind, expected in (("prepare", False), ("pairs", True)):
        path = inputs["data"] / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": kind}))
        (tmp_path / kind).mkdir()
        summary = RunSummary.of(tmp_path / kind, inputs, MANIFEST, {}, None)
        found = document(summary, inputs, [[Run("Which?", False), Run("This.", True)]], [])
        page = render(found, summary, Pictures(b"", b""), [])
        assert (said in page) == expected


def test_the_adapter_of_a_reward_model_is_that_of_its_own_training(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    train = {"adapter": {"lora": {"rank": 4, "alpha": 8}}}
    for adapter, said in ((train, "with LoRA."), ({}, "with full fine-tuning.")):
        spec = {"model": {"uri": "hf://a/b"}, "rewardModel": {"train": adapter}}
        manifest = {"kind": "AlignmentJob", "metadata": {"name": "r"}, "spec": spec}
        summary = RunSummary.of(tmp_path, inputs, manifest, {}, None)
        assert summary.sentence == f"hf://a/b, trained as a reward model on preferences {said}"
        shown = dict(summary.settings)["Adapter"]
        assert shown == ("LoRA; rank 4, alpha 8" if adapter else "none: all weights were trained")


def test_a_random_choice_is_not_called_the_base_model(tmp_path: Path) -> None:
    inputs = folders(tmp_path / "stages")
    path = inputs["evaluation"] / "record.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"metrics": {"winRate": 0.75}, "details": {}}))
    card = write_card(RunSummary.of(tmp_path, inputs, MANIFEST, {}, None))
    assert "| Win rate by the judge | 50 % by chance | 75 % |" in card


def test_a_record_without_a_ledger_has_none_on_the_page(folder: Path) -> None:
    """Records of 0.2 have none."""
    assert "Ledger" not in Page(page(folder)).text
