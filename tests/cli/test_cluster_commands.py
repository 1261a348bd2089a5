"""The commands for a cluster, against a real API server; the tests write the jobs' statuses."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.cli.cluster_jobs import (
    CRDS,
    FAILED,
    PLANNED,
    RUNNING,
    SUCCEEDED,
    WAITING,
    JobNamespace,
    Object,
)
from tuneyard.api.meta import FINALIZER
from tuneyard.cli import cluster_commands, logs, main
from tuneyard.cli.errors import UnreachableError
from tuneyard.cli.jobs import JobView

if TYPE_CHECKING:
    from rig.plugin import Cluster

apiserver_test = pytest.mark.apiserver
Call = Callable[..., tuple[int, str, str]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="module")
def with_crds(apiserver: Cluster) -> Cluster:
    apiserver.define(CRDS)
    return apiserver


@pytest.fixture
def namespace(with_crds: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobNamespace]:
    """Create a namespace for this test in the cluster that KUBECONFIG names."""
    namespace = JobNamespace(with_crds, f"cli-{uuid.uuid4().hex[:8]}")
    namespace.core.create_namespace({"metadata": {"name": namespace.name}})
    monkeypatch.setenv("KUBECONFIG", str(with_crds.kubeconfig))
    yield namespace
    namespace.core.delete_namespace(namespace.name)


@pytest.fixture
def call(namespace: JobNamespace, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Run a command in the test's namespace; return exit code, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.call([*arguments, "-n", namespace.name])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def between_polls(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Call `act` whenever a command waits before it polls again."""
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: act())
    monkeypatch.setattr(cluster_commands, "time", clock)


# ---- status -------------------------------------------------------------------------------------


@apiserver_test
def test_all_jobs_of_both_kinds_are_listed(namespace: JobNamespace, call: Call) -> None:
    namespace.create("one", RUNNING)
    namespace.create("two", WAITING, "AlignmentJob")
    code, out, _ = call("status")
    rows = {line.split()[1]: line.split() for line in out.splitlines()[1:]}
    assert code == 0
    assert rows["one"][:-2] == ["FineTuneJob", "one", "Running", "sft", "41%", "1.235", "34", "min"]
    assert rows["two"][:3] == ["AlignmentJob", "two", "Pending"]
    assert call("status", "--kind", "alignment")[1].count("\n") == 2


@apiserver_test
def test_one_job_is_shown_with_its_stages_attempts_conditions_and_events(
    namespace: JobNamespace, call: Call
) -> None:
    namespace.create("support-bot", RUNNING)
    involved = {"kind": "FineTuneJob", "namespace": namespace.name, "name": "support-bot"}
    event: Object = {
        "metadata": {"name": "e"},
        "involvedObject": {**involved, "uid": namespace.get("support-bot")["metadata"]["uid"]},
        "reason": "AttemptStarted",
        "message": "attempt 2",
        "lastTimestamp": "2026-11-21T00:00:00Z",
    }
    of_another_job = {**event, "metadata": {"name": "f"}, "message": "another job"}
    of_another_job["involvedObject"] = {**involved, "uid": "gone"}
    for one in (event, of_another_job):
        namespace.core.create_namespaced_event(namespace.name, one)
    code, out, _ = call("status", "support-bot")
    assert code == 0
    for words in ("step 430 of 1,200", "40 steps", "WorkerDied", "the job names no queue"):
        assert words in out
    assert "attempt 2" in out
    assert "another job" not in out


@apiserver_test
def test_a_name_that_both_kinds_have_needs_the_kind(namespace: JobNamespace, call: Call) -> None:
    namespace.create("both", RUNNING)
    namespace.create("both", WAITING, "AlignmentJob")
    code, out, err = call("status", "both")
    assert (code, out) == (2, "")
    assert "add --kind finetune or --kind alignment" in err
    code, out, _ = call("status", "both", "--kind", "alignment")
    assert (code, out.split()[:2]) == (0, ["AlignmentJob", "both"])


@apiserver_test
@pytest.mark.parametrize("verb", ["status", "logs", "suspend", "resume", "cancel", "delete"])
def test_a_misspelled_name_gets_a_suggestion(
    verb: str, namespace: JobNamespace, call: Call
) -> None:
    namespace.create("support-bot", RUNNING)
    code, out, err = call(verb, "suport-bot")
    assert (code, out) == (2, "")
    assert f"no job 'suport-bot' in namespace {namespace.name}: did you mean" in err
    assert namespace.policy("support-bot")["suspend"] is False


