"""The guarantees of fsspec's caching file systems, next to those of Tuneyard's own cache.

    .venv/bin/python benchmarks/fsspec_caches.py

A web server on loopback serves 4 MB slowly and counts its downloads, while two processes read them
at once: how many bytes does each get? A process is killed in its download: what does the next one
get? Then an object of an S3 server on loopback changes while a reader has the old one open. Last,
two files have one name. docs/adr/0012-own-cache.md quotes the tables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
from moto.server import ThreadedMotoServer

SIZE, PART, PAUSE = 4_000_000, 400_000, 0.2
OBJECT = {"Bucket": "bucket", "Key": "train.jsonl"}
FSSPEC = """
import fsspec, sys
protocol, folder, url = sys.argv[1:]
options = {} if protocol == "simplecache" else {"check_files": True}
scheme = url.partition("://")[0]
files = fsspec.filesystem(protocol, target_protocol=scheme, cache_storage=folder, **options)
data = files.open(url).read()
print(data[:1].decode(), len(data))
"""
NAMED = """
import fsspec, sys
protocol, folder, url = sys.argv[1:]
scheme = url.partition("://")[0]
files = fsspec.filesystem(
    protocol, target_protocol=scheme, cache_storage=folder, same_names=True
)
data = files.open(url).read()
print(data[:1].decode(), len(data))
"""
OWN = """
import sys
from pathlib import Path
from tuneyard.api.plan import SourceInput
from tuneyard_trainer.storage.sources import fetch
_, folder, url = sys.argv[1:]
source = SourceInput(uri=url, path="spec.data.train[0].uri")
path = fetch(source, base_dir=Path(folder), cache_dir=Path(folder), kind="data")
data = path.read_text()
print(data[:1], len(data))
"""
SIDES = {"simplecache": FSSPEC, "filecache": FSSPEC, "blockcache": FSSPEC, "Tuneyard": OWN}


class Site(BaseHTTPRequestHandler):
    """Serves files, with a pause after each part; counts GETs. /two/ holds another content."""

    gets = 0
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.send_header("ETag", '"v1"')
        self.end_headers()

    def do_GET(self) -> None:
        type(self).gets += 1
        self.do_HEAD()
        with contextlib.suppress(OSError):  # blockcache ends its requests early
            for _ in range(0, SIZE, PART):
                self.wfile.write((b"2" if "/two/" in self.path else b"1") * PART)
                time.sleep(PAUSE)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def main() -> None:
    logging.disable(logging.CRITICAL)
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*store.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=OBJECT["Bucket"])
    print(f"fsspec {fsspec.__version__}, Python {sys.version.split()[0]}\n")
    url = f"http://127.0.0.1:{site.server_port}"
    print("| cache | downloads by two processes | bytes that each reads | after a kill |")
    print("|---|---:|---:|---:|")
    for name in SIDES:
        downloads, sizes = at_once(name, f"{url}/train.jsonl")
        print(f"| {name} | {downloads} | {sizes} | {after_a_kill(name, f'{url}/train.jsonl')} |")
    print(f"\nEach file has {SIZE:,} bytes.\n")
    print("| cache | a new version is read as | its old reader gets | files 1, 2, 1 of one name |")
    print("|---|---|---|---|")
    for name in SIDES:
        print(f"| {name} | {' | '.join(after_a_change(name, client))} | {same_names(name, url)} |")
    site.shutdown()
    store.stop()


def at_once(name: str, url: str) -> tuple[int, str]:
    """Return the number of GETs of two processes that read a file, one a moment after the other,
    and how many bytes each of them reads."""
    Site.gets = 0
    with tempfile.TemporaryDirectory() as folder:
        first = start(name, folder, url)
        if not downloading(folder, first):
            print(f"{name}: no file appeared", file=sys.stderr)
        sizes = [read(process)[1] for process in (start(name, folder, url), first)]
    return Site.gets, ", ".join(f"{size:,}" for size in reversed(sizes))


def after_a_kill(name: str, url: str) -> str:
    """Return how many bytes the next process reads after one was killed in its download."""
    with tempfile.TemporaryDirectory() as folder:
        killed = start(name, folder, url)
        downloading(folder, killed)
        killed.kill()
        killed.communicate()
        return f"{read(start(name, folder, url))[1]:,}"


def downloading(folder: str, process: subprocess.Popen[str]) -> bool:
    """Wait until a process has written a part of its download; return whether it has."""
    while process.poll() is None:
        if any(path.is_file() and path.stat().st_size >= PART for path in Path(folder).rglob("*")):
            return True
        time.sleep(PAUSE / 4)
    return False


def same_names(name: str, url: str) -> str:
    """Return which of two files that end in one name is read, in the order first, second, first.
    fsspec's caches keep the names of files, which transformers needs, only with `same_names`."""
    code = OWN if name == "Tuneyard" else NAMED
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"{url}/{each}/train.jsonl" for each in ("one", "two", "one")]
        found = [read(start(name, folder, each, code))[0] for each in asked]
    return "their own" if found == ["1", "2", "1"] else ", ".join(found)


def after_a_change(name: str, client: Any) -> tuple[str, str]:
    """Return what the next process reads after an object has changed, and what a process reads that
    has the old one open."""
    url = f"s3://{OBJECT['Bucket']}/{OBJECT['Key']}"
    with tempfile.TemporaryDirectory() as folder:
        client.put_object(**OBJECT, Body=b"1" * SIZE)
        read(start(name, folder, url))
        cached = max(Path(folder).rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
        with cached.open() as reader:
            reader.seek(SIZE // 2)
            client.put_object(**OBJECT, Body=b"2" * SIZE)
            newest, _ = read(start(name, folder, url))
            old = reader.read(1)
    seen = "the new one" if newest == "2" else "the old one"
    return seen, "its own" if old == "1" else "bytes of the new one"


def start(name: str, folder: str, url: str, code: str | None = None) -> subprocess.Popen[str]:
    """Start a process that reads the file, and prints its first character and its size."""
    command = [sys.executable, "-c", code or SIDES[name], name, folder, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Return what a process prints."""
    first, size = process.communicate(timeout=120)[0].split()
    return first, int(size)


if __name__ == "__main__":
    main()
