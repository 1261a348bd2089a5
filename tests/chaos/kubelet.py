"""KubeRay and the kubelet for the RayJobs of one namespace: pods whose processes are real."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from tests.chaos.machine import Machine, Pod
from tests.controller.scene import Attempt, Job, Object, RefusedError, Scene
from tuneyard.api.pods import TOKEN_FILE_VARIABLE
from tuneyard_trainer import drain

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0
"""The grace period of a pod."""
CLOCK_SECONDS = 2.0
"""How exactly the start of a process is known: the time of the boot is given in whole seconds."""
ORPHAN_SECONDS = 1.0
"""The longest time that a worker outlives its driver."""


@dataclass
class Played:
    """An attempt whose pods run on this machine."""

    attempt: Attempt
    job_uid: str
    uid: str
    """The RayJob's uid."""
    pod: Pod
    driver: psutil.Process
    ended: bool = False
    """Whether the RayJob's end is written or being written."""
    draining: threading.Thread | None = None
    was_writing: bool = False
    """Whether a checkpoint was left unfinished when the driver had ended."""

    @property
    def workers(self) -> list[psutil.Process]:
        file = self.pod.worker_id
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            process = psutil.Process(int(file.read_text()))
            # Numbers of processes come again within minutes.
            if process.create_time() < file.stat().st_mtime + CLOCK_SECONDS:
                return [process]
        return []

    @property
    def processes(self) -> list[psutil.Process]:
        return [p for p in (self.driver, *self.workers) if _is_alive(p)]

    def kill(self) -> None:
        """SIGKILL every process, as on a node that lost its power."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass
class Kubelet:
    """A thread that starts, watches and ends the pods of all RayJobs."""

    scene: Scene
    machine: Machine
    folder: Path
    volumes: Path
    played: list[Played] = field(default_factory=list)
    """Every attempt so far, in the order of their starts."""
    overlaps: set[tuple[str, str]] = field(default_factory=set)
    """The name of a job that had two RayJobs, or processes of two attempts, at a time, and what was
    seen: must stay empty."""
    failures: list[str] = field(default_factory=list)
    """Unexpected errors of this thread: must stay empty."""
    _begun: dict[str, Future[None]] = field(default_factory=dict)
    """A RayJob's uid to the start of its pods."""
    _done: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop, daemon=True, name="kubelet")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        assert self._thread
        self._thread.join(30)
        self._pool.shutdown()
        for played in self.played:
            played.kill()

    def of(self, job: Job) -> list[Played]:
        """Return the attempts of a job, under any uid, in the order of their starts."""
        return [each for each in self.played if each.attempt.job.name == job.name]

    def _loop(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._guarded(self._round)

    def _round(self) -> None:
        base = f"/namespaces/{self.scene.namespace}"
        found = self.scene.api.list(f"/apis/ray.io/v1{base}/rayjobs")
        self._check_overlaps(found)
        known = {each.uid: each for each in self.played}
        for body in found:
            uid = body["metadata"]["uid"]
            played = known.get(uid)
            if uid not in self._begun and "deletionTimestamp" not in body["metadata"]:
                self._begun[uid] = self._pool.submit(self._guarded, self._begin, body)
            elif played and not played.ended and not _is_alive(played.driver):
                played.ended, played.was_writing = True, self._has_unfinished(played)
                self._pool.submit(self._guarded, self._end, played)
        for pod in self.scene.api.list(f"/api/v1{base}/pods"):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"].get("finalizers"):
                self._guarded(self._delete, pod)

    def _guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Carry out a step. An object that is gone or has changed meanwhile is not an error."""
        try:
            step(*arguments)
        except RefusedError as refused:
            is_ending = "object is being deleted" in str(refused)  # a 422
            if refused.status not in (404, 409) and not is_ending:
                self.failures.append(traceback.format_exc())
        except Exception:
            self.failures.append(traceback.format_exc())

    def _check_overlaps(self, found: list[Object]) -> None:
        names = [body["metadata"]["labels"]["tuneyard.io/job"] for body in found]
        for name in {name for name in names if names.count(name) > 1}:
            self.overlaps.add((name, "it has two RayJobs at a time"))

    # ---- an attempt's pods ----------------------------------------------------------------------

    def _begin(self, body: Object) -> None:
        labels, name = body["metadata"]["labels"], body["metadata"]["name"]
        job = Job(self.scene, labels["tuneyard.io/kind"], labels["tuneyard.io/job"])
        attempt = Attempt(job, int(labels["tuneyard.io/attempt"]))
        for other in self.of(job):
            if other.processes:
                text = f"{name} began while {other.attempt.name} still ran"
                self.overlaps.add((job.name, text))
        if any(
            self._is_foreign(pod, body["metadata"]["uid"]) for pod in (attempt.head, attempt.worker)
        ):
            del self._begun[body["metadata"]["uid"]]  # again in the next round
            return
        attempt.start()
        for pod in (attempt.head, attempt.worker):
            attempt.hold(pod)
        pod = Pod(self.folder / f"{name}-{body['metadata']['uid'][:8]}", self.volumes)
        driver = self.machine.start_driver(pod, *self._driver_of(attempt, body, pod))
        (owner,) = body["metadata"]["ownerReferences"]
        uids = owner["uid"], body["metadata"]["uid"]
        self.played.append(Played(attempt, *uids, pod, driver))
        attempt.set(jobDeploymentStatus="Running", jobStatus="RUNNING")

    def _is_foreign(self, pod: str, uid: str) -> bool:
        """Return whether the pod exists and is one of a deleted RayJob of the same name."""
        found = self.scene.api.find(f"/api/v1/namespaces/{self.scene.namespace}/pods/{pod}")
        return found is not None and found["metadata"]["ownerReferences"][0]["uid"] != uid

    def _driver_of(
        self, attempt: Attempt, body: Object, pod: Pod
    ) -> tuple[list[str], dict[str, str]]:
        """Return the driver's arguments and environment; its plan and token lie in files beside
        the pod's folder."""
        template = body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        volumes = {v["name"]: v for v in template["volumes"]}
        source = next(v["configMap"]["name"] for v in volumes.values() if "configMap" in v)
        maps = f"/api/v1/namespaces/{self.scene.namespace}/configmaps/{source}"
        (plan,) = self.scene.api("GET", maps)["data"].values()
        pod.folder.parent.mkdir(exist_ok=True)
        plan_file, token_file = (pod.folder.with_suffix(end) for end in (".plan", ".token"))
        plan_file.write_text(plan)
        token_file.write_text(self.scene.token_of(attempt.head, attempt.audience))
        environment = {**attempt.environment, TOKEN_FILE_VARIABLE: str(token_file)}
        arguments = body["spec"]["entrypoint"].split()[3:]  # python -m tuneyard_trainer
        arguments[arguments.index("--plan") + 1] = str(plan_file)
        return arguments, {k: v for k, v in environment.items() if v and k.startswith("TUNEYARD")}

    def _end(self, played: Played) -> None:
        """Report the driver's end, as KubeRay reports the submitter's."""
        time.sleep(random.random() * ORPHAN_SECONDS)
        for process in played.workers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        code = played.pod.exit_code.read_text() if played.pod.exit_code.exists() else "137"
        log = played.pod.log  # a driver that was killed at once has none
        tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        ending = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
        if code == "0":
            ending = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        while not self._write_end(played, {**ending, "message": tail}):
            pass

    def _write_end(self, played: Played, status: Object) -> bool:
        """Write the status of the attempt's RayJob; return False if the RayJob has just changed.
        A new job of the same name may have a RayJob of the same name by now."""
        found = self.scene.api.find(played.attempt.path)
        if found is None or found["metadata"]["uid"] != played.uid:
            return True
        version = {"resourceVersion": found["metadata"]["resourceVersion"]}
        try:
            patch = {"metadata": version, "status": status}
            self.scene.api.merge(f"{played.attempt.path}/status", patch)
        except RefusedError as refused:
            if refused.status != 409:
                raise
            return False
        return True

    def _has_unfinished(self, played: Played) -> bool:
        """Return whether the folder of a write exists that did not become a checkpoint."""
        folder = self.output_of(played.attempt.job)
        return any(folder.glob("stages/*/checkpoints/step-*.partial"))

    def output_of(self, job: Job) -> Path:
        """Return the folder of a job's output, in a folder of the job's own."""
        return self.volumes / "models" / job.name / "out"

    def _delete(self, pod: Object) -> None:
        """End the attempt's processes as a kubelet does: preStop hook, SIGTERM, SIGKILL."""
        owner = pod["metadata"]["ownerReferences"][0]["uid"]
        begun = self._begun.get(owner)
        if begun is not None and not begun.done():
            return
        played = next((each for each in self.played if each.uid == owner), None)
        if played is not None and played.processes:
            if played.draining is None:
                played.draining = threading.Thread(target=_drained, args=[played], daemon=True)
                played.draining.start()
            return
        path = f"/api/v1/namespaces/{self.scene.namespace}/pods/{pod['metadata']['name']}"
        self.scene.api.merge(path, {"metadata": {"finalizers": None}})


def _drained(played: Played) -> None:
    drain.drain(played.pod.drain, GRACE_SECONDS)
    played.kill()
