"""Files that are whole or absent: atomic writes, checksums, verified downloads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from labkit.runtime import InputError, SourceError, as_one_line, find_root_cause, is_interactive

CHUNK = 1 << 20
RETRIES = 3
READERS = 8  # files read at a time; on a network drive the waiting adds up otherwise
FINE_CLOCK_NS, COARSE_CLOCK_NS = 100_000_000, 2_000_000_000
STALE = 3600.0  # seconds after which nobody writes to a temporary file any more
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")  # as `open_atomic` names them
POOCH_TEMPORARY = re.compile(r"(tmp)[a-z0-9_]{8}")
NO_SUCH_FEATURE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def get_cache_dir() -> Path:
    """Return the folder of decoded data and downloads: `LABKIT_CACHE`, else `~/.cache/labkit`.

    Raises:
        InputError: neither is known.

    Example:
        >>> path = get_cache_dir() / "photo.jpg"
    """
    if chosen := os.environ.get("LABKIT_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "labkit"
    except RuntimeError as error:
        raise InputError(
            "this user has no home folder; name one for data in the variable LABKIT_CACHE"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # network drives often have no fsync for folders
        if error.errno not in NO_SUCH_FEATURE:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` when the block ends, whole and durable.

    An exception inside the block leaves the old file at `path` untouched and no other file behind.
    What a killed process left of earlier files of this name is removed once it is an hour old.

    Raises:
        SourceError: the file could not be written; the message names a full disk.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.bin"
        >>> with open_atomic(path) as file:
        ...     _ = file.write(b"123")
        ...     path.exists()
        False
        >>> path.read_bytes()
        b'123'
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name, older_than=STALE)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except SourceError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(
    folder: Path,
    name: str | None = None,
    *,
    older_than: float = 0.0,
    pattern: re.Pattern[str] = TEMPORARY,
) -> None:
    """Remove the temporary files in `folder` that processes left when they were killed.

    Args:
        folder: is not searched deeper; it may be missing.
        name: of the file that they were to become; None for any.
        older_than: seconds since they were last written to. Where no other process can be at
            work in `folder`, 0 will do.
        pattern: what their names look like; its first group is the name of the file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in (".a.json.0123456789abcdef", "a.json", ".hidden"):
        ...     (folder / name).touch()
        >>> remove_leftovers(folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['.hidden', 'a.json']
    """
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        for entry in listing:
            match = pattern.fullmatch(entry.name)
            if match is None or name not in (None, match[1]):
                continue
            with contextlib.suppress(OSError):
                if entry.is_file() and time.time() - entry.stat().st_mtime >= older_than:
                    os.unlink(entry)


def _unwritable(path: Path, error: OSError) -> SourceError:
    return SourceError(
        f"could not write {path}: {error.strerror or error}. "
        "Free some space or choose another folder; what was there before is intact."
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with open_atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.json"
        >>> write_json(path, {"accuracy": 0.5})
        >>> json.loads(path.read_text())
        {'accuracy': 0.5}
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Return the value that a JSON text describes.

    Raises:
        ValueError: the text is damaged in any way, brackets without end included.

    Example:
        >>> parse_json('{"accuracy": 0.5}')
        {'accuracy': 0.5}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to `path` atomically, each as one line of JSON."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def compute_checksum(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of the file at `path` in hex.

    Args:
        path: the file.
        algorithm: a name that `hashlib` knows.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> compute_checksum(path, "md5")
        'd41d8cd98f00b204e9800998ecf8427e'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def compute_checksums(paths: Sequence[Path], *, hints: Path) -> list[str]:
    """Return the SHA-256 of each file in hex, and read only files that may have changed.

    `hints` remembers the checksum of a file by its path, size, times and inode. It only saves
    time: without it, or if it is damaged or cannot be written, every file is read. A file that
    changed a moment ago is read again the next time too, since a second change within one tick of
    the clock would leave its times as they are.

    Args:
        paths: the files.
        hints: a JSON file, best one for each data set; it is written where it would change.

    Raises:
        SourceError: a file could not be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_bytes(b"1"), (folder / "b").write_bytes(b"1")
        >>> first, second = compute_checksums([folder / "a", folder / "b"], hints=folder / "hints")
        >>> first == second
        True
    """
    from tqdm.auto import tqdm

    remembered, now = _read_hints(hints), time.time_ns()
    states = [_read_state(path) for path in paths]
    digests = [_recall(remembered, path, state) for path, state in zip(paths, states, strict=True)]
    unknown = [index for index, digest in enumerate(digests) if not digest]
    hidden = not unknown or not is_interactive()
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(unknown), desc="reading", unit="file", disable=hidden) as progress,
    ):
        computed = pool.map(hash_file, [paths[index] for index in unknown])
        for index, digest in zip(unknown, computed, strict=True):
            digests[index] = digest
            progress.update()
    settled = {
        os.fspath(path): [*state, digest]
        for path, state, digest in zip(paths, states, digests, strict=True)
        if _is_settled(state, now)
    }
    if settled != remembered:
        with contextlib.suppress(SourceError):
            write_text(hints, json.dumps(settled))
    return digests


def _read_hints(path: Path) -> dict[str, Any]:
    try:
        rows = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return rows if isinstance(rows, dict) else {}


def _read_state(path: Path) -> list[int]:
    """Size, times of change and inode of a file: they differ where its content does."""
    try:
        status = path.stat()
    except OSError as error:
        raise describe_unreadable(path, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _recall(remembered: dict[str, Any], path: Path, state: list[int]) -> str:
    """The checksum that is remembered of a file in this state; empty if there is none."""
    row = remembered.get(os.fspath(path))
    return str(row[-1]) if isinstance(row, list) and row[:-1] == state else ""


def _is_settled(state: list[int], now: int) -> bool:
    """Whether a file last changed more than a tick of its clock before `now`."""
    changed = max(state[1:3])
    tick = FINE_CLOCK_NS if changed % 1_000_000_000 else COARSE_CLOCK_NS
    return changed + tick < now


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal text.

    Raises:
        SourceError: it cannot be read, such as a link that leads nowhere, or a folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> hash_file(path)[:8]
        'e3b0c442'
    """
    try:
        return compute_checksum(path)
    except OSError as error:
        raise describe_unreadable(path, error) from error


def describe_unreadable(name: object, error: OSError) -> SourceError:
    """Return the error that says of a file or folder `name` why it could not be read.

    Example:
        >>> print(describe_unreadable("photo.png", OSError(5, "Input/output error")))
        photo.png could not be read: Input/output error; check its permissions and disk
    """
    return SourceError(
        f"{name} could not be read: {error.strerror or error}; check its permissions and disk"
    )


def mirror_folder(
    source: Path, target: Path, *, prune: str, verified: dict[str, list[int]] | None = None
) -> None:
    """Copy new and changed files of `source` to `target`, and read every copy back.

    This serves a drive that can lose files, such as Google Drive in Colab: the training writes to
    `source` on the local disk, and `target` lies on the drive. `source` may change meanwhile, as
    a run does: what changes or vanishes under the copy is left to the next call. Hidden files and
    folders, which are unfinished, are left out.

    Args:
        source: the folder to copy.
        target: the copy; it is created if it is missing.
        prune: a subfolder; files and folders in it that `source` no longer has are removed from
            `target` too, once all that `source` has are copied.
        verified: the state of each file that an earlier call has copied and read back. Such files
            are not read again until they change. The call notes there what it has verified.

    Raises:
        SourceError: a folder or file could not be read, a file could not be written, or does not
            read back as it was written.

    Example:
        >>> import tempfile
        >>> source, target = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> _ = (source / "history.jsonl").write_text("{}")
        >>> mirror_folder(source, target, prune="checkpoints")
        >>> (target / "history.jsonl").read_text()
        '{}'
    """
    verified = {} if verified is None else verified
    unread: list[OSError] = []
    names = sorted(
        Path(folder, name).relative_to(source)
        for folder, _, files in os.walk(source, onerror=unread.append)
        for name in files
    )
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    for error in unread:
        if not isinstance(error, FileNotFoundError):  # a folder that vanished is left out
            raise describe_unreadable(error.filename, error) from error
    is_whole = not unread
    for name in names:
        state: list[int] = []
        try:
            state = _read_state(source / name)
            if verified.get(str(name)) != state or not _has_size(target / name, state[0]):
                _copy_verified(source / name, target / name)
                verified[str(name)] = state
        except SourceError:
            if (source / name).exists() and _read_state(source / name) == state:
                raise
            is_whole = False
    kept = {name.parts[1] for name in names if name.parts[0] == prune and len(name.parts) > 1}
    if kept and is_whole:
        for path in (target / prune).glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _copy_verified(source: Path, target: Path) -> None:
    """Copy a file, unless `target` is equal to it, and compare what reads back."""
    digest = f"sha256:{hash_file(source)}"
    if has_digest(target, digest):
        return
    with open_atomic(target) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)
    if not has_digest(target, digest):
        raise SourceError(f"{target} does not read back as written; is the drive full?")