@apiserver_test
def test_json_holds_the_stored_status(namespace: JobNamespace, call: Call) -> None:
    namespace.create("one", SUCCEEDED)
    code, out, _ = call("status", "one", "--json")
    assert code == 0
    assert json.loads(out)["status"] == namespace.get("one")["status"]
    assert json.loads(out)["finished"] is True
    listed = json.loads(call("status", "--json")[1])
    assert [job["name"] for job in listed] == ["one"]


@apiserver_test
def test_an_empty_namespace_is_reported_and_is_not_an_error(call: Call) -> None:
    code, out, err = call("status")
    assert (code, out) == (0, "")
    assert "there are no jobs in namespace cli-" in err


@apiserver_test
@pytest.mark.parametrize(("end", "expected"), [(SUCCEEDED, 0), (FAILED, 1)], ids=["ok", "failed"])
def test_watch_prints_only_changes_and_ends_with_the_job(
    end: Object, expected: int, namespace: JobNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.create("one", WAITING)
    further = {**RUNNING, "progress": {**RUNNING["progress"], "step": 431}}

    statuses = iter([RUNNING, RUNNING, further, end])
    between_polls(monkeypatch, lambda: namespace.set_status("one", next(statuses)))
    code, out, _ = call("status", "one", "--watch")
    assert code == expected
    lines = out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "Pending",
        "Running",
        "Running",
        end["phase"],
    ]
    assert "step 431" in lines[2]


