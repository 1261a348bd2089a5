"""A run at MLflow's own server, and what is said of servers that do not work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from rig.mlflow import MlflowServer

from tests.trainer.jobs import manifest, planned
from tests.trainer.tracking.scene import Scene, resumed, running, succeeded
from tests.trainer.tracking.servers import serving
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.tracking import facts, follow, mlflow_run
from tuneyard_trainer.tracking.mlflow_run import MlflowRun
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step
from tuneyard_trainer.tracking.trackers import trackers_of
from tuneyard_trainer.worker import Interrupted

TOKEN = "a-secret-token-for-mlflow"
VARIABLE = "TUNEYARD_SECRET_MLFLOW_TOKEN"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follow, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)


def tracked(folder: Path, url: str, **mlflow: Any) -> Plan:
    settings = {"uri": url, "experiment": folder.name, **mlflow}
    return planned(manifest(folder / "model", tracking={"mlflow": settings}))


def tracker(plan: Plan, attempt: int = 1) -> MlflowRun:
    assert plan.tracking
    assert plan.tracking.mlflow
    return MlflowRun(plan.tracking.mlflow, plan, attempt)


@pytest.fixture
def scene(tmp_path: Path, mlflow: MlflowServer) -> Scene:
    """A job that tracks at MLflow, in an experiment of its own."""
    made = Scene(tmp_path)
    made.plan = tracked(tmp_path, mlflow.url, runName="first", tags={"team": "support"})
    return made


@pytest.fixture
def client(mlflow: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow.url)


def runs(client: MlflowClient, name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def history(client: MlflowClient, run: Run, metric: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.info.run_id, metric)
    return [(each.step, each.value) for each in found]


@pytest.mark.slow
def test_two_attempts_are_one_run_that_has_each_step_once(
    scene: Scene, client: MlflowClient
) -> None:
    with scene.ended_by(Interrupted("sft", 5), tracker(scene.plan)) as tracking:
        tracking.follow(succeeded("prepare", "sha256:p", rows=10.0))
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write(range(1, 6))
    (run,) = runs(client, scene.folder.name)
    assert run.info.status == "RUNNING"
    assert history(client, run, "sft/loss") == [(step, 10.0 / step) for step in range(1, 6)]

    scene.next_attempt()
    scene.truncate(3)
    with scene.followed(tracker(scene.plan, 2)) as tracking:
        tracking.follow(succeeded("prepare", "sha256:p", rows=10.0))
        tracking.follow(running())
        tracking.follow(resumed(3))
        scene.write(range(4, 9))
        tracking.follow(succeeded(finalLoss=1.25))
        (scene.store.workdir("evaluate") / "evaluation.json").write_text(
            json.dumps({"metrics": {"lossReduction": 0.5}, "samples": []})
        )
        tracking.follow(succeeded("evaluate", "sha256:e", lossReduction=0.5))
        (scene.store.workdir("export") / "README.md").write_text("the card")
        tracking.follow(succeeded("export", "sha256:x"))
    (run,) = runs(client, scene.folder.name)
    assert history(client, run, "sft/loss") == [(step, 10.0 / step) for step in range(1, 9)]
    assert history(client, run, "sft/final/finalLoss") == [(0, 1.25)]
    assert history(client, run, "prepare/final/rows") == [(0, 10.0)]
    assert history(client, run, "evaluate/lossReduction") == [(0, 0.5)]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"

    tags, params = run.data.tags, run.data.params
    assert tags["team"] == "support"
    assert (tags["tuneyard.job"], tags["tuneyard.attempt"]) == ("lamps", "2")
    assert tags["tuneyard.digest.prepare.model"] == "sha256:m"
    assert tags["tuneyard.version.torch"] == "2"
    assert params["spec.training.learningRate"] == "0.01"
    assert params["plan.sft.schedule.type"] == "cosine"
    assert not [name for name in params if "tracking" in name]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == [
        "README.md",
        "evaluate",
    ]
    assert f"runs/{run.info.run_id}" in scene.said[0]


@pytest.mark.slow
def test_a_request_whose_answer_was_lost_is_not_repeated(
    scene: Scene, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has taken the steps, and the answer never arrived."""
    lost = {"left": 2}

    def losing(method: str) -> None:
        original = getattr(MlflowClient, method)

        def call(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if lost["left"] and (method == "create_run" or kwargs.get("metrics")):
                lost["left"] -= 1
                raise TimeoutError("no answer")
            return result

        monkeypatch.setattr(MlflowClient, method, call)

    losing("create_run")
    losing("log_batch")
    with scene.followed(tracker(scene.plan)) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write(range(1, 6))
        tracking.follow(succeeded())
    assert lost["left"] == 0
    (run,) = runs(client, scene.folder.name)
    assert history(client, run, "sft/loss") == [(step, 10.0 / step) for step in range(1, 6)]


@pytest.mark.slow
def test_more_metrics_and_parameters_than_one_request_takes(
    scene: Scene, client: MlflowClient
) -> None:
    run = tracker(scene.plan)
    run.open(TrackerState("", []))
    run.add_steps("sft", [Step(step, {"a": 1.0, "b": 2.0}) for step in range(1, 1202)])
    (found,) = runs(client, scene.folder.name)
    assert [step for step, _ in history(client, found, "sft/b")] == [*range(1, 1202)]


@pytest.mark.slow
def test_metrics_of_suites_keep_their_slash_and_lose_what_no_server_accepts(
    scene: Scene, client: MlflowClient
) -> None:
    run = tracker(scene.plan)
    run.open(TrackerState("", []))
    run.add_evaluation("evaluate", {"sense/accuracy": 0.5, "code/pass@1": 0.25})
    (found,) = runs(client, scene.folder.name)
    assert found.data.metrics == {"evaluate/sense/accuracy": 0.5, "evaluate/code/pass_1": 0.25}


# ---- facts --------------------------------------------------------------------------------------


def test_parameters_have_names_and_values_that_every_server_accepts(tmp_path: Path) -> None:
    long = "x" * 2000
    plan = planned(
        manifest(
            tmp_path,
            data={
                "train": [{"uri": "https://user:password@host/a.jsonl?sig=abc"}],
                "systemPrompt": long,
            },
        )
    )
    found = facts.parameters(plan)
    assert found["spec.data.train.0.uri"] == "https://host/a.jsonl"
    assert len(found["spec.data.systemPrompt"]) == facts.MOST_CHARACTERS
    assert "password" not in json.dumps(found)


def test_names_are_those_that_every_server_accepts() -> None:
    kept = ["evaluate/sense/baseAccuracy", "a-b/exact_match.strict-match"]
    assert [facts.allowed_name(name) for name in kept] == kept
    assert facts.allowed_name("code/pass@1,x") == "code/pass_1_x"
    assert len(facts.allowed_name("x" * 300)) == 250


# ---- servers that do not work, and wrong settings -----------------------------------------------


def test_the_token_is_sent_as_a_header_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)
    made = Scene(tmp_path)
    with serving(403) as asked:
        made.plan = tracked(tmp_path, asked.url, tokenSecret={"name": "mlflow", "key": "token"})
        with made.followed(tracker(made.plan)) as tracking:
            tracking.follow(running())
    assert {headers["Authorization"] for headers in asked.headers} == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(asked.bodies)
    assert "MLFLOW_TRACKING_TOKEN" not in os.environ, "another job's server does not get it"
    warning = made.said[0]
    assert "refuses a request" in warning
    assert "who?" in warning
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = [*made.said, made.plan.to_json(), *(path.read_text() for path in written)]
    assert written
    assert not [text for text in texts if TOKEN in text]