def has_digest(path: Path, digest: str) -> bool:
    """Return whether `path` is a file with the checksum `digest`.

    Args:
        path: the file; it may be missing.
        digest: "sha256:..." or "md5:..." in hex.

    Raises:
        InputError: `digest` is not written in this form.

    Example:
        >>> has_digest(Path("missing"), "md5:d41d8cd98f00b204e9800998ecf8427e")
        False
    """
    algorithm, _, expected = digest.partition(":")
    if algorithm not in hashlib.algorithms_available or not expected:
        raise InputError(f"digest must look like 'sha256:1f3a...', got {digest!r}")
    return path.is_file() and compute_checksum(path, algorithm) == expected.lower()


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Let one process at a time work on `path`; the others wait at the start of the block.

    On a file system without locks nobody waits, so the work must also be atomic.

    Args:
        path: a file or folder, which need not exist; the lock stands beside it.
        wait: whether to wait for another process; otherwise it is an error that there is one.

    Raises:
        InputError: another process works on `path`, and `wait` is not set.
        SourceError: the folder of `path` cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> with lock_file(path):
        ...     _ = path.write_bytes(b"written by one process at a time")
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process is at work on {path}; wait until it has ended, or choose another "
            "folder"
        ) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_SUCH_FEATURE:
            raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def download(url: str, path: Path, *, digest: str, timeout: float = 30.0) -> Path:
    """Download `url` to `path` and return `path`.

    The file appears under its name only when it is whole and has the right checksum. A file that
    is already there with the right checksum costs no request. Several processes may ask for the
    same `path`: one downloads, the others wait. A broken connection, a time-out, a server error
    or a wrong checksum is tried again three times, each time from the beginning.

    Args:
        url: an https address; plain http is allowed for a loopback address only. Redirects are
            held to the same rule.
        path: the file to write.
        digest: the expected checksum, "sha256:..." or "md5:..." in hex.
        timeout: longest silence of the server, to connect or between two pieces, in seconds.

    Raises:
        InputError: the address or the digest cannot be used.
        SourceError: the server, the connection, the checksum or the disk failed.
    """
    if not (url.startswith("https://") or _is_loopback(url)):
        raise InputError(f"url must start with https://, got {url!r}")
    if has_digest(path, digest):
        return path
    with lock_file(path):
        if not has_digest(path, digest):
            _fetch(url, path, digest, timeout)
    return path