@apiserver_test
def test_watch_of_a_job_that_is_deleted_ends_with_2(
    namespace: JobNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        namespace.delete("one")
        namespace.create("one", SUCCEEDED)

    namespace.create("one", RUNNING)
    between_polls(monkeypatch, replace)
    code, out, err = call("status", "one", "--watch", "--json")
    assert (code, err) == (2, "Error: FineTuneJob one was deleted\n"), "a new job has its name"
    assert [json.loads(line)["status"]["phase"] for line in out.splitlines()] == ["Running"]


@apiserver_test
def test_watch_continues_after_an_unreachable_api_server(
    namespace: JobNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneyard.cli.cluster import Cluster as Connection

    refresh, unreachable = Connection.refresh, iter([True, True])

    def sometimes(self: Connection, job: JobView) -> JobView | None:
        if next(unreachable, False):
            raise UnreachableError("the API server cannot be reached")
        return refresh(self, job)

    namespace.create("one", RUNNING)
    monkeypatch.setattr(Connection, "refresh", sometimes)
    between_polls(monkeypatch, lambda: namespace.set_status("one", SUCCEEDED))
    code, out, err = call("status", "one", "--watch")
    assert (code, out.count("\n")) == (0, 2)
    assert err == "the API server cannot be reached; retrying\n", "printed once"


# ---- run policy ---------------------------------------------------------------------------------


@apiserver_test
def test_suspend_and_resume_change_the_policy_once(namespace: JobNamespace, call: Call) -> None:
    namespace.create("one", RUNNING, spec__runPolicy={"maxAttempts": 7})
    assert "write a checkpoint and release its pods" in call("suspend", "one")[1]
    generation = namespace.get("one")["metadata"]["generation"]
    code, out, _ = call("suspend", "one")
    assert (code, "already being suspended" in out) == (0, True)
    assert namespace.get("one")["metadata"]["generation"] == generation
    assert namespace.policy("one") | {"suspend": True, "maxAttempts": 7} == namespace.policy("one")
    namespace.set_status(
        "one", {**RUNNING, "phase": "Suspended", "attempts": RUNNING["attempts"][:1]}
    )
    assert "one will continue from its last checkpoint, as attempt 2" in call("resume", "one")[1]
    assert namespace.policy("one")["suspend"] is False
    namespace.set_status("one", RUNNING)
    code, out, _ = call("resume", "one")
    assert (code, out) == (0, "one is not suspended; its phase is Running\n")


@apiserver_test
def test_a_job_that_has_not_started_can_be_suspended(namespace: JobNamespace, call: Call) -> None:
    namespace.create("one")
    assert call("suspend", "one")[1] == "one will not start; resume it with `tuneyard resume one`\n"
    assert "one will start with its first stage, as attempt 1" in call("resume", "one")[1]


@apiserver_test
@pytest.mark.parametrize("status", [SUCCEEDED, FAILED], ids=["succeeded", "failed"])
@pytest.mark.parametrize("verb", ["suspend", "resume", "cancel"])
def test_a_finished_job_is_not_changed(
    verb: str, status: Object, namespace: JobNamespace, call: Call
) -> None:
    namespace.create("one", status)
    spec = namespace.get("one")["spec"]
    code, out, err = call(verb, "one", *(["--yes"] if verb == "cancel" else []))
    assert (code, out) == (2, "")
    assert f"one has ended with phase {status['phase']} and cannot be" in err
    assert namespace.get("one")["spec"] == spec


@apiserver_test
def test_cancel_needs_a_confirmation_and_cannot_be_undone(
    namespace: JobNamespace, call: Call
) -> None:
    namespace.create("one", RUNNING)
    code, out, err = call("cancel", "one")
    assert (code, out) == (2, "")
    assert "add --yes" in err
    assert namespace.policy("one")["cancel"] is False
    assert "end with phase Failed and reason Canceled" in call("cancel", "one", "--yes")[1]
    assert namespace.policy("one")["cancel"] is True
    assert call("cancel", "one") == (0, "one is being canceled already\n", "")
    assert call("suspend", "one")[0] == call("resume", "one")[0] == 2
    canceled = {**FAILED, "failure": {"reason": "Canceled", "message": "m"}}
    namespace.set_status("one", canceled)
    assert call("cancel", "one") == (0, "one was canceled already\n", "")


@apiserver_test
def test_delete_prints_whether_the_output_is_kept(namespace: JobNamespace, call: Call) -> None:
    namespace.create("kept", RUNNING)
    namespace.create("erased", SUCCEEDED, spec__output__deletionPolicy="Delete")
    assert "its output stays at file://out" in call("delete", "kept")[1]
    assert "is deleted too" in call("delete", "erased", "--wait")[1]
    assert call("status", "erased")[0] == 2


@apiserver_test
def test_delete_with_wait_returns_once_the_operator_has_cleaned_up(
    namespace: JobNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "STUCK_SECONDS", 0)
    namespace.create("one", RUNNING, metadata__finalizers=["tuneyard.io/cleanup"])
    assert call("delete", "one")[0] == 0
    assert "Running, being deleted" in call("status")[1]
    assert call("suspend", "one")[0] == 2
    between_polls(monkeypatch, lambda: namespace.remove_finalizers("one"))
    code, out, err = call("delete", "one", "--wait")
    assert (code, out) == (0, "one is already being deleted\none was deleted\n")
    assert "check that the operator runs" in err
    assert "`tuneyard delete --force one` does not wait" in err


POD = {
    "metadata": {
        "name": "one-1-worker",
        "labels": {
            "tuneyard.io/kind": "FineTuneJob",
            "tuneyard.io/job": "one",
            "tuneyard.io/attempt": "1",
            "ray.io/node-type": "worker",
        },
        "finalizers": ["tests.tuneyard.io/hold"],
    },
    "spec": {"schedulerName": "nobody", "containers": [{"name": "ray-worker", "image": "i"}]},
}


@apiserver_test
def test_delete_with_wait_waits_for_the_pods_of_a_job_that_is_gone(
    namespace: JobNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "STUCK_SECONDS", 0)
    namespace.create("one", RUNNING)
    namespace.core.create_namespaced_pod(namespace.name, POD)
    between_polls(monkeypatch, lambda: namespace.remove_pod("one-1-worker"))
    code, out, err = call("delete", "one", "--wait")
    assert (code, out.splitlines()[-1]) == (0, "one was deleted")
    assert "pods one-1-worker of one still exist: check whether a node was lost" in err


@apiserver_test
def test_delete_with_force_says_what_stays_behind_and_removes_the_job(
    namespace: JobNamespace, call: Call
) -> None:
    held = [FINALIZER, "foregroundDeletion"]
    erased = {"spec__output__deletionPolicy": "Delete", "metadata__finalizers": held}
    namespace.create("one", RUNNING, **erased)
    namespace.core.create_namespaced_pod(namespace.name, POD)
    assert call("delete", "one")[0] == 0
    code, out, err = call("delete", "one", "--force")
    assert (code, "add --yes" in err) == (2, True)
    assert namespace.get("one"), "nothing is deleted without a confirmation"
    code, out, _ = call("delete", "one", "--force", "--yes")
    assert (code, out.splitlines()) == (
        0,
        [
            "one is deleted without waiting; this stays behind:",
            "- the output at file://out is not erased: remove it by hand",
            "- RayJob support-bot-2, until its pods are removed",
            "- pods one-1-worker: Kubernetes removes them when their nodes respond or are deleted",
            "one was deleted",
        ],
    )
    assert call("status", "one")[0] == 2
    namespace.remove_pod("one-1-worker")


@apiserver_test
def test_delete_with_force_keeps_the_finalizers_of_other_controllers(
    namespace: JobNamespace, call: Call
) -> None:
    namespace.create("one", RUNNING, metadata__finalizers=[FINALIZER, "example.com/audit"])
    code, _, err = call("delete", "one", "--force", "--yes")
    assert (code, "example.com/audit" in err) == (2, True)
    assert namespace.get("one")["metadata"]["finalizers"] == ["example.com/audit"]
    namespace.remove_finalizers("one")


def test_delete_with_force_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.call(["delete", "one", "--force", "--wait"]) == 2
    assert "--wait cannot be combined with --force" in capsys.readouterr().err


# ---- logs ---------------------------------------------------------------------------------------


@apiserver_test
@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (FAILED, [], "attempt 1: OutOfMemory: the worker was killed"),
        (FAILED, ["--follow"], "attempt 1: OutOfMemory: the worker was killed"),
        (RUNNING, ["--attempt", "1"], "attempt 1: WorkerDied, in sft after step 400"),
        (RUNNING, ["--attempt", "3"], "one has no attempt 3: the last one is 2"),
        (WAITING, ["--worker"], "no node can take the worker pod"),
        (PLANNED, [], "there is no log of one"),
    ],
    ids=["gone", "follow", "earlier", "never", "waiting", "planned"],
)
def test_without_a_log_the_message_shows_the_outcomes_in_the_status(
    status: Object, arguments: list[str], words: str, namespace: JobNamespace, call: Call
) -> None:
    namespace.create("one", status)
    code, out, err = call("logs", "one", *arguments)
    assert (code, out) == (2, "")
    assert words in err


