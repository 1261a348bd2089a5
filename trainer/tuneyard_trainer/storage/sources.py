"""External sources: `fetch` returns a local path for a URI.

Local sources are checked and used in place. Remote sources are downloaded once per version, and
versions lie side by side: another job may be reading an older one. The store is asked for the
version with the job's own credentials each time, and for a file of what lies in the cache, so the
cache gives nobody what the store refuses. ADR 0012 says why fsspec's caches are not used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from tuneyard.api.packages import packaged_file
from tuneyard.api.plan import SourceInput, digest
from tuneyard.api.pods import CACHE_NAME, CLAIMS_FOLDER
from tuneyard.errors import StageError
from tuneyard_trainer.storage.digests import (
    WILDCARDS,
    digest_of,
    files_under,
    hidden,
    is_documentation,
    split_glob,
)
from tuneyard_trainer.storage.downloads import keep, partial_folder
from tuneyard_trainer.storage.files import cache_lock
from tuneyard_trainer.storage.objects import content_version_of, protocols, version_of

__all__ = ["digest_of", "fetch", "files_under"]

PVC_ROOT = Path(CLAIMS_FOLDER)
"""The folder that the operator mounts each claim in, under the claim's name."""
LOADED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a model folder that a model or a tokenizer can be loaded from: no pickles (*.bin, *.pt)
and no code (*.py)."""
MODEL_FILES = (*LOADED_FILES, "LICENSE*", "NOTICE*", "README*")
"""Files that are fetched from a model folder; the last three name the license."""
REPEATED_FILES = ("*/*", "consolidated*")
"""Files in subfolders and consolidated.* repeat the weights of a model in other layouts."""
STALLED_SECONDS = 60.0
"""A web server that sends nothing for this long cannot be reached."""

_CHAT_TEMPLATES = PurePosixPath("additional_chat_templates")  # transformers' name
_STAGE_WEIGHTS = PurePosixPath("weights")
"""The model in the folder of a stage, which a reward may be loaded from."""

Kind = Literal["model", "data"]


def fetch(source: SourceInput, *, base_dir: Path, cache_dir: Path, kind: Kind) -> Path:
    """Return the local path of a source: a file, a folder or, for local data, a glob that matches
    files (`files_under` expands all three).

    `base_dir`: the manifest's folder, to which file:// paths are relative; `~` is not expanded.
    `cache_dir`: holds the downloads from s3, gs, https, hf data sets and other fsspec schemes, one
    folder per version; a source is downloaded again only if the store reports another version.
    Models from the hub are there too if it lies on a claim (`on_claim`), else in the hub client's
    own cache, which other programs of the machine share. Raises StageError SourceNotFound,
    SourceForbidden, SourceUnavailable (retryable if waiting may help; also if the store cannot be
    asked about what lies in the cache), NoSafetensors, DiskFull, CacheUnusable.
    """
    scheme, _, rest = source.uri.partition("://")
    with as_stage_errors(source):
        if scheme == "file":
            return _local(base_dir.absolute() / rest, kind)
        if scheme == "pvc":
            return _mounted(source, rest, kind)
        if scheme == "pkg":
            return _packaged(source, rest)
        if scheme == "hf" and not rest.startswith("datasets/"):
            return _hub_model(source, rest, cache_dir, kind)
        return _downloaded(source, cache_dir, kind)


def is_local(uri: str) -> bool:
    """Return whether a source is on this machine or mounted, so that `fetch` downloads nothing."""
    return uri.startswith(("file://", "pvc://", "pkg://"))


def on_claim(cache_dir: Path) -> bool:
    """Return whether a cache lies on a claim, which the pods of other jobs use too."""
    return cache_dir.is_relative_to(PVC_ROOT)


def decisive_digest(path: Path, kind: Kind, cache_dir: Path) -> str:
    """Return the digest of a fetched source without files of its folder that decide no result: of a
    model, files that no model is loaded from; of data, its README, LICENSE and NOTICE."""
    counts = _is_loaded if kind == "model" else _is_data
    return digest_of(path, cache_dir=cache_dir, counts=counts)


def _is_loaded(name: PurePosixPath) -> bool:
    if name.parent == _CHAT_TEMPLATES:
        return name.suffix == ".jinja"
    if name.parent == _STAGE_WEIGHTS:
        name = name.relative_to(_STAGE_WEIGHTS)
    repeated = any(fnmatch(str(name), pattern) for pattern in REPEATED_FILES)
    index_of_pickles = name.match("*.bin.index.json")
    loaded = any(name.match(pattern) for pattern in LOADED_FILES)
    return loaded and not (repeated or index_of_pickles or is_documentation(name))


def _is_data(name: PurePosixPath) -> bool:
    return not is_documentation(name)


# ---- local schemes ------------------------------------------------------------------------------


def _local(path: Path, kind: Kind) -> Path:
    # A URI holds no white space: a path may be written with %20 for a space.
    for candidate in dict.fromkeys((path, Path(unquote(str(path))))):
        if candidate.exists():
            if not os.access(candidate, os.R_OK):
                raise PermissionError(errno.EACCES, "not readable", str(candidate))
            return candidate
        if kind == "data" and files_under(candidate):
            return candidate
    matches_nothing = kind == "data" and split_glob(path)[1]
    raise FileNotFoundError(f"{path} {'matches no file' if matches_nothing else 'does not exist'}")


def _mounted(source: SourceInput, rest: str, kind: Kind) -> Path:
    claim, _, inside = rest.partition("/")
    parts = Path(unquote(rest)).parts  # `_local` reads %2e as a dot, too
    if ".." in parts:
        raise FileNotFoundError(f"{rest} is outside of the claim")
    if CACHE_NAME in parts:
        raise PermissionError(errno.EACCES, "other jobs downloaded and prepared what lies there")
    volume = PVC_ROOT / claim
    if not volume.is_dir():
        raise StageError(
            "SourceUnavailable",
            f"{source.uri}: the claim is not mounted at {volume}; pvc:// sources need a cluster.",
            advice=f"On one machine, set {_field(source, 'uri')} to a file:// URI.",
        )
    return _local(volume / inside, kind)


def _packaged(source: SourceInput, rest: str) -> Path:
    try:
        return packaged_file(rest)
    except ModuleNotFoundError as error:
        raise StageError(
            "SourceNotFound",
            f"{source.uri}: the Python package {error.name!r} is not installed.",
            advice=f"Install it where the job runs, or correct {_field(source, 'uri')}.",
        ) from error


# ---- the model hub ------------------------------------------------------------------------------


def _hub_model(source: SourceInput, rest: str, cache_dir: Path, kind: Kind) -> Path:
    import huggingface_hub

    parts = rest.strip("/").split("/")
    one_file = len(parts) == 3 and parts[2].endswith(".gguf")
    if kind == "data" or not (len(parts) <= 2 or one_file):
        wanted = "hf://datasets/ORG/NAME/FILE" if kind == "data" else "hf://ORG/NAME"
        raise FileNotFoundError(f"the URI of {kind} on the hub has the form {wanted}")
    repo, token = "/".join(parts[:2]), _token(source)
    files: dict[str, Any] = {
        "allow_patterns": [parts[2]] if one_file else list(MODEL_FILES),
        "ignore_patterns": list(REPEATED_FILES),
    }
    if on_claim(cache_dir):
        folder = _shared_hub_folder(repo, source.revision, token, files, cache_dir)
    else:
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=source.revision, token=token, **files
        )
        folder = Path(snapshot)
    if one_file:
        return _local(folder / parts[2], kind)
    if not any(folder.glob("*.safetensors")):
        raise StageError(
            "NoSafetensors",
            f"{source.uri} holds no *.safetensors weights; pickled weights (*.bin, *.pt) can run "
            "code when they are loaded and are never fetched.",
            advice=f"Set {_field(source, 'uri')} to a model with safetensors, or to one GGUF file: "
            "hf://ORG/NAME/FILE.gguf.",
        )
    return folder


def _shared_hub_folder(
    repo: str, revision: str | None, token: str | None, files: dict[str, Any], cache_dir: Path
) -> Path:
    """Return the folder of a model of the hub in a cache that pods share.

    The hub client's own cache does not do: if the hub refuses the token or cannot be reached, the
    client returns what lies there; and where the file system has no locks, it waits without end for
    a pod that was killed.
    """
    import huggingface_hub

    commit = huggingface_hub.HfApi(token=token).model_info(repo, revision=revision).sha
    target = cache_dir / "sources" / digest([repo, commit, files])[7:39]
    with cache_lock(target):
        cached = target.exists()
        if not cached:
            with partial_folder(target.parent) as partial:
                huggingface_hub.snapshot_download(
                    repo, revision=commit, token=token, local_dir=partial, **files
                )
                keep(partial, target)
    if cached and (found := files_under(target)):
        # The card of a gated model may be open to all: its largest file is asked for, the weights.
        largest, _ = max(found, key=lambda file: file[1].stat().st_size)
        _require_readable_on_hub(huggingface_hub.hf_hub_url(repo, largest, revision=commit), token)
    return target


def _require_readable_on_hub(url: str, token: str | None) -> None:
    """Raise the hub's error unless the token may read a file. The hub shows the files of a gated
    repository to all."""
    import huggingface_hub

    huggingface_hub.get_hf_file_metadata(url, token=token)


def _token(source: SourceInput) -> str | None:
    """Return the hub token; None: the hub client uses HF_TOKEN or a saved login.

    Raises StageError SourceForbidden if the manifest names a token and none is set, instead of
    silently sending anonymous requests.
    """
    if source.token_secret is None:
        return None
    token = os.environ.get(source.token_secret.variable) or os.environ.get("HF_TOKEN")
    if not token:
        raise StageError(
            "SourceForbidden",
            f"{source.uri} names the token {source.token_secret.name}/{source.token_secret.key}, "
            f"and neither {source.token_secret.variable} nor HF_TOKEN is set.",
            advice=f"Set one of them, or remove {_field(source, 'tokenSecret')}.",
        )
    return token


# ---- other remote schemes, read through fsspec --------------------------------------------------


def _downloaded(source: SourceInput, cache_dir: Path, kind: Kind) -> Path:
    fs, root = _filesystem(source)
    listing, is_file = _listing(fs, root, kind)
    if not listing:
        raise FileNotFoundError("there are no files to read")
    key = _version_key(fs, source.uri, listing)
    target = cache_dir / "sources" / (key or digest(source.uri)[7:39])

    def check() -> None:
        """Raise OSError if the files have changed since they were listed: other content must not
        get the name of this one."""
        if key is not None and _version_key(fs, source.uri, _listing(fs, root, kind)[0]) != key:
            raise OSError(errno.EIO, "it changed while it was downloaded")

    with cache_lock(target):
        cached = key is not None and target.exists()
        if not cached:
            with partial_folder(target.parent) as partial:
                _download(fs, listing, partial)
                check()
                if key is None:
                    target /= digest_of(partial)[7:39]
                keep(partial, target)
    if cached:
        _require_readable(fs, source, listing)
    return target / next(iter(listing)) if is_file else target


def _version_key(fs: Any, uri: str, listing: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a name for this version of a source; None: the store reports no versions. Where these
    are hashes of content, all URIs of the same files have one name."""
    contents = {name: content_version_of(fs, info) for name, info in listing.items()}
    if None not in contents.values():
        return digest(contents)[7:39]
    versions = {name: version_of(info) for name, info in listing.items()}
    return None if None in versions.values() else digest([uri, versions])[7:39]


