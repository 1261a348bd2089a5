"""Fetching sources and its errors, and the digests of content."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from tuneyard.api.plan import SourceInput
from tuneyard.api.sources import SecretKeyRef
from tuneyard.errors import StageError
from tuneyard_trainer.storage import digests, sources
from tuneyard_trainer.storage.sources import decisive_digest, digest_of, fetch


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "manifest").mkdir()
    return tmp_path


def get(here: Path, uri: str, kind: sources.Kind = "data", **fields: Any) -> Path:
    fields.setdefault("path", "spec.data.train[0].uri")
    return fetch(
        SourceInput(uri=uri, **fields),
        base_dir=here / "manifest",
        cache_dir=here / "cache",
        kind=kind,
    )


def refusal(here: Path, uri: str, kind: sources.Kind = "data", **fields: Any) -> StageError:
    with pytest.raises(StageError) as caught:
        get(here, uri, kind, **fields)
    return caught.value


def put(path: Path, text: str = "hello") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestFiles:
    def test_a_relative_path_is_relative_to_the_manifests_folder(self, here: Path) -> None:
        file = put(here / "manifest/data/a.jsonl")
        assert get(here, "file://data/a.jsonl") == file

    def test_an_absolute_path_is_used_unchanged(self, here: Path) -> None:
        file = put(here / "elsewhere/a.jsonl")
        assert get(here, f"file://{file}") == file

    def test_percent_20_stands_for_a_space(self, here: Path) -> None:
        file = put(here / "manifest/my data.jsonl")
        assert get(here, "file://my%20data.jsonl") == file

    def test_a_tilde_is_not_the_home_folder(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(here / "home/a.jsonl")
        monkeypatch.setenv("HOME", str(here / "home"))
        assert refusal(here, "file://~/a.jsonl").reason == "SourceNotFound"

    def test_a_glob_of_data_is_returned_as_a_glob(self, here: Path) -> None:
        put(here / "manifest/data/b.jsonl")
        put(here / "manifest/data/a.jsonl")
        put(here / "manifest/data/c.csv")
        path = get(here, "file://data/*.jsonl")
        assert [name for name, _ in sources.files_under(path)] == ["a.jsonl", "b.jsonl"]

    def test_a_glob_without_a_match_is_not_found(self, here: Path) -> None:
        error = refusal(here, "file://data/*.jsonl")
        assert error.reason == "SourceNotFound"
        assert "matches no file" in error.message

    def test_a_glob_is_not_accepted_as_a_model(self, here: Path) -> None:
        put(here / "manifest/models/a/config.json")
        assert refusal(here, "file://models/*", kind="model").reason == "SourceNotFound"

    def test_a_missing_file_names_the_uri_and_the_field(self, here: Path) -> None:
        error = refusal(here, "file://nowhere.jsonl", path="spec.data.train[3].uri")
        assert error.reason == "SourceNotFound"
        assert "file://nowhere.jsonl" in error.message
        assert "spec.data.train[3].uri" in error.advice
        assert not error.retryable

    def test_an_unreadable_file_is_forbidden(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(here / "manifest/a.jsonl")
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert refusal(here, "file://a.jsonl").reason == "SourceForbidden"


class TestClaims:
    def test_a_mounted_claim_is_read_in_place(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "PVC_ROOT", here / "mnt")
        file = put(here / "mnt/data/sub/a.jsonl")
        assert get(here, "pvc://data/sub/a.jsonl") == file
        assert refusal(here, "pvc://data/b.jsonl").reason == "SourceNotFound"

    @pytest.mark.parametrize(
        "uri",
        [
            "pvc://mine/../theirs/a.jsonl",
            "pvc://mine/%2e%2e/theirs/a.jsonl",
            "pvc://mine/%2e%2e%2ftheirs/a.jsonl",
            "pvc://../mnt/theirs/a.jsonl",
        ],
    )
    def test_a_path_that_leaves_the_claim_is_refused(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, uri: str
    ) -> None:
        monkeypatch.setattr(sources, "PVC_ROOT", here / "mnt")
        put(here / "mnt/mine/a.jsonl")
        put(here / "mnt/theirs/a.jsonl")
        error = refusal(here, uri)
        assert error.reason == "SourceNotFound"
        assert "is outside of the claim" in error.message

    @pytest.mark.parametrize("name", [".tuneyard-cache", "%2etuneyard-cache"])
    def test_the_cache_of_all_jobs_is_no_source(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """What lies there was downloaded with the credentials of other jobs."""
        monkeypatch.setattr(sources, "PVC_ROOT", here / "mnt")
        put(here / "mnt/mine/.tuneyard-cache/sources/key/a.jsonl")
        for path in ("key/a.jsonl", "*/a.jsonl"):
            assert refusal(here, f"pvc://mine/{name}/sources/{path}").reason == "SourceForbidden"

    def test_a_claim_without_a_cluster_is_an_error_that_suggests_a_file_uri(
        self, here: Path
    ) -> None:
        error = refusal(here, "pvc://no-such-claim/a.jsonl")
        assert error.reason == "SourceUnavailable"
        assert "need a cluster" in error.message
        assert "file://" in error.advice
        assert not error.retryable


class TestPackages:
    @pytest.fixture(autouse=True)
    def package(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put(here / "site/tuneyard_sample/__init__.py", "raise SystemExit('imported')")
        put(here / "site/tuneyard_sample/models/m.gguf")
        put(here / "site/secret.txt")
        monkeypatch.syspath_prepend(str(here / "site"))

    def test_a_packages_file_is_found_without_importing_the_package(self, here: Path) -> None:
        file = get(here, "pkg://tuneyard_sample/models/m.gguf", kind="model")
        assert file == here / "site/tuneyard_sample/models/m.gguf"
        assert "tuneyard_sample" not in sys.modules

    @pytest.mark.parametrize("name", ["../secret.txt", "nothing.gguf", ""])
    def test_only_files_inside_the_package_are_found(self, here: Path, name: str) -> None:
        assert refusal(here, f"pkg://tuneyard_sample/{name}").reason == "SourceNotFound"

    @pytest.mark.parametrize("package", ["no_such_package", "tuneyard_sample.models", "a-b"])
    def test_a_package_that_is_not_installed_is_named(self, here: Path, package: str) -> None:
        error = refusal(here, f"pkg://{package}/m.gguf")
        assert error.reason == "SourceNotFound"
        assert "not installed" in error.message
        assert "tuneyard_sample" not in sys.modules


class TestHubModels:
    def test_only_safe_files_of_the_given_revision_are_requested(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}

        def snapshot(repo: str, **options: Any) -> str:
            asked.update(options, repo=repo)
            return str(put(here / "hub/model.safetensors").parent)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        path = get(here, "hf://org/name", "model", revision="abc")
        assert path == here / "hub"
        assert (asked["repo"], asked["revision"], asked["token"]) == ("org/name", "abc", None)
        names = ["config.json", "tokenizer.model", "a.bin", "a.pt", "a.py", "README.md", "x/a.json"]
        kept = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
        assert list(kept) == ["config.json", "tokenizer.model", "README.md"]

    def test_pickle_only_weights_are_refused(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = str(put(here / "hub/config.json").parent)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: folder)
        error = refusal(here, "hf://org/name", "model", path="spec.model.uri")
        assert error.reason == "NoSafetensors"
        assert "pickled" in error.message
        assert "spec.model.uri" in error.advice

    def test_a_uri_can_name_one_gguf_file(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = str(put(here / "hub/q4.gguf").parent)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: folder)
        assert get(here, "hf://org/name/q4.gguf", "model") == here / "hub/q4.gguf"

    def test_the_token_comes_from_the_secrets_variable(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens: list[str] = []
        folder = str(put(here / "hub/model.safetensors").parent)
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda *_, token, **__: tokens.append(token) or folder,
        )
        secret = SecretKeyRef(name="hub-access", key="token")
        monkeypatch.setenv("HF_TOKEN", "general")
        get(here, "hf://org/name", "model", token_secret=secret)
        monkeypatch.setenv("TUNEYARD_SECRET_HUB_ACCESS_TOKEN", "special")
        get(here, "hf://org/name", "model", token_secret=secret)
        assert tokens == ["general", "special"]

    def test_a_named_token_that_is_not_set_is_an_error(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        secret = SecretKeyRef(name="hf", key="token")
        error = refusal(here, "hf://o/n", "model", token_secret=secret, path="spec.model.uri")
        assert error.reason == "SourceForbidden"
        assert "TUNEYARD_SECRET_HF_TOKEN" in error.message
        assert "spec.model.tokenSecret" in error.advice

    @pytest.mark.parametrize(
        ("make", "reason", "retryable", "advised"),
        [
            (lambda: answer(hub.GatedRepoError, 403), "SourceForbidden", False, "tokenSecret"),
            (lambda: answer(hub.RepositoryNotFoundError, 401), "SourceNotFound", False, "HF_TOKEN"),
            (lambda: answer(hub.RevisionNotFoundError, 404), "SourceNotFound", False, ".revision"),
            (lambda: answer(hub.HfHubHTTPError, 503), "SourceUnavailable", True, "network"),
            (lambda: answer(hub.HfHubHTTPError, 429), "SourceUnavailable", True, "network"),
            (lambda: answer(hub.HfHubHTTPError, 403), "SourceForbidden", False, "tokenSecret"),
            (lambda: hub.LocalEntryNotFoundError("no net"), "SourceUnavailable", True, "network"),
            (lambda: hub.HFValidationError("bad name"), "SourceNotFound", False, "spec.model.uri"),
        ],
    )
    def test_each_error_of_the_hub_has_its_reason_and_advice(
        self,
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
        make: Any,
        reason: str,
        retryable: bool,
        advised: str,
    ) -> None:
        def fail(*args: Any, **options: Any) -> str:
            raise make()

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        error = refusal(here, "hf://org/name", "model", path="spec.model.uri")
        assert (error.reason, error.retryable) == (reason, retryable)
        assert "hf://org/name" in error.message
        assert advised in error.advice

    def test_a_full_disk_is_reported(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **options: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        assert refusal(here, "hf://org/name", "model").reason == "DiskFull"

    def test_an_error_of_tuneyards_own_code_is_not_converted(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **options: Any) -> str:
            raise TypeError("a bug")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(TypeError):
            get(here, "hf://org/name", "model")

    def test_hub_data_must_name_datasets(self, here: Path) -> None:
        error = refusal(here, "hf://org/name/train.jsonl", "data")
        assert "hf://datasets/ORG/NAME/FILE" in error.message


def answer(cls: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
    import httpx2

    request = httpx2.Request("GET", "http://hub.invalid")
    return cls("the hub said no", response=httpx2.Response(status, request=request))


class FakeHubFiles:
    """The hub's file system at its boundary."""

    protocol = "hf"

    def __init__(self, **options: Any) -> None:
        assert options == {"token": None, "skip_instance_cache": True}

    def info(self, path: str) -> dict[str, Any]:
        if path != "datasets/org/name/train.jsonl":
            error = FileNotFoundError(path)
            error.__cause__ = answer(hub.RepositoryNotFoundError, 404)
            raise error
        return {"name": path, "type": "file", "size": 2, "blob_id": "b1"}

    def get(self, remote: list[str], local: list[str]) -> None:
        assert remote == ["datasets/org/name/train.jsonl"]
        Path(local[0]).write_text("{}")