def refused(folder: Path, status: int, message: str = "who?", **settings: Any) -> tuple[str, Any]:
    """Track a job at a server that answers so. Return the warning and what the server was asked."""
    made = Scene(folder)
    with serving(status, message) as asked:
        made.plan = tracked(folder, asked.url, **settings)
        with made.followed(tracker(made.plan)) as tracking:
            tracking.follow(running())
    return made.said[0], asked


SECRET = {"tokenSecret": {"name": "mlflow", "key": "token"}}


def test_a_token_that_a_server_repeats_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)
    warning, _ = refused(tmp_path, 401, f"Bearer {TOKEN} is not valid", **SECRET)
    assert "Bearer (token) is not valid" in warning
    assert TOKEN not in warning


@pytest.mark.parametrize("token", [f"{TOKEN}\nsecond", f"{TOKEN} second", f"{TOKEN}\u2026"])
def test_a_token_that_no_header_can_have_ends_the_job_and_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv(VARIABLE, token)
    plan = tracked(tmp_path, "http://mlflow", **SECRET)
    with pytest.raises(StageError) as caught, tracker(plan).environment():
        pass
    assert caught.value.reason == "SecretMissing"
    assert "line breaks, spaces or characters that are not ASCII" in caught.value.message
    assert TOKEN not in f"{caught.value.message}{caught.value.advice}"