def _filesystem(source: SourceInput) -> tuple[Any, str]:
    """Return a file system without cached listings, and the source's path in it."""
    import fsspec

    if source.uri.startswith("hf://"):
        import huggingface_hub

        fs = huggingface_hub.HfFileSystem(token=_token(source), skip_instance_cache=True)
        return fs, source.uri.removeprefix("hf://")
    is_web = source.uri.startswith(("http://", "https://"))
    options = _web_options(source.uri) if is_web else {}
    try:
        fs, root = fsspec.core.url_to_fs(source.uri, skip_instance_cache=True, **options)
    except ValueError as error:  # "Protocol not known"
        raise StageError(
            "SourceUnavailable",
            f"{_shown(source.uri)} cannot be read: {error}.",
            advice=f"Set {_field(source, 'uri')} to a URI of another scheme.",
        ) from error
    return fs, root


def _web_options(uri: str) -> dict[str, Any]:
    """Return the options of a web server's file system.

    A download takes the time that it takes, and ends where nothing arrives any more. By aiohttp's
    default it ends after 5 minutes. A .gz file stays packed, although some servers call its
    compression that of the transfer.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(sock_connect=STALLED_SECONDS, sock_read=STALLED_SECONDS)
    is_packed = urlsplit(uri).path.lower().endswith(".gz")
    return {
        "client_kwargs": {"timeout": timeout, "auto_decompress": not is_packed},
        "headers": {"Accept-Encoding": "identity"} if is_packed else {},
    }


def _listing(fs: Any, root: str, kind: Kind) -> tuple[dict[str, Mapping[str, Any]], bool]:
    """Return the files to download, by relative name, and whether the source is a single file."""
    web = root.startswith(("http://", "https://"))  # no folders, and "?" is no wildcard
    if kind == "data" and not web and WILDCARDS & set(root):
        base, found = str(split_glob(Path(root))[0]), fs.glob(root, detail=True)
    else:
        info = fs.info(root)
        if info["type"] == "file":
            name = PurePosixPath(urlsplit(root).path if web else root).name or "index"
            return {name: info}, True
        base, found = str(info["name"]), fs.find(root, detail=True)
    listing = {}
    for key, info in found.items():
        path = PurePosixPath(key.removeprefix(base).lstrip("/"))
        wanted = kind == "data" or any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)
        if info["type"] == "file" and not key.endswith("/") and wanted and not hidden(path):
            listing[str(path)] = info
    return listing, False


def _require_readable(
    fs: Any, source: SourceInput, listing: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise the store's error unless the job may read the files, which it was allowed to list: ask
    for a byte of a file of each folder, since the rights of an object store are those of paths."""
    schemes = protocols(fs)
    if "http" in schemes:
        return  # the listing is the server's answer to a request for the file itself
    files = {str(PurePosixPath(name).parent): file for name, file in listing.items()}
    names = [file["name"] for file in files.values() if file.get("size")]
    if "hf" in schemes:
        if names:  # the rights are those of the repository
            _require_readable_on_hub(fs.url(names[0]), _token(source))
    else:
        for found in fs.cat_ranges(names, 0, 1):  # some versions raise no error, also if asked to
            if isinstance(found, BaseException):
                raise found