@apiserver_test
def test_a_pod_that_has_not_started_has_no_log(namespace: JobNamespace, call: Call) -> None:
    namespace.create("one", WAITING)
    labels = {"tuneyard.io/kind": "FineTuneJob", "tuneyard.io/job": "one"}
    pod = {
        "metadata": {"name": "one-1-x", "labels": {**labels, "tuneyard.io/attempt": "1"}},
        "spec": {
            "automountServiceAccountToken": False,
            "serviceAccountName": "runner",
            "nodeSelector": {"no": "such-node"},
            "containers": [{"name": "ray-job-submitter", "image": "x"}],
        },
    }
    account = {"metadata": {"name": "runner"}}  # the default one may not be there yet
    namespace.core.create_namespaced_service_account(namespace.name, account)
    namespace.core.create_namespaced_pod(namespace.name, pod)
    code, out, err = call("logs", "one")
    assert (code, out) == (2, "")
    assert "there is no log of one: the job has no started driver" in err


# ---- errors of the cluster ----------------------------------------------------------------------


@apiserver_test
def test_a_user_without_rights_gets_the_missing_right(
    namespace: JobNamespace, tmp_path: Path, call: Call
) -> None:
    token = token_of(namespace, "nobody")
    config = json.loads(namespace.cluster.kubectl("config", "view", "--raw", "-o", "json").stdout)
    for user in config["users"]:
        user["user"] = {"token": token}
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config), encoding="utf-8")
    code, out, err = call("status", "--kubeconfig", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'cannot list resource "finetunejobs"' in err
    path.write_text(json.dumps(config).replace(token, "bogus"), encoding="utf-8")
    code, _, err = call("status", "--kubeconfig", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert "does not accept your credentials" in err


@apiserver_test
def test_in_a_pod_its_service_account_and_namespace_are_used(
    namespace: JobNamespace, no_cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from kubernetes.config import incluster_config

    from tuneyard.cli import cluster as connection

    command = ("config", "view", "--raw", "--flatten", "-o", "json")
    server = json.loads(namespace.cluster.kubectl(*command).stdout)["clusters"][0]["cluster"]
    address = urlsplit(server["server"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
    files = {name: no_cluster / name for name in ("token", "ca.crt", "namespace")}
    files["token"].write_text(token_of(namespace, "runner"), encoding="utf-8")
    files["ca.crt"].write_bytes(base64.b64decode(server["certificate-authority-data"]))
    files["namespace"].write_text(namespace.name, encoding="utf-8")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(files["token"]))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(files["ca.crt"]))
    monkeypatch.setattr(connection, "NAMESPACE_FILE", files["namespace"])
    message = refused(capsys, "status")
    assert f'User "system:serviceaccount:{namespace.name}:runner" cannot list' in message
    assert f'in the namespace "{namespace.name}"' in message


def token_of(namespace: JobNamespace, account: str) -> str:
    """Return a token of a new service account without rights."""
    body = {"metadata": {"name": account}}
    namespace.core.create_namespaced_service_account(namespace.name, body)
    create = namespace.core.create_namespaced_service_account_token
    token: str = create(account, namespace.name, {"spec": {"audiences": []}}).status.token
    return token


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a home folder without a kubeconfig, outside of any pod."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refused(capsys: Capture, *arguments: str) -> str:
    """Return the message of a command that exits with 2 and prints one line."""
    assert main.call(list(arguments)) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


@pytest.mark.parametrize("verb", ["status", "logs", "suspend", "resume", "cancel", "delete"])
def test_without_a_kubeconfig_every_command_prints_how_to_name_one(
    verb: str, no_cluster: Path, capsys: Capture
) -> None:
    assert "set KUBECONFIG or give --kubeconfig" in refused(capsys, verb, "one")
    path = str(no_cluster / "missing")
    assert f"{path} does not exist" in refused(capsys, verb, "one", "--kubeconfig", path)


def kubeconfig(folder: Path, server: str) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": server}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "namespace": "of-context"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "kind: Config\n"])
def test_a_broken_kubeconfig_is_named(text: str, no_cluster: Path, capsys: Capture) -> None:
    path = no_cluster / "kubeconfig"
    path.write_text(text, encoding="utf-8")
    message = refused(capsys, "status", "--kubeconfig", str(path))
    assert f"the kubeconfig {path} cannot be used" in message


def test_an_unknown_context_is_refused(no_cluster: Path, capsys: Capture) -> None:
    path = kubeconfig(no_cluster, "http://127.0.0.1:1")
    message = refused(capsys, "status", "--kubeconfig", path, "--context", "b")
    assert "the kubeconfig has no context 'b': its contexts are a" in message


def test_an_unreachable_api_server_is_named(no_cluster: Path, capsys: Capture) -> None:
    path = kubeconfig(no_cluster, "http://127.0.0.1:1")
    message = refused(capsys, "status", "--kubeconfig", path)
    assert "http://127.0.0.1:1 cannot be reached" in message
    assert "Connection refused" in message


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (404, "404 page not found\n", "does not have Tuneyard's CRDs: install the chart"),
        (503, '{"message": "upgrading"}', "is not available (503): upgrading"),
        (429, "", "is not available (429)"),
        (200, "<html>", "does not respond like a Kubernetes API server"),
        (400, "[]", "the API server refused the request"),
    ],
)
def test_every_response_of_a_server_becomes_one_message(
    code: int,
    body: str,
    words: str,
    no_cluster: Path,
    capsys: Capture,
) -> None:
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = kubeconfig(no_cluster, f"http://127.0.0.1:{server.server_port}")
        message = refused(capsys, "status", "--kubeconfig", path)
        server.shutdown()
    assert words in message
    assert paths == ["/apis/tuneyard.io/v1alpha1/namespaces/of-context/finetunejobs?limit=500"], (
        "the context's namespace, requested once"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "../x"],
        ["status", "a/b"],
        ["status", "one\n"],
        ["status", "--watch"],
        ["status", "one", "-A"],
        ["status", "-n", "../kube-system"],
        ["logs", "one", "--attempt", "0"],
        ["delete"],
        ["suspend", "one", "--kind", "other"],
    ],
    ids=repr,
)
def test_wrong_usage_is_refused_before_any_request(
    arguments: list[str], no_cluster: Path, capsys: Capture
) -> None:
    assert main.call(arguments) == 2
    assert "KUBECONFIG" not in capsys.readouterr().err


def test_without_the_client_the_message_names_the_extra(
    no_cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.split(".")[0] == "kubernetes":
                raise ModuleNotFoundError("No module named 'kubernetes'", name="kubernetes")

    for name in list(sys.modules):
        if name.split(".")[0] == "kubernetes" or name == "tuneyard.cli.cluster":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    message = refused(capsys, "status")
    assert "kubernetes is not installed: install tuneyard[operator]" in message
