"""A cache on a claim: what the processes of several pods get from it, and what they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.storage.fake_hub import TOKEN, FakeHub, fake_hub

POD = """
import errno, fcntl, json, sys
from pathlib import Path
from tuneyard.api.plan import SourceInput
from tuneyard.errors import StageError
from tuneyard_trainer.storage import sources

root, uri, kind, locks = sys.argv[1:]

def no_locks(*_):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")

if locks == "none":
    fcntl.flock = no_locks
if locks == "blind":
    fcntl.flock = lambda *_: None  # that no other node sees
sources.PVC_ROOT = Path(root)
try:
    source = SourceInput(uri=uri, path="spec.data.train[0].uri")
    cache = Path(root, "cache", ".tuneyard-cache")
    path = sources.fetch(source, base_dir=Path("/"), cache_dir=cache, kind=kind)
    files = {name: file.read_text() for name, file in sources.files_under(path)}
    print(json.dumps({"path": str(path), "files": files}))
except StageError as error:
    print(json.dumps({"reason": error.reason, "retryable": error.retryable, "text": str(error)}))
"""
MODEL, DATA = "hf://org/model", "hf://datasets/org/data/train.jsonl"


def start(
    root: Path, uri: str, kind: str = "data", *, locks: str = "all", **environment: str
) -> subprocess.Popen[str]:
    """Start a process that fetches a source as a pod of a job does."""
    own = {"HF_HOME": str(root / "home"), "PATH": os.environ["PATH"]}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", POD, str(root), uri, kind, locks],
        env={**own, **paths, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=120)
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as served:
        yield served


class TestGatedRepositories:
    @pytest.mark.parametrize(("uri", "kind"), [(MODEL, "model"), (DATA, "data")])
    def test_only_a_token_that_may_read_it_gets_it_from_the_cache(
        self, tmp_path: Path, hub: FakeHub, uri: str, kind: str
    ) -> None:
        hub.downloads.clear()

        def pod(token: str | None, endpoint: str = hub.url) -> dict[str, Any]:
            tokens = {"HF_TOKEN": token} if token else {}
            return result(start(tmp_path, uri, kind, HF_ENDPOINT=endpoint, **tokens))

        assert pod(None)["reason"] == "SourceForbidden"
        first = pod(TOKEN)
        assert first["files"]
        once = list(hub.downloads)
        assert pod(TOKEN) == first
        for token in (None, "hf_other"):
            refused = pod(token)
            assert (refused["reason"], refused["retryable"]) == ("SourceForbidden", False)
            assert "tokenSecret" in refused["text"]
        unreachable = pod(TOKEN, "http://127.0.0.1:1")
        assert (unreachable["reason"], unreachable["retryable"]) == ("SourceUnavailable", True)
        assert hub.downloads == once
        assert sorted(once) == sorted(first["files"])
        assert "pytorch_model.bin" not in once


class TestObjectsThatMayOnlyBeListed:
    """In S3, the right to list a folder is another one than that to read its objects."""

    @pytest.fixture(scope="class")
    def users(self) -> Iterator[dict[str, dict[str, str]]]:
        """The environments of a user who may read the bucket and of one who may only list it."""
        import boto3
        import moto.settings
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        url = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        options: Any = {"endpoint_url": url, "region_name": "us-east-1", **keys}
        store, iam = boto3.client("s3", **options), boto3.client("iam", **options)
        store.create_bucket(Bucket="guarded")
        for name in ("a.jsonl", "deep/b.jsonl"):
            store.put_object(Bucket="guarded", Key=f"rows/{name}", Body=name.encode())
        environments = {}
        for user, actions in (("reader", ["s3:*"]), ("lister", ["s3:ListBucket"])):
            statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            iam.create_user(UserName=user)
            iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=policy)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            environments[user] = {
                "AWS_ENDPOINT_URL": url,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # check rights now
            yield environments
        server.stop()

    @pytest.mark.parametrize("uri", ["s3://guarded/rows", "s3://guarded/rows/*.jsonl"])
    def test_the_cache_does_not_show_them(
        self, tmp_path: Path, users: dict[str, dict[str, str]], uri: str
    ) -> None:
        first = result(start(tmp_path, uri, **users["reader"]))
        assert first["files"]["a.jsonl"] == "a.jsonl"
        assert result(start(tmp_path, uri, **users["reader"])) == first
        assert result(start(tmp_path, uri, **users["lister"]))["reason"] == "SourceForbidden"


BODY = b"1234567890" * 20_000


class SlowSite(BaseHTTPRequestHandler):
    """Serves BODY in parts, so that processes download at the same time; counts GETs."""

    gets = 0
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("ETag", '"v1"')
        self.end_headers()

    def do_GET(self) -> None:
        type(self).gets += 1
        self.do_HEAD()
        for start_at in range(0, len(BODY), 10_000):
            self.wfile.write(BODY[start_at : start_at + 10_000])
            time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    SlowSite.gets = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowSite)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/train.txt"
    server.shutdown()
    server.server_close()


def hidden_folders(root: Path) -> list[str]:
    return [path.name for path in (root / "cache/.tuneyard-cache/sources").glob(".partial-*")]


class TestPodsThatAskAtOnce:
    def test_one_downloads_and_the_others_wait_for_it(self, tmp_path: Path, site: str) -> None:
        found = [result(each) for each in [start(tmp_path, site) for _ in range(2)]]
        assert [each["files"] for each in found] == [{"train.txt": BODY.decode()}] * 2
        assert found[0]["path"] == found[1]["path"]
        assert SlowSite.gets == 1

    @pytest.mark.parametrize("locks", ["none", "blind"])
    def test_without_locks_each_downloads_and_all_get_the_whole_file(
        self, tmp_path: Path, site: str, locks: str
    ) -> None:
        found = [result(each) for each in [start(tmp_path, site, locks=locks) for _ in range(2)]]
        assert [each["files"] for each in found] == [{"train.txt": BODY.decode()}] * 2
        assert found[0]["path"] == found[1]["path"]
        assert SlowSite.gets == 2, "they did not download at the same time"
        assert hidden_folders(tmp_path) == []
        assert result(start(tmp_path, site, locks=locks)) == found[0]
        assert SlowSite.gets == 2

    def test_a_killed_one_leaves_nothing_that_another_takes_for_whole(
        self, tmp_path: Path, site: str
    ) -> None:
        killed = start(tmp_path, site)
        while not any(path.stat().st_size for path in tmp_path.rglob("train.txt")):
            time.sleep(0.05)
        killed.kill()
        killed.communicate()
        (left,) = hidden_folders(tmp_path)
        assert result(start(tmp_path, site))["files"] == {"train.txt": BODY.decode()}
        assert hidden_folders(tmp_path) == [left], "its process may be alive on another node"