def _download(fs: Any, listing: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Download the files of a listing. Raises OSError unless all bytes arrive."""
    # The listing has no hidden names, hence no "..".
    local = {name: folder / name for name in listing}
    for path in local.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    fs.get([info["name"] for info in listing.values()], [str(path) for path in local.values()])
    for name, path in local.items():
        _check_size(name, path, listing[name])


def _check_size(name: str, path: Path, info: Mapping[str, Any]) -> None:
    expected, size = info.get("size"), path.stat().st_size
    if expected is not None and size != expected:
        raise OSError(errno.EIO, f"{name}: {size} of {expected} bytes arrived")


# ---- errors -------------------------------------------------------------------------------------


class _Category(NamedTuple):
    """A category of failure: the reason, and the predicate of the message about the source."""

    reason: str
    text: str
    retryable: bool = False


_NOT_FOUND = _Category("SourceNotFound", "was not found")
_FORBIDDEN = _Category("SourceForbidden", "may not be read")
_UNREACHABLE = _Category("SourceUnavailable", "cannot be reached", retryable=True)

# By class name, so that no object store's package needs to be installed; the first match counts.
_BY_NAME = {
    "GatedRepoError": _FORBIDDEN,
    "DisabledRepoError": _FORBIDDEN,
    "RepositoryNotFoundError": _NOT_FOUND,
    "RevisionNotFoundError": _NOT_FOUND,
    "RemoteEntryNotFoundError": _NOT_FOUND,
    "HFValidationError": _NOT_FOUND,
    "NoCredentialsError": _FORBIDDEN,
    "PartialCredentialsError": _FORBIDDEN,
    "CredentialRetrievalError": _FORBIDDEN,
    "DefaultCredentialsError": _FORBIDDEN,
}
_BY_STATUS = {401: _FORBIDDEN, 403: _FORBIDDEN, 404: _NOT_FOUND, 410: _NOT_FOUND}
_BY_NAME_LAST = {
    "LocalEntryNotFoundError": _UNREACHABLE,  # no network, and no copy in the cache
    "ClientError": _UNREACHABLE,  # aiohttp
    "BotoCoreError": _UNREACHABLE,
    "HTTPError": _UNREACHABLE,  # httpx
    "TimeoutError": _UNREACHABLE,
    "ConnectionError": _UNREACHABLE,
    "FileNotFoundError": _NOT_FOUND,
    "NotADirectoryError": _NOT_FOUND,
    "PermissionError": _FORBIDDEN,
    "OSError": _UNREACHABLE,
}


@contextmanager
def as_stage_errors(source: SourceInput) -> Iterator[None]:
    """Convert the errors of file systems, stores and the hub to StageErrors. Errors of Tuneyard's
    own code are not converted."""
    try:
        yield
    except StageError:
        raise
    except ImportError as error:
        raise _missing_package(source, error) from error
    except Exception as error:
        raise _failure(source, error) from error


def _failure(source: SourceInput, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            "DiskFull",
            f"the disk is full: {_shown(source.uri)} cannot be stored ({error}).",
            advice=f"Free some space, or set {_field(source, 'uri')} to a smaller source.",
        )
    names = [cls.__name__ for cause in _causes(error) for cls in type(cause).__mro__]
    category = (
        next((_BY_NAME[name] for name in names if name in _BY_NAME), None)
        or _by_status(error)
        or next((_BY_NAME_LAST[name] for name in _BY_NAME_LAST if name in names), None)
    )
    if category is None:
        return error
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StageError(
        category.reason,
        f"{_shown(source.uri)} {category.text}: {why.replace(source.uri, _shown(source.uri))}.",
        advice=_advice(source, category, "RevisionNotFoundError" in names),
        retryable=category.retryable,
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _by_status(error: Exception) -> _Category | None:
    """Return the category of the first HTTP error status in the chain of causes (aiohttp, httpx,
    botocore, gcsfs)."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        codes = (getattr(response, "status_code", response), getattr(cause, "status", None))
        for code in (*codes, getattr(cause, "code", None)):
            if isinstance(code, int) and code >= 400:
                return _BY_STATUS.get(code, _UNREACHABLE)
    return None


def _advice(source: SourceInput, category: _Category, wrong_revision: bool) -> str:
    scheme, uri = source.uri.partition("://")[0], _field(source, "uri")
    token = f"set {_field(source, 'tokenSecret')} (on one machine: HF_TOKEN)"
    if wrong_revision:
        return f"Correct {_field(source, 'revision')}."
    if category is _NOT_FOUND:
        return f"Correct {uri}." + (f" If it is private, {token}." if scheme == "hf" else "")
    if category is _UNREACHABLE:
        return f"Check the network and {uri}; running the job again may help."
    if scheme == "hf":
        return f"Accept the terms on its hub page and {token}, or change {uri}."
    if scheme in ("file", "pvc", "pkg"):
        return f"Make the source readable, or change {uri}."
    credentials = f"set {_field(source, 'credentials')} (on one machine: its environment variables)"
    return f"Check the permissions, {credentials}, or change {uri}."


def _missing_package(source: SourceInput, error: ImportError) -> StageError:
    scheme = source.uri.partition("://")[0]
    extra = {"s3": "tuneyard[s3]", "gs": "tuneyard[gcs]"}.get(scheme, error.name or "its package")
    return StageError(
        "SourceUnavailable",
        f"{_shown(source.uri)} cannot be read: {error}.",
        advice=f"Install {extra} where the job runs, or change {_field(source, 'uri')}.",
    )


def _field(source: SourceInput, name: str) -> str:
    """Return the manifest path of a field of the source."""
    return f"{source.path.removesuffix('.uri')}.{name}".lstrip(".")


def _shown(uri: str) -> str:
    """Return a URI without its parts that may be secret: the query (signed URLs) and the user."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return uri
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