def _fetch(url: str, path: Path, digest: str, timeout: float) -> None:
    """Let pooch download `url`, and say in one line why if it cannot."""
    import pooch
    import requests

    def check_response(response: requests.Response, **_: object) -> None:
        """Refuse at once a response that another try would not change; pooch retries the rest."""
        responses.callback(response.close)
        response.raw.headers.pop("Content-Encoding", None)  # the checksum is that of the raw bytes
        if response.is_redirect:
            target = urljoin(response.url, response.headers["Location"])
            if not (target.startswith("https://") or (_is_loopback(url) and _is_loopback(target))):
                raise SourceError(f"{failed}: it leads to {as_one_line(target)}, not to https")
        elif 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise SourceError(f"{failed}: the server answered {response.status_code}")
        elif response.ok and response.headers.get("Content-Type", "").startswith("text/html"):
            raise SourceError(
                f"{failed}: an HTML page came instead of data. "
                "Is there a sign-in page or a proxy between this machine and the network?"
            )

    failed, responses = f"could not download {url}", contextlib.ExitStack()
    downloader = pooch.HTTPDownloader(
        progressbar=True,
        chunk_size=CHUNK,
        timeout=timeout,
        headers={"Accept-Encoding": "identity"},
        hooks={"response": check_response},
    )
    remove_leftovers(path.parent, older_than=STALE, pattern=POOCH_TEMPORARY)
    files = pooch.create(
        path.parent,
        base_url="",
        registry={path.name: digest},
        urls={path.name: url},
        retry_if_failed=RETRIES,
    )
    try:
        with responses:  # pooch does not close a response that broke off
            files.fetch(path.name, downloader=downloader)
        with contextlib.suppress(OSError):
            path.chmod(0o644)  # pooch lets only the owner read it
    except SourceError:
        raise
    except requests.HTTPError as error:
        raise SourceError(f"{failed}: the server answered {error.response.status_code}") from error
    except requests.RequestException as error:
        reason = getattr(error.args[0] if error.args else error, "reason", error)
        text = re.sub(r"^(<.*?>|\w+\(.*?\)): ", "", str(reason))  # without an object of urllib3
        cause = f"no connection, or it broke off ({text})"
        if isinstance(error, requests.Timeout) or "timed out" in str(error):
            cause = f"no answer within {timeout:g} s"
        raise SourceError(f"{failed}: {cause}") from error
    except OSError as error:
        raise _unwritable(path, error) from error
    except ValueError as error:
        if "hash" not in str(error):  # an address that cannot be parsed
            raise SourceError(f"{failed}: {as_one_line(error)}") from error
        raise SourceError(f"{url} arrived with a wrong checksum (expected {digest})") from error