class TestHubData:
    def test_a_file_of_a_hub_data_set_keeps_its_name(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", FakeHubFiles)
        path = get(here, "hf://datasets/org/name/train.jsonl")
        assert (path.name, path.read_text()) == ("train.jsonl", "{}")

    def test_a_missing_hub_data_set_is_not_found_or_private(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", FakeHubFiles)
        error = refusal(here, "hf://datasets/org/other/train.jsonl")
        assert error.reason == "SourceNotFound"
        assert "spec.data.train[0].tokenSecret" in error.advice


@pytest.fixture(scope="module")
def store() -> Iterator[SimpleNamespace]:
    """An S3 server on loopback, and a client to fill it with."""
    import boto3
    from moto.server import ThreadedMotoServer

    variables = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    variables.setenv("AWS_ACCESS_KEY_ID", "testing")
    variables.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    variables.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")
    yield SimpleNamespace(client=client)
    server.stop()
    variables.undo()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The remote path of each file that s3fs downloads."""
    import s3fs

    done: list[str] = []
    original = s3fs.S3FileSystem._get_file

    async def counted(self: Any, rpath: str, lpath: str, **options: Any) -> None:
        done.append(rpath)
        await original(self, rpath, lpath, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", counted)
    return done


class TestObjectStores:
    def test_an_object_is_downloaded_again_only_after_it_changes(
        self, here: Path, store: SimpleNamespace, downloads: list[str]
    ) -> None:
        store.client.put_object(Bucket="bucket", Key="once/a.jsonl", Body=b"one")
        first = get(here, "s3://bucket/once/a.jsonl")
        assert (first.name, first.read_text()) == ("a.jsonl", "one")
        assert get(here, "s3://bucket/once/a.jsonl") == first
        assert downloads == ["bucket/once/a.jsonl"]
        store.client.put_object(Bucket="bucket", Key="once/a.jsonl", Body=b"two")
        assert get(here, "s3://bucket/once/a.jsonl").read_text() == "two"
        assert len(downloads) == 2

    def test_objects_with_one_content_are_downloaded_once(
        self, here: Path, store: SimpleNamespace, downloads: list[str]
    ) -> None:
        for folder in ("here", "there", "other"):
            store.client.put_object(Bucket="bucket", Key=f"{folder}/a.jsonl", Body=b"same")
        store.client.put_object(Bucket="bucket", Key="other/a.jsonl", Body=b"else")
        first = get(here, "s3://bucket/here/a.jsonl")
        assert get(here, "s3://bucket/there/a.jsonl") == first
        assert get(here, "s3://bucket/other/a.jsonl").read_text() == "else"
        assert downloads == ["bucket/here/a.jsonl", "bucket/other/a.jsonl"]

    def test_an_object_that_changes_during_its_download_gets_no_other_objects_name(
        self, here: Path, store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import s3fs

        for folder in ("changed", "copy"):
            store.client.put_object(Bucket="bucket", Key=f"{folder}/a.jsonl", Body=b"one")
        original = s3fs.S3FileSystem._get_file

        async def late(self: Any, rpath: str, lpath: str, **options: Any) -> None:
            store.client.put_object(Bucket="bucket", Key="changed/a.jsonl", Body=b"two")
            await original(self, rpath, lpath, **options)

        with monkeypatch.context() as patch:
            patch.setattr(s3fs.S3FileSystem, "_get_file", late)
            error = refusal(here, "s3://bucket/changed/a.jsonl")
        assert (error.reason, error.retryable) == ("SourceUnavailable", True)
        assert "changed while it was downloaded" in error.message
        assert get(here, "s3://bucket/copy/a.jsonl").read_text() == "one"
        assert get(here, "s3://bucket/changed/a.jsonl").read_text() == "two"

    def test_a_job_that_reads_an_old_version_keeps_it(
        self, here: Path, store: SimpleNamespace
    ) -> None:
        store.client.put_object(Bucket="bucket", Key="kept/a.jsonl", Body=b"one")
        with get(here, "s3://bucket/kept/a.jsonl").open() as reader:
            store.client.put_object(Bucket="bucket", Key="kept/a.jsonl", Body=b"two")
            assert get(here, "s3://bucket/kept/a.jsonl").read_text() == "two"
            assert reader.read() == "one"

    def test_processes_that_ask_at_once_download_once(
        self, here: Path, store: SimpleNamespace, downloads: list[str]
    ) -> None:
        store.client.put_object(Bucket="bucket", Key="crowd/a.jsonl", Body=b"many")
        with ThreadPoolExecutor(4) as pool:
            paths = set(pool.map(lambda _: get(here, "s3://bucket/crowd/a.jsonl"), range(8)))
        assert [path.read_text() for path in paths] == ["many"]
        assert downloads == ["bucket/crowd/a.jsonl"]

    def test_a_cache_that_cannot_be_written_to_is_named(
        self, here: Path, store: SimpleNamespace
    ) -> None:
        store.client.put_object(Bucket="bucket", Key="once/a.jsonl", Body=b"one")
        put(here / "cache")  # a file in the place of the folder
        error = refusal(here, "s3://bucket/once/a.jsonl")
        assert error.reason == "CacheUnusable"
        assert "TUNEYARD_CACHE" in error.advice

    def test_a_folder_is_downloaded_with_subfolders_and_again_after_a_file_changes(
        self, here: Path, store: SimpleNamespace
    ) -> None:
        for key in ("a.jsonl", "deep/b.jsonl", ".hidden/c.jsonl"):
            store.client.put_object(Bucket="bucket", Key=f"folder/{key}", Body=key.encode())
        first = get(here, "s3://bucket/folder")
        assert [name for name, _ in sources.files_under(first)] == ["a.jsonl", "deep/b.jsonl"]
        store.client.put_object(Bucket="bucket", Key="folder/deep/b.jsonl", Body=b"new")
        second = get(here, "s3://bucket/folder")
        assert (second / "deep/b.jsonl").read_text() == "new"
        assert digest_of(first) != digest_of(second)

    def test_a_glob_downloads_only_matching_files(self, here: Path, store: SimpleNamespace) -> None:
        for key in ("a.jsonl", "b.jsonl", "c.csv"):
            store.client.put_object(Bucket="bucket", Key=f"many/{key}", Body=b"x")
        path = get(here, "s3://bucket/many/*.jsonl")
        assert [name for name, _ in sources.files_under(path)] == ["a.jsonl", "b.jsonl"]
        assert refusal(here, "s3://bucket/many/*.parquet").reason == "SourceNotFound"

    def test_a_model_folder_is_downloaded_without_pickles_and_code(
        self, here: Path, store: SimpleNamespace
    ) -> None:
        for key in ("config.json", "merged/model.safetensors", "pytorch_model.bin", "code.py"):
            store.client.put_object(Bucket="bucket", Key=f"model/{key}", Body=b"x")
        path = get(here, "s3://bucket/model", "model")
        found = [name for name, _ in sources.files_under(path)]
        assert found == ["config.json", "merged/model.safetensors"]

    @pytest.mark.usefixtures("store")
    @pytest.mark.parametrize("uri", ["s3://bucket/nothing.jsonl", "s3://no-such-bucket/a.jsonl"])
    def test_a_missing_key_or_bucket_is_not_found_and_leaves_no_files(
        self, here: Path, uri: str
    ) -> None:
        error = refusal(here, uri)
        assert error.reason == "SourceNotFound"
        assert uri in error.message
        assert not (here / "cache").exists()

    def test_an_incomplete_download_leaves_no_file_and_the_next_one_succeeds(
        self, here: Path, store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import s3fs

        store.client.put_object(Bucket="bucket", Key="torn.jsonl", Body=b"whole")

        async def incomplete(self: Any, rpath: str, lpath: str, **options: Any) -> None:
            Path(lpath).write_text("wh")

        with monkeypatch.context() as patch:
            patch.setattr(s3fs.S3FileSystem, "_get_file", incomplete)
            error = refusal(here, "s3://bucket/torn.jsonl")
        assert error.reason == "SourceUnavailable"
        assert error.retryable
        assert "2 of 5 bytes" in error.message
        assert [name for name, _ in sources.files_under(here / "cache")] == []
        assert get(here, "s3://bucket/torn.jsonl").read_text() == "whole"

    @pytest.mark.usefixtures("store")
    def test_missing_credentials_are_forbidden_with_advice(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(here))
        error = refusal(here, "s3://bucket/a.jsonl")
        assert error.reason == "SourceForbidden"
        assert "spec.data.train[0].credentials" in error.advice

    @pytest.mark.usefixtures("store")
    def test_an_unreachable_store_is_retryable(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        error = refusal(here, "s3://bucket/a.jsonl")
        assert (error.reason, error.retryable) == ("SourceUnavailable", True)

    def test_a_missing_extra_is_named(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        error = refusal(here, "gs://bucket/a.jsonl")
        assert error.reason == "SourceUnavailable"
        assert "tuneyard[gcs]" in error.advice

    def test_an_unknown_scheme_is_refused(self, here: Path) -> None:
        error = refusal(here, "job://support-bot", "model")
        assert error.reason == "SourceUnavailable"
        assert not error.retryable


class Site(BaseHTTPRequestHandler):
    """Serves `body` with `etag`, a byte each `pause` seconds, or `status`; counts GETs."""

    status, body, etag, gets, pause, encoding = 200, b"hello", '"v1"', 0, 0.0, ""

    def do_GET(self) -> None:
        self._answer()
        if self.status == 200:
            type(self).gets += 1
            with suppress(ConnectionError):
                self._send()

    def _send(self) -> None:
        for byte in self.body if self.pause else ():
            time.sleep(self.pause)
            self.wfile.write(bytes([byte]))
        if not self.pause:
            self.wfile.write(self.body)

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) if self.status == 200 else 0))
        if self.etag:
            self.send_header("ETag", self.etag)
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    handler: Any = type("OneSite", (Site,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", handler=handler)
    server.shutdown()
    server.server_close()


def test_an_error_that_a_store_returns_instead_of_raising_it_is_raised() -> None:
    """`cat_ranges` of fsspec 2026.1 returns errors, also with `on_error="raise"`."""
    listing = {"a.jsonl": {"name": "bucket/a.jsonl", "size": 1}}

    def refused(names: list[str], *_: object, **__: object) -> list[Exception]:
        return [PermissionError(name) for name in names]

    store = SimpleNamespace(protocol=("s3", "s3a"), cat_ranges=refused)
    with pytest.raises(PermissionError, match=r"bucket/a\.jsonl"):
        sources._require_readable(store, SourceInput(uri="s3://bucket", path="x"), listing)


class TestWeb:
    def test_a_page_with_an_etag_is_downloaded_once(
        self, here: Path, site: SimpleNamespace
    ) -> None:
        uri = f"{site.url}/data/a.jsonl?version=3"
        path = get(here, uri)
        assert (path.name, path.read_text()) == ("a.jsonl", "hello")
        assert get(here, uri) == path
        assert site.handler.gets == 1

    def test_a_page_without_a_version_is_downloaded_each_time(
        self, here: Path, site: SimpleNamespace
    ) -> None:
        site.handler.etag = None
        get(here, f"{site.url}/a.jsonl")
        site.handler.body = b"other"  # the same length as before
        assert get(here, f"{site.url}/a.jsonl").read_text() == "other"

    @pytest.mark.parametrize(
        ("status", "reason"),
        [(403, "SourceForbidden"), (404, "SourceNotFound"), (500, "SourceUnavailable")],
    )
    def test_the_error_of_a_refused_page_does_not_show_its_signature(
        self, here: Path, site: SimpleNamespace, status: int, reason: str
    ) -> None:
        site.handler.status = status
        error = refusal(here, f"{site.url}/a.jsonl?signature=hush")
        assert error.reason == reason
        assert "/a.jsonl?..." in error.message
        assert "hush" not in str(error)

    def test_a_server_that_refuses_a_page_is_not_overruled_by_the_cache(
        self, here: Path, site: SimpleNamespace
    ) -> None:
        get(here, f"{site.url}/a.jsonl")
        site.handler.status = 403
        assert refusal(here, f"{site.url}/a.jsonl").reason == "SourceForbidden"

    def test_an_unreachable_server_is_retryable(self, here: Path) -> None:
        error = refusal(here, "http://127.0.0.1:1/a.jsonl")
        assert (error.reason, error.retryable) == ("SourceUnavailable", True)

    def test_a_packed_file_stays_packed_if_the_server_calls_it_an_encoding(
        self, here: Path, site: SimpleNamespace
    ) -> None:
        site.handler.body, site.handler.encoding = gzip.compress(b"hello"), "gzip"
        assert gzip.decompress(get(here, f"{site.url}/a.jsonl.gz").read_bytes()) == b"hello"
        assert get(here, f"{site.url}/a.jsonl").read_bytes() == b"hello"

    def test_a_slow_download_takes_its_time(
        self, here: Path, site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """aiohttp ends a download after 5 minutes, which large files take."""
        monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
        site.handler.pause = 0.2
        assert get(here, f"{site.url}/a.jsonl").read_text() == "hello"

    def test_a_server_that_sends_nothing_any_more_is_retryable(
        self, here: Path, site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "STALLED_SECONDS", 0.2)
        site.handler.pause = 1.0
        error = refusal(here, f"{site.url}/a.jsonl")
        assert (error.reason, error.retryable) == ("SourceUnavailable", True)


class TestDigests:
    def test_a_folder_copied_and_touched_has_the_same_digest(self, here: Path) -> None:
        put(here / "a/x.jsonl", "one")
        put(here / "a/sub/y.jsonl", "two")
        shutil.copytree(here / "a", here / "b")
        os.utime(here / "b/x.jsonl", (1, 1))
        put(here / "b/.cache/lock")
        assert digest_of(here / "a") == digest_of(here / "b")
        assert digest_of(here / "a") == digest_of(here / "b/**/*.jsonl")

    @pytest.mark.parametrize("change", ["byte", "name", "more"])
    def test_any_difference_in_content_or_names_changes_the_digest(
        self, here: Path, change: str
    ) -> None:
        before = digest_of(put(here / "a/x.jsonl", "one").parent)
        if change == "byte":
            put(here / "a/x.jsonl", "onf")
        elif change == "name":
            (here / "a/x.jsonl").rename(here / "a/z.jsonl")
        else:
            put(here / "a/y.jsonl", "")
        assert digest_of(here / "a") != before

    def test_a_files_digest_depends_on_its_suffix_and_not_on_its_path(self, here: Path) -> None:
        file = put(here / "a/x.jsonl")
        assert digest_of(file) == digest_of(put(here / "b/y.jsonl"))
        assert digest_of(file) != digest_of(put(here / "b/y.txt"))
        assert digest_of(file).startswith("sha256:")

    def test_the_digest_of_a_list_depends_on_its_order(self, here: Path) -> None:
        one, two = put(here / "a.txt", "1"), put(here / "b.txt", "2")
        assert digest_of([one, two]) != digest_of([two, one])

    def test_a_large_file_is_hashed_again_only_after_it_changes(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(digests, "_CACHED_BYTES", 1)
        hashed: list[Path] = []
        original = digests.sha256_of
        monkeypatch.setattr(
            digests, "sha256_of", lambda path: hashed.append(path) or original(path)
        )
        file, cache = put(here / "x.bin", "one"), here / "cache"
        first = digest_of(file, cache_dir=cache)
        assert digest_of(file, cache_dir=cache) == first
        assert len(hashed) == 1
        put(file, "two")
        assert digest_of(file, cache_dir=cache) != first
        assert [path.name for path in cache.iterdir()] == ["hashes.json"]

    @pytest.mark.parametrize("cached", ["{", "[]", '{"x": 1}', "null"])
    def test_a_damaged_cache_of_hashes_does_not_change_a_digest(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, cached: str
    ) -> None:
        monkeypatch.setattr(digests, "_CACHED_BYTES", 1)
        file = put(here / "x.bin", "one")
        put(here / "cache/hashes.json", cached.replace("x", json.dumps(str(file))[1:-1]))
        assert digest_of(file, cache_dir=here / "cache") == digest_of(file)

    def test_a_cache_that_cannot_be_written_to_does_not_change_a_digest(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(digests, "_CACHED_BYTES", 1)
        file, cache = put(here / "x.bin", "one"), put(here / "home/cache", "no folder")
        assert digest_of(file, cache_dir=cache) == digest_of(file)

    def test_the_digest_of_a_missing_path_is_an_error(self, here: Path) -> None:
        with pytest.raises(StageError, match="does not exist"):
            digest_of(here / "nothing")


def test_the_weights_of_a_stages_folder_decide_its_digest(tmp_path: Path) -> None:
    """A reward model may be the folder of the stage that trained it."""
    for name, text in (("a", "one"), ("b", "two")):
        put(tmp_path / name / "weights/model.safetensors", text)
        put(tmp_path / name / "weights/README.md", text)
    first, second = (decisive_digest(tmp_path / name, "model", tmp_path) for name in "ab")
    assert first != second
    put(tmp_path / "b/weights/model.safetensors", "one")
    assert decisive_digest(tmp_path / "b", "model", tmp_path) == first
