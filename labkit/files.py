"""Files that are whole or absent: atomic writes, checksums, verified downloads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from labkit.runtime import InputError, SourceError, find_root_cause
from labkit.transfer import TransferInterrupted, open_session, size, transfer

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20
NO_SUCH_FEATURE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def get_cache_dir() -> Path:
    """Where decoded data and downloads live: `LABKIT_CACHE`, else `~/.cache/labkit`."""
    return Path(os.environ.get("LABKIT_CACHE") or Path.home() / ".cache" / "labkit")


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
    """Open a binary file that takes the name `path`, complete and durable, when the block ends.

    An exception inside the block leaves whatever was at `path` untouched and nothing else behind.

    Raises:
        SourceError: the file could not be written; a full disk is named as such.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to `path` atomically, one JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def compute_checksum(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of the file at `path`."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def mirror_folder(source: Path, target: Path, *, prune: str) -> None:
    """Bring `target` up to date with `source`, reading every copy back to verify it.

    For a drive that can lose files, such as Google Drive in Colab: work in `source`, keep
    `target` there.

    Args:
        source: the folder that is worked in.
        target: the folder that follows it; created where it is missing.
        prune: the subfolder in which what `source` no longer has is removed from `target` too.

    Raises:
        SourceError: a file could not be written, or does not read back as it was written.
    """
    names = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for name in sorted(names):
        digest = f"sha256:{compute_checksum(source / name)}"
        if has_digest(target / name, digest):
            continue
        with open_atomic(target / name) as file, (source / name).open("rb") as original:
            shutil.copyfileobj(original, file)
        if not has_digest(target / name, digest):
            raise SourceError(f"{target / name} does not read back as written; is the drive full?")
    for path in (target / prune).glob("*"):
        if not (source / prune / path.name).exists():
            shutil.rmtree(path, ignore_errors=True)


def has_digest(path: Path, digest: str) -> bool:
    """Whether `path` is a file with this `digest`, written "sha256:..." or "md5:..." in hex.

    Raises:
        InputError: `digest` is not written so.
    """
    algorithm, _, expected = digest.partition(":")
    if algorithm not in hashlib.algorithms_available or not expected:
        raise InputError(f"digest must look like 'sha256:1f3a...', got {digest!r}")
    return path.is_file() and compute_checksum(path, algorithm) == expected.lower()


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Let one process at a time work on `path`; the others wait at the start of the block.

    Where the file system knows no locks nobody waits, so the work must also be atomic.

    Raises:
        SourceError: the folder of `path` cannot be written to.
    """
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_SUCH_FEATURE:
            raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def download(
    url: str,
    path: Path,
    *,
    digest: str,
    timeout: float = 30.0,
    retries: int = 3,
    backoff: float = 1.0,
) -> Path:
    """Download `url` to `path`, which appears only when whole and checked; return `path`.

    A file already there with the right digest is returned without a request. What an interrupted
    download left in `<name>.part` is resumed if the server allows it. Several processes may ask
    for the same `path`: one downloads, the others wait.

    Args:
        url: An https address; plain http is allowed for a loopback address only.
        path: The file to write.
        digest: The expected checksum, "sha256:..." or "md5:..." in hex.
        timeout: Longest silence of the server, to connect or between two pieces, in seconds.
        retries: How often in a row a broken connection, a time-out, a short body or a server
            error is tried again without anything new having come.
        backoff: Seconds before the first retry; each further one waits twice as long.

    Raises:
        InputError: the address or the digest cannot be used.
        SourceError: the server, the connection, the checksum or the disk failed.
    """
    part = path.with_name(path.name + ".part")
    if has_digest(path, digest):
        return path
    with open_session(url) as session, lock_file(path):
        if has_digest(path, digest):
            return path
        try:
            _complete(part, session, url, digest, timeout, retries, backoff)
            os.replace(part, path)
            sync_folder(path.parent)
        except SourceError:
            raise
        except OSError as error:
            raise _unwritable(path, error) from error
    return path


def _complete(
    part: Path,
    session: requests.Session,
    url: str,
    digest: str,
    timeout: float,
    retries: int,
    backoff: float,
) -> None:
    """Transfer into `part` until it has the `digest`."""
    failures, furthest = 0, size(part)
    while not has_digest(part, digest):
        resumed = size(part) > 0
        try:
            transfer(session, url, part, timeout=timeout)
        except TransferInterrupted as error:
            failures = 0 if size(part) > furthest else failures + 1
            furthest = max(furthest, size(part))
            if failures > retries:
                raise SourceError(
                    f"could not download {url}: {error}, {failures} times in a row "
                    f"({size(part):,} bytes are kept for the next try)"
                ) from error
            time.sleep(backoff * 2 ** max(failures - 1, 0))
            continue
        if not has_digest(part, digest):
            part.unlink()
            if not resumed:
                raise SourceError(f"{url} arrived with a wrong checksum (expected {digest})")


def download_from_hub(
    repo: str, filename: str, *, revision: str, digest: str, repo_type: str = "model"
) -> Path:
    """A checked file of the Hugging Face hub, from the hub's own cache if it is there.

    A file with a wrong digest is removed from the cache, so that the next call downloads anew.

    Args:
        repo: The repository, "owner/name".
        filename: The path of the file in the repository.
        revision: The commit.
        digest: The expected checksum, "sha256:..." in hex.
        repo_type: "model" or "dataset".

    Raises:
        SourceError: the hub, the connection, the checksum or the disk failed.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repo, filename, repo_type=repo_type, revision=revision))
    except Exception as error:  # its own, httpx's, hf_xet's and the system's have no common base
        raise SourceError(
            f"could not download {filename} of {repo}: {find_root_cause(error)}"
        ) from error
    if not has_digest(path, digest):
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise SourceError(
            f"{filename} of {repo} has a wrong checksum (expected {digest}). "
            "It was removed; run again to download it anew."
        )
    return path