def test_a_token_of_the_environment_is_sent_only_if_the_manifest_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    _, asked = refused(tmp_path / "a", 403)
    assert asked.headers
    assert not [headers for headers in asked.headers if "Authorization" in headers]
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == TOKEN
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    _, asked = refused(tmp_path / "b", 403, **SECRET)
    assert {headers["Authorization"] for headers in asked.headers} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_no_status_of_a_server_stops_a_job(tmp_path: Path, status: int) -> None:
    warning, asked = refused(tmp_path, status)
    assert "refuses a request" in warning
    assert 1 <= len(asked.headers) <= follow.LAST_TRIES  # the client itself repeats nothing


def test_a_redirect_to_another_host_does_not_get_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)
    made = Scene(tmp_path)
    with serving(403) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with serving(302, location=elsewhere) as asked:
            made.plan = tracked(tmp_path, asked.url, **SECRET)
            with made.followed(tracker(made.plan)) as tracking:
                tracking.follow(running())
    assert {headers["Authorization"] for headers in asked.headers} == {f"Bearer {TOKEN}"}
    assert not [headers for headers in other.headers if "Authorization" in headers]


def test_a_server_that_never_answers_is_given_up_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_run, "REQUEST_SECONDS", 1)
    made = Scene(tmp_path)
    with serving(None) as asked:
        made.plan = tracked(tmp_path, asked.url)
        with made.followed(tracker(made.plan)) as tracking:
            tracking.follow(running())
            tracking.follow(resumed(0))
            made.write([1, 2, 3])
    assert asked.headers
    assert "does not respond within 1 s; the job goes on" in made.said[0]
    assert made.said[-1].endswith("3 lines of metrics and its end are missing")


def test_a_missing_token_is_named_with_its_variable_and_field(tmp_path: Path) -> None:
    plan = tracked(tmp_path, "http://mlflow", tokenSecret={"name": "mlflow", "key": "token"})
    with pytest.raises(StageError) as caught, tracker(plan).environment():
        pass
    assert caught.value.reason == "SecretMissing"
    assert VARIABLE in caught.value.message
    assert "spec.tracking.mlflow.tokenSecret" in caught.value.advice


@pytest.mark.parametrize(("field", "package"), extras.TRACKING.items())
def test_a_missing_package_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, package: str
) -> None:
    settings = {"mlflow": {"uri": "http://mlflow"}, "tensorboard": {}}
    plan = planned(manifest(tmp_path, tracking={field: settings[field]}))
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StageError, match=f"spec.tracking.{field} needs {package}") as caught:
        trackers_of(plan, 1, Scene(tmp_path).store, str)
    assert caught.value.reason == "MissingExtra"
    assert "tuneyard[tracking]" in caught.value.advice
