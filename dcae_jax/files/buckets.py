# SPDX-License-Identifier: Apache-2.0
"""Object stores, by URL: gs:// through gcsfs, s3:// through s3fs, both fsspec file systems.

An object is put whole or not at all, so a single put is a commit. There is no rename and no lock;
`create` is a conditional put, which one of several writers wins. A request that fails for a reason
that may pass is repeated for PATIENCE_S seconds; one that is refused fails at once, in one line.
"""

import contextlib
import fnmatch
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dcae_jax.errors import MachineError, UserError, require

T = TypeVar("T")

STORES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> the package that reads it
LOGIN = {
    "gs": "run `gcloud auth application-default login`, or use a service account that may use it",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role that may use it",
}
PATIENCE_S = 900.0  # that a request is repeated
FIRST_S = 20.0  # the same of a store that has not answered yet, in case the name is wrong
MOST_WAIT_S = 30.0  # between two tries
AT_ONCE = 16  # files of a folder
REFUSALS = (401, 403, "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
PAST_END = (416, "416", "InvalidRange")


class StoreError(MachineError, OSError):
    """A store refused a request, or did not answer: one line, with the remedy."""


def is_url(path: str) -> bool:
    """Whether `path` is a URL, as of a bucket: os.path would make a local folder of it."""
    return bool(re.match(r"\w[\w+.-]*:/", os.fspath(path)))


def check(path: str, key: str) -> None:
    """Raises UserError for a URL that cannot be read, or whose package is not installed."""
    match = re.fullmatch(r"(\w[\w+.-]*)://([^/]+)(/.*)?", path)
    if not match or match[1] not in STORES:
        raise UserError(
            f"{key}={path!r} is a URL of no known kind; give gs://BUCKET/FOLDER, "
            "s3://BUCKET/FOLDER or a folder"
        )
    require(f"{key}={path!r} needs {STORES[match[1]]}", STORES[match[1]])


# --- requests -------------------------------------------------------------------------------------


@functools.cache
def _system(scheme: str, _process: int) -> Any:
    """The file system; none is shared with a forked process, nor does one remember listings."""
    import fsspec

    # fsspec's connections, and botocore, log each failure that is repeated here.
    for name in ("gcsfs", "s3fs", "aiobotocore", "botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme, use_listings_cache=False)


_answered: set[str] = set()  # stores that have answered, and have not been away for PATIENCE_S


def _request(url: str, do: Callable[[Any], T], patience: float | None = None) -> T:
    """`do(file system)`, repeated with back-off. Raises StoreError, and what `open` would."""
    scheme = url.partition(":")[0]
    # A job that ends since its store is away puts several more objects. A reader process begins
    # once its job has found the store.
    known = scheme in _answered or multiprocessing.parent_process() is not None
    usual = PATIENCE_S if known else min(FIRST_S, PATIENCE_S)
    wait, ends = 0.25, time.monotonic() + (usual if patience is None else patience)
    while True:
        try:
            answer = do(_system(scheme, os.getpid()))
            _answered.add(scheme)
            return answer
        except (FileNotFoundError, FileExistsError, IsADirectoryError):
            _answered.add(scheme)
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if any(code in PAST_END for code in _codes(error)):
                raise EOFError(url) from error
            if _is_refusal(error):
                raise StoreError(f"{url}: no permission ({reason}); {LOGIN.get(scheme)}") from error
            if isinstance(error, TypeError | AttributeError | NotImplementedError | NameError):
                raise  # a bug
            if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                raise StoreError(f"{url}: {reason}; check the name of the bucket") from error
            if time.monotonic() + wait > ends:
                if patience is None:
                    _answered.discard(scheme)
                raise StoreError(
                    f"{url}: the store does not answer ({reason}); check the name of the bucket "
                    "and the network, then rerun the command"
                ) from error
            logging.debug("%s: %s; again in %.1f s", url, reason, wait)
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, MOST_WAIT_S)


def _is_refusal(error: Exception) -> bool:
    """Whether the store answered that this user may not do that, or there is no user at all."""
    missing = type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
    forbidden = str(error).startswith("Forbidden")  # gcsfs has an OSError without number for it
    refused = any(code in REFUSALS for code in _codes(error))
    return missing or forbidden or refused or isinstance(error, PermissionError)


def _codes(error: BaseException) -> list[Any]:
    """The codes of a store's answer: s3fs translates botocore's error, which is the cause."""
    codes = [getattr(error, "code", None), getattr(error, "status", None)]
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        codes.append(response.get("Error", {}).get("Code"))
    return codes + (_codes(error.__cause__) if error.__cause__ else [])


def probe(url: str) -> None:
    """Raises UserError or StoreError unless objects can be put and removed below `url`."""
    name = f"{url.rstrip('/')}/.probe-{os.getpid()}-{random.getrandbits(32):08x}"
    try:
        put(name, b"", patience=FIRST_S)
    except FileNotFoundError as error:
        bucket = url.split("/")[2]
        raise UserError(f"{url!r}: there is no bucket {bucket!r}; check its name") from error
    except StoreError as error:
        raise StoreError(str(error).replace(name, url)) from error
    remove(name)


# --- objects --------------------------------------------------------------------------------------

before_put: list[Callable[[str], None]] = []  # called with the URL of each object that is put


def put(url: str, data: bytes, patience: float | None = None, guarded: bool = True) -> None:
    """Replaces the object. patience: in seconds. guarded: calls `before_put`."""
    for ask in before_put if guarded else ():
        ask(url)
    _request(url, lambda system: system.pipe_file(url, data), patience)


def put_file(url: str, path: str) -> None:
    """Replaces the object by the content of a local file."""
    for ask in before_put:
        ask(url)
    _request(url, lambda system: system.put_file(path, url))


def create(url: str, data: bytes) -> bool:
    """Puts the object if there is none; whether it did. Of several writers, one does."""
    try:
        _request(url, lambda system: system.pipe_file(url, data, mode="create"))
    except FileExistsError:
        return read(url) == data  # an answer that was lost, to a try that succeeded
    return True


def read(url: str) -> bytes | None:
    """The content of an object; None if there is none."""
    try:
        return _request(url, lambda system: system.cat_file(url))
    except (FileNotFoundError, IsADirectoryError):
        return None


def read_range(url: str, first: int, size: int) -> bytes:
    """`size` bytes from byte `first` on, fewer at the end of the object, by one request.

    Raises FileNotFoundError.
    """
    if size <= 0:
        return b""  # a range of HTTP has a byte at least
    try:
        return _request(url, lambda system: system.cat_file(url, start=first, end=first + size))
    except EOFError:
        return b""


def info(url: str) -> dict[str, Any] | None:
    """fsspec's description of an object or folder; None if there is none."""
    try:
        return _request(url, lambda system: system.info(url))
    except FileNotFoundError:
        return None


def names(url: str) -> list[str]:
    """What is directly in a folder, sorted."""
    try:
        found = _request(url, lambda system: system.ls(url, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    own = url.partition("://")[2].strip("/")
    inside = (path.strip("/") for path in found)
    return sorted(path.rpartition("/")[2] for path in inside if path != own)


def tree(url: str, prefix: str = "") -> dict[str, dict[str, Any]]:
    """{path relative to the folder `url`: fsspec's description} of all objects below it.

    prefix: saves the listing of paths that do not begin so, where the store can. Raises
    FileNotFoundError if there is no such bucket.
    """
    found = _request(url, lambda system: system.find(url, detail=True, prefix=prefix))
    start = len(url.partition("://")[2].strip("/")) + 1
    paths = {path.strip("/")[start:]: value for path, value in found.items()}
    return {path: paths[path] for path in sorted(paths) if path}


def found(url: str, key: str, keep: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """{URL: fsspec's description} of what `url` names, sorted: one object, those below a folder, or
    those of a pattern as of glob.glob, such as gs://BUCKET/train-*.tar.

    keep: of a folder, takes only the objects whose relative path it accepts. Raises UserError, with
    `key`, if there is no such bucket; StoreError.
    """
    url, bucket = url.rstrip("/"), url.split("/")[2]
    try:
        description = info(url)
        if description is not None and description["type"] != "directory":
            return {url: description}
        parts = re.split(r"[*?[]", url) if description is None else [url]
        if len(parts) == 1:
            return {f"{url}/{path}": value for path, value in tree(url).items() if keep(path)}
        root, _, prefix = parts[0].rpartition("/")
        below = {f"{root}/{path}": value for path, value in tree(root, prefix).items()}
        return {path: value for path, value in below.items() if _matches(path, url)}
    except FileNotFoundError as error:
        raise UserError(f"{key}={url!r}: there is no bucket {bucket!r}; check its name") from error


@contextlib.contextmanager
def named(key: str, url: str) -> Iterator[None]:
    """Puts the key of the configuration that names `url` before the line of a StoreError."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{key}={url!r}: {str(error).removeprefix(f'{url}: ')}") from error


def _matches(path: str, pattern: str) -> bool:
    """Whether each name in `path` matches its own in `pattern`."""
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def stamp(description: dict[str, Any]) -> int:
    """A number of 60 bits that changes when the described object is put again."""
    changing = ("generation", "ETag", "created")  # of GCS; of S3; of fsspec's store in memory
    text = version({key: description.get(key) for key in ("size", *changing)})
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def remove(url: str) -> None:
    """Removes an object, if there is one."""
    try:
        _request(url, lambda system: system.rm_file(url))
    except FileNotFoundError:
        pass


def copy(source: str, target: str) -> None:
    """Copies an object within its store."""
    _request(target, lambda system: system.cp_file(source, target))


# --- folders --------------------------------------------------------------------------------------


def _all(do: Callable[[str], object], paths: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(do, paths):
            pass


def put_folder(url: str, folder: str, paths: Sequence[str], last: str = "") -> None:
    """Puts the files `paths` of a local folder, several at once, and the file `last` at the end.

    A folder that counts only with `last` is committed by its put.
    """
    _all(lambda path: put_file(f"{url}/{path}", os.path.join(folder, path)), paths)
    if last:
        put_file(f"{url}/{last}", os.path.join(folder, last))


def remove_folder(url: str, first: str = "") -> None:
    """Removes all objects below `url`; `first` before the others, so that it counts no more."""
    if first:
        remove(f"{url}/{first}")
    _all(lambda path: remove(f"{url}/{path}"), tree(url))


def move_folder(source: str, target: str, first: str) -> None:
    """Copies all objects, then removes the old ones, `first` before the others."""
    _all(lambda path: copy(f"{source}/{path}", f"{target}/{path}"), tree(source))
    remove_folder(source, first)


def get(url: str, path: str) -> None:
    """Writes an object to the local file `path`, whose folder exists. Raises FileNotFoundError."""
    _request(url, lambda system: system.get_file(url, path))


def get_folder(url: str, folder: str, paths: Iterable[str]) -> None:
    """Writes the objects `paths` of `url` below a local folder."""

    def fetch(path: str) -> None:
        there = os.path.join(folder, *path.split("/"))
        os.makedirs(os.path.dirname(there), exist_ok=True)
        get(f"{url}/{path}", there)

    _all(fetch, paths)


def version(description: Any) -> str:
    """What changes with the content: of an object's description, or of several."""
    return json.dumps(description, sort_keys=True, default=str)