def _is_loopback(url: str) -> bool:
    """Return whether `url` is a web address on this machine itself."""
    parts = urlsplit(url)
    try:
        loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        loopback = parts.hostname == "localhost"
    return loopback and parts.scheme in ("http", "https")


def download_from_hub(
    repo: str, filename: str, *, revision: str, digest: str | None, repo_type: str = "model"
) -> Path:
    """Return the path of a verified file of the Hugging Face hub, in the hub's own cache.

    The file is downloaded if the cache lacks it. A file with a wrong checksum is removed from the
    cache, so that the next call downloads it anew.

    Args:
        repo: the repository, "owner/name".
        filename: the path of the file in the repository.
        revision: the commit, or a branch.
        digest: the expected checksum, "sha256:..." in hex; None checks nothing.
        repo_type: "model" or "dataset".

    Raises:
        SourceError: the hub, the connection, the checksum or the disk failed.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import HfHubHTTPError

    source: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    try:
        if try_to_load_from_cache(repo, filename, **source) is None:
            # Without a network this fails at once, where hf_hub_download would try for 23 seconds.
            with contextlib.suppress(HfHubHTTPError):  # the hub answered: worth another try
                get_hf_file_metadata(hf_hub_url(repo, filename, **source))
        path = Path(hf_hub_download(repo, filename, repo_type=repo_type, revision=revision))
    except Exception as error:  # its own, httpx's, hf_xet's and the system's have no common base
        raise SourceError(
            f"could not download {filename} of {repo}: {find_root_cause(error)}"
        ) from error
    if digest is not None and not has_digest(path, digest):
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise SourceError(
            f"{filename} of {repo} has a wrong checksum (expected {digest}). "
            "It was removed; run again to download it anew."
        )
    return path
