"""A job that names another job's model is planned by what that job exports."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.controller.memory import JOBS, LISTED_AT_START, MemoryApi, eventually, job, operated
from tests.controller.test_reconciler import SPEC, EarlyWatches
from tuneyard.controller.cluster import Key

ALIGNED = {
    "model": {"uri": "pvc://models/base"},
    "preferences": {"data": [{"uri": "pvc://data/pairs.jsonl"}]},
    "rewardModel": {"train": {"adapter": {"lora": {}}}},
    "output": {"uri": "pvc://models/reward"},
}
LEARNS_FROM = {
    "model": {"uri": "pvc://models/base"},
    "rewardModel": {"model": {"uri": "job://earlier"}},
    "optimize": {"ppo": {"prompts": {"uri": "pvc://data/prompts.jsonl"}}},
    "output": {"uri": "pvc://models/tuned"},
}
LATER = {**SPEC, "model": {"uri": "job://earlier"}, "output": {"uri": "pvc://models/later"}}


class TwoJobs(EarlyWatches):
    """A cluster of a job and of the job `earlier`, whose model the first one names."""

    def __init__(
        self,
        spec: dict[str, Any],
        earlier: dict[str, Any] | None,
        phase: str | None = "Succeeded",
        kind: str = "FineTuneJob",
        own_kind: str = "FineTuneJob",
    ) -> None:
        super().__init__(spec)
        self.key = Key(own_kind, "team", "job")
        self.body["kind"] = own_kind
        self.earlier: dict[str, Any] | None = None
        if earlier is not None:
            self.earlier = {
                **self.body,
                "kind": kind,
                "metadata": {**self.body["metadata"], "name": "earlier", "uid": "e"},
                "spec": earlier,
                "status": {"phase": phase} if phase else {},
            }

    async def job(self, key: Key) -> dict[str, Any] | None:
        if key == self.key:
            return self.body
        earlier = self.earlier
        return earlier if earlier and (earlier["kind"], "earlier") == (key.kind, key.name) else None

    def planned(self) -> dict[str, Any]:
        """Return the job's status after it was planned once."""
        self.reconciler.queue.add(self.key)
        asyncio.run(self.reconcile_until(lambda: bool(self.statuses), add=False))
        return self.statuses[0]


def condition(status: dict[str, Any]) -> tuple[str, str]:
    """Return the reason and the message of the condition Planned."""
    (found,) = [each for each in status["conditions"] if each["type"] == "Planned"]
    return found["reason"], found["message"]


MERGED = {**SPEC, "adapter": {"lora": {}}, "output": {"uri": "pvc://models/a", "merge": True}}
ADAPTER = {**SPEC, "adapter": {"lora": {}}}
PROMPT = {**SPEC, "adapter": {"prompt": {}}}


@pytest.mark.parametrize("spec", [SPEC, MERGED], ids=["full", "merged"])
def test_the_model_of_a_finished_job_is_read_from_its_output(spec: dict[str, Any]) -> None:
    jobs = TwoJobs(LATER, spec)
    assert condition(jobs.planned())[0] == "Planned"


@pytest.mark.parametrize("phase", ["Succeeded", "Running", None])
def test_a_job_that_exports_only_an_adapter_is_refused_with_the_remedy(
    phase: str | None,
) -> None:
    """Before the earlier job is done too: it would not export a model later either."""
    reason, message = condition(TwoJobs(LATER, ADAPTER, phase).planned())
    assert reason == "PlanRejected"
    assert message == (
        "spec.model.uri: job://earlier: the job exports only its adapter: create it again with "
        "output.merge: true and the same output.uri, which repeats no training, and then this job"
    )


def test_an_adapter_that_cannot_be_merged_is_refused() -> None:
    reason, message = condition(TwoJobs(LATER, PROMPT).planned())
    assert reason == "PlanRejected"
    assert "its prompt adapter, which has no merged form: name a model" in message


def test_a_reward_model_is_refused_as_a_language_model() -> None:
    jobs = TwoJobs(LATER, ALIGNED, kind="AlignmentJob")
    reason, message = condition(jobs.planned())
    assert (reason, message) == (
        "PlanRejected",
        "spec.model.uri: job://earlier: the job trains a reward model: name a language model",
    )


def test_a_reward_model_of_a_job_is_accepted_as_one() -> None:
    jobs = TwoJobs(LEARNS_FROM, ALIGNED, kind="AlignmentJob", own_kind="AlignmentJob")
    assert condition(jobs.planned())[0] == "Planned"


def test_a_language_model_is_refused_as_a_reward_model() -> None:
    reason, message = condition(TwoJobs(LEARNS_FROM, SPEC, own_kind="AlignmentJob").planned())
    assert reason == "PlanRejected"
    assert message == (
        "spec.rewardModel.model.uri: job://earlier: the job trains no reward model: "
        "name a job that ends with rewardModel.train"
    )


def test_a_failed_job_is_refused_at_the_field_that_names_it() -> None:
    jobs = TwoJobs(LEARNS_FROM, ALIGNED, "Failed", "AlignmentJob", "AlignmentJob")
    reason, message = condition(jobs.planned())
    assert reason == "PlanRejected"
    assert message.startswith("spec.rewardModel.model.uri: job earlier failed and has no model")


@pytest.mark.parametrize(
    ("earlier", "phase", "expected"),
    [
        (SPEC, "Running", "job earlier is not done yet: Running"),
        (SPEC, None, "job earlier is not done yet: Pending"),
        (None, None, "the namespace has no job earlier: create it, or change spec.model.uri"),
        (
            {**SPEC, "data": {}},
            "Succeeded",
            "this version of the operator cannot read job earlier: spec.data.train: ",
        ),
    ],
    ids=["running", "new", "absent", "of another version"],
)
def test_a_job_waits_for_a_model_that_may_still_come(
    earlier: dict[str, Any] | None, phase: str | None, expected: str
) -> None:
    reason, message = condition(TwoJobs(LATER, earlier, phase).planned())
    assert reason == "WaitingForModel"
    assert message.startswith(expected)


@pytest.mark.parametrize(
    "name",
    [
        "../../other/finetunejobs/victim",
        "../../../../../../api/v1/namespaces/team/configmaps/x",
        "..",
        ".",
        "earlier/status",
        "earlier\x00",
        "e" * 41,
    ],
)
def test_a_source_cannot_lead_the_operator_to_anything_but_a_job_of_its_namespace(
    name: str,
) -> None:
    """The operator may read the jobs of other namespaces, and a client resolves `..` in a path."""

    async def run() -> MemoryApi:
        api = MemoryApi()
        body = job("tuned")
        body["spec"]["model"]["uri"] = f"job://{name}"
        api.add(body)
        async with operated(api):
            await eventually(lambda: api.status("tuned").get("phase"))
        return api

    api = asyncio.run(run())
    read = {each.path for each in api.requests if each.method == "GET"}
    assert read <= {f"{JOBS}/tuned", *LISTED_AT_START}
    assert api.status("tuned")["failure"]["reason"] == "PlanRejected"
    assert "spec.model.uri" in api.status("tuned")["failure"]["message"]
