"""The command line: its output, exit codes and imports."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.compare import GOLDEN, assert_golden
from tuneyard import __version__
from tuneyard.api.plan import Plan
from tuneyard.cli import main
from tuneyard.errors import StageError
from tuneyard.manifests import manifest, starter

MINIMAL = str(GOLDEN / "manifests" / "minimal.yaml")
SUPPORT_BOT = str(GOLDEN / "manifests" / "support-bot.yaml")
COMMANDS = [
    *("init", "validate", "plan", "render", "run", "crds"),
    *("status", "logs", "suspend", "resume", "cancel", "delete", "operator", "data", "gate"),
    *("compare", "merge"),
]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Return two valid documents that this version cannot run."""
    text = Path(MINIMAL).read_text(encoding="utf-8")
    metrics = text + "  evaluate: {metrics: [tokenF1]}\n"
    other = text.replace("name: minimal", "name: other") + "  evaluate:\n    fewShot: 2\n"
    path = tmp_path / "job.yaml"
    path.write_text(f"{metrics}---\n{other}", encoding="utf-8")
    return path


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ---- help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS, "data show", "data check", "data stats"])
def test_the_help_of_every_command_is_frozen(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call([*command.split(), "--help"]) == 0
    assert_golden(f"help/{command or 'tuneyard'}.txt", capsys.readouterr().out)


def test_every_command_has_a_frozen_help() -> None:
    assert sorted(main.tuneyard.commands) == sorted(COMMANDS)


def test_the_version_is_the_one_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.call(["--version"]) == 0
    assert capsys.readouterr().out == f"tuneyard {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["status", "--help"],
        ["init", "--output", "-"],
        ["validate", MINIMAL],
        ["plan", MINIMAL],
        ["render", MINIMAL],
        ["crds", "--check"],
    ],
    ids=" ".join,
)
def test_only_run_imports_heavy_frameworks(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from tuneyard.cli import main as cli\n"
        "assert cli.call(sys.argv[1:]) in (0, 1)\n"
        "heavy = {'torch', 'ray', 'kopf', 'kubernetes', 'transformers', 'numpy'}\n"
        "heavy |= {'tuneyard_trainer'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["plan"], ["plan", "missing.yaml"], ["plan", "--nonsense", MINIMAL]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_prints_no_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_validate_prints_every_fault_of_every_file_with_line_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(MINIMAL).read_text(encoding="utf-8")
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    paths[0].write_text(text + "  training: {epochs: many}\n  colour: red\n", encoding="utf-8")
    paths[1].write_text(text.replace("output", "outptu"), encoding="utf-8")
    assert main.call(["validate", *map(str, paths), MINIMAL]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert any(line.startswith(f"{paths[0]}:10: spec.training.epochs: ") for line in lines)
    assert any(line.startswith(f"{paths[0]}:11: spec.colour: ") for line in lines)
    assert any(line.startswith(f"{paths[1]}:9: spec.outptu: ") for line in lines)
    assert captured.out == f"{MINIMAL}: FineTuneJob minimal is valid\n"


def test_validate_accepts_manifests_that_this_version_cannot_run(
    wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["validate", str(wrong)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("command", ["plan", "render", "run"])
def test_settings_that_cannot_be_run_are_named_with_their_lines_for_all_documents(
    command: str, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call([command, str(wrong)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith(f"{wrong}:10: spec.evaluate.metrics: ")
    assert second.startswith(f"{wrong}:22: spec.evaluate.fewShot: ")


def test_the_fault_of_a_list_item_has_the_line_of_the_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    data = "train:\n      - {uri: https://data.example/a}\n      - {uri: file://b}"
    text = Path(MINIMAL).read_text(encoding="utf-8")
    path.write_text(re.sub(r"train: .*", data, text), encoding="utf-8")
    assert main.call(["render", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"{path}:10: spec.data.train[1].uri: file://b is a ")


def test_bytes_that_are_not_text_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"kind: \xff\xfe")
    assert main.call(["plan", str(path)]) == 2
    message = f"{path}: byte 6 is not UTF-8: save the manifest as UTF-8 text\n"
    assert capsys.readouterr().err == message


def test_a_manifest_can_come_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, Path(MINIMAL).read_bytes())
    assert main.call(["validate", "-"]) == 0
    pipe(monkeypatch, b"kind: FineTuneJob\n")
    assert main.call(["validate", "-"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "stdin: FineTuneJob minimal is valid\n"
    assert captured.err.startswith("stdin:")


# ---- init ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "alignment"])
def test_a_new_manifest_is_valid_as_it_stands(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.call(["init", "a-job", "--kind", kind]) == 0
    assert main.call(["validate", "a-job.yaml"]) == 0
    assert capsys.readouterr().out.endswith("Job a-job is valid\n")
    assert_golden(f"init/{kind}.yaml", Path("a-job.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["finetune", "alignment"])
def test_each_line_that_is_off_can_be_switched_on(kind: str) -> None:
    text = starter.manifest(kind, "a-job", "a-job.yaml")
    lines = text.splitlines()
    off = [number for number, line in enumerate(lines) if re.match(r" *#\w", line)]
    assert len(off) > 15
    for number in off:
        switched = [*lines[:number], lines[number].replace("#", "", 1), *lines[number + 1 :]]
        assert len(manifest.read("\n".join(switched))) == 1, lines[number]


def test_init_does_not_overwrite_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("mine", encoding="utf-8")
    assert main.call(["init", "--output", str(path)]) == 2
    assert f"{path} exists already" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["Bot", "a_b", "-a", "a" * 41, "a\n", "../a"])
def test_init_refuses_a_name_that_is_not_valid_for_a_job(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.call(["init", "--", name]) == 2
    assert "cannot be the name of a job" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_prints_why_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["init", "-o", str(tmp_path / "missing" / "job.yaml")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


# ---- plan and render ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimal", "support-bot", "augmented"])
def test_the_printed_plan_is_frozen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.call(["plan", str(GOLDEN / "manifests" / f"{name}.yaml")]) == 0
    text = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    assert_golden(f"plans/{name}.txt", text)


@pytest.mark.parametrize("name", ["minimal", "support-bot"])
def test_the_plan_as_json_is_the_one_that_the_trainer_reads(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["plan", "--json", str(GOLDEN / "manifests" / f"{name}.yaml")]) == 0
    assert capsys.readouterr().out == (GOLDEN / "plans" / f"{name}.json").read_text("utf-8")


def test_text_of_the_manifest_is_not_printed_as_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    text = Path(MINIMAL).read_text(encoding="utf-8")
    path.write_text(text.replace("train.jsonl", "[bold]x[/].jsonl"), encoding="utf-8")
    assert main.call(["plan", str(path)]) == 0
    assert "https://data.example/[bold]x[/].jsonl" in capsys.readouterr().out


def test_render_prints_objects_that_a_cluster_accepts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.call(["render", SUPPORT_BOT, "--attempt", "3"]) == 0
    text = capsys.readouterr().out
    config_map, _, preparation, ray_job = yaml.safe_load_all(text)
    golden = (GOLDEN / "plans" / "support-bot.json").read_text(encoding="utf-8")
    assert json.loads(config_map["data"]["plan.json"]) == json.loads(golden)
    assert preparation["metadata"]["name"] == "support-bot-3-prepare"
    assert ray_job["metadata"]["name"] == "support-bot-3"


def test_render_prints_nothing_if_one_job_has_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(MINIMAL).read_text(encoding="utf-8")
    local = text.replace("name: minimal", "name: local").replace("s3://models", "file://models")
    path = tmp_path / "job.yaml"
    path.write_text(f"{text}---\n{local}", encoding="utf-8")
    assert main.call(["render", str(path)]) == 2
    assert capsys.readouterr().out == ""


# ---- run ------------------------------------------------------------------------------------


def trainer(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Replace the trainer's `run`."""
    module = types.ModuleType("tuneyard_trainer.local.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuneyard_trainer.local.run", module)
    import tuneyard_trainer.local

    monkeypatch.setattr(tuneyard_trainer.local, "run", module, raising=False)


@pytest.mark.parametrize("code", [0, 1, 130])
def test_run_passes_the_plans_and_the_manifests_folder_to_the_trainer(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[Plan], Path]] = []

    def run(plans: list[Plan], base_dir: Path, _: Any) -> int:
        calls.append((plans, base_dir))
        return code

    trainer(monkeypatch, run)
    text = Path(MINIMAL).read_text(encoding="utf-8")
    (tmp_path / "jobs.yaml").write_text(
        f"{text}---\n{text.replace('name: minimal', 'name: second')}", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert main.call(["run", "jobs.yaml"]) == code
    ((plans, base_dir),) = calls
    assert [plan.job.name for plan in plans] == ["minimal", "second"]
    assert base_dir == tmp_path


def test_a_manifest_from_standard_input_is_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def run(plans: list[Plan], base_dir: Path, _: Any) -> int:
        folders.append(base_dir)
        return 0

    trainer(monkeypatch, run)
    pipe(monkeypatch, Path(MINIMAL).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main.call(["run", "-"]) == 0
    assert folders == [tmp_path]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageError("OutOfMemory", "no memory left.", advice="Lower it."), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=["failed", "interrupted"],
)
def test_a_failed_run_prints_a_message_without_a_traceback(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(plans: list[Plan], base_dir: Path, _: Any) -> int:
        raise error

    trainer(monkeypatch, run)
    assert main.call(["run", MINIMAL]) == code
    assert capsys.readouterr().err.splitlines()[-1] in ("no memory left. Lower it.", "interrupted")


def test_without_the_trainers_packages_run_prints_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "tuneyard_trainer.local.run":
                raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.delitem(sys.modules, "tuneyard_trainer.local.run", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    assert main.call(["run", MINIMAL]) == 2
    assert "ray is not installed: install tuneyard[trainer]" in capsys.readouterr().err


# ---- crds -----------------------------------------------------------------------------------


def test_crds_are_up_to_date_after_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "new" / "crds")
    assert main.call(["crds", folder]) == 0
    assert main.call(["crds", "--check", folder]) == 0
    kinds = {yaml.safe_load(path.read_text("utf-8"))["kind"] for path in Path(folder).iterdir()}
    assert kinds == {"CustomResourceDefinition"}


def test_crds_check_names_the_outdated_files_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["crds", str(tmp_path)]) == 0
    first, second = sorted(tmp_path.iterdir())
    first.write_text("edited by hand", encoding="utf-8")
    second.unlink()
    assert main.call(["crds", "--check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in sorted(captured.err.splitlines())] == [
        f"{first} is out of date",
        f"{second} is out of date",
    ]
    assert first.read_text(encoding="utf-8") == "edited by hand"
    assert not second.exists()


# ---- the command itself ---------------------------------------------------------------------


def test_a_closed_pipe_causes_no_traceback() -> None:
    tuneyard = f"{sys.executable} -c 'from tuneyard.cli.main import main; main()'"
    command = f"{tuneyard} plan --json {SUPPORT_BOT} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_line_is_imported_ends_without_a_traceback() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["tuneyard"].partition(":")
    program = f"""
import sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
from {module} import {function}
{function}()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")
