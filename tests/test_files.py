"""Atomic writes, checksums and downloads that count only when whole."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from labkit import files
from labkit.files import (
    RETRIES,
    compute_checksums,
    download,
    download_from_hub,
    get_cache_dir,
    has_digest,
    lock_file,
    mirror_folder,
    open_atomic,
    parse_json,
    write_json,
)
from labkit.runtime import InputError, SourceError
from tests.conftest import hub_at
from tests.loopback import Fault, LoopbackHub, LoopbackServer

BODY = np.random.default_rng(0).bytes(400_000)
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()
TIMEOUT = 0.25


def fetch(url: str, path: Path, *, digest: str = DIGEST) -> Path:
    return download(url, path, digest=digest, timeout=TIMEOUT)


def names_in(folder: Path) -> list[str]:
    """The files in `folder` but for the locks, which are hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_atomic_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.bin"
    with open_atomic(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), open_atomic(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_named_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, [1])
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SourceError, match="No space left on device"):
        write_json(path, [2])
    assert path.read_text() == "[\n  1\n]\n"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_a_source_passes_through_atomic_file_unchanged(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^the hub is away$"), open_atomic(tmp_path / "a"):
        raise SourceError("the hub is away")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_atomic_file_follows_the_umask(tmp_path: Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"")
    with open_atomic(atomic):
        pass
    assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_unwritable_folder_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceError, match="could not write"):
        write_json(tmp_path / "file" / "value.json", 1)
    with pytest.raises(SourceError, match="could not write"), lock_file(tmp_path / "file" / "x"):
        pass
    with pytest.raises(SourceError, match="could not write"):
        fetch("https://example.com/data", tmp_path / "file" / "data")


@pytest.mark.parametrize("folder_sync", [errno.EINVAL, errno.ENOTSUP])
def test_drive_without_folder_sync_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_sync: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(folder_sync, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "value.json", 1)
    assert (tmp_path / "value.json").read_text() == "1\n"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is read for a checksum, from now on."""
    names: list[str] = []
    compute = files.compute_checksum

    def record(path: Path, algorithm: str = "sha256") -> str:
        names.append(path.name)
        return compute(path, algorithm)

    monkeypatch.setattr(files, "compute_checksum", record)
    monkeypatch.setattr(files, "FINE_CLOCK_NS", 0)
    return names


def write_three(folder: Path) -> list[Path]:
    paths = [folder / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 100)
    time.sleep(0.05)  # longer than a tick of the clock of any file system that tests run on
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_each_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    paths, hints = write_three(tmp_path), tmp_path / "cache" / "hints.json"
    expected = [sha256(path) for path in paths]
    assert compute_checksums(paths, hints=hints) == expected
    assert sorted(hashed) == ["a", "b", "c"]
    assert compute_checksums(paths[::-1], hints=hints) == expected[::-1]
    assert len(hashed) == 3


@pytest.mark.parametrize("replace", [False, True], ids=["in-place", "another-file"])
def test_other_content_of_the_same_size_and_time_is_noticed(
    tmp_path: Path, hashed: list[str], replace: bool
) -> None:
    paths, hints = write_three(tmp_path), tmp_path / "hints.json"
    compute_checksums(paths, hints=hints)
    status = paths[1].stat()
    if replace:
        paths[1].rename(tmp_path / "before")
    paths[1].write_bytes(b"x" * 100)
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert paths[1].stat().st_mtime_ns == status.st_mtime_ns
    assert compute_checksums(paths, hints=hints)[1] == sha256(paths[1])
    assert sorted(hashed) == ["a", "b", "b", "c"]


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 3}', "{"])
def test_damaged_hints_only_cost_time(tmp_path: Path, hashed: list[str], text: str) -> None:
    paths, hints = write_three(tmp_path), tmp_path / "hints.json"
    hints.write_text(text)
    for _ in range(2):
        assert compute_checksums(paths, hints=hints) == [sha256(path) for path in paths]
    assert len(hashed) == 3


def test_hints_that_cannot_be_written_only_cost_time(tmp_path: Path) -> None:
    paths = write_three(tmp_path)
    assert len(compute_checksums(paths, hints=paths[0] / "hints.json")) == 3


def test_a_file_that_changed_a_moment_ago_is_read_again(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FINE_CLOCK_NS", 3600 * 10**9)
    paths, hints = write_three(tmp_path), tmp_path / "hints.json"
    for _ in range(2):
        compute_checksums(paths, hints=hints)
    assert len(hashed) == 6


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone could not be read: No such file"):
        compute_checksums([tmp_path / "gone"], hints=tmp_path / "hints.json")


@pytest.mark.parametrize("digest", ["", "abc", "sha256:", "crc7:00"])
def test_digest_without_algorithm_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(InputError, match="digest must look like"):
        has_digest(tmp_path / "none", digest)


def test_download_gives_the_bytes_and_nothing_else(
    loopback: LoopbackServer, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "data.bin"
    assert fetch(loopback.add("/data.bin", BODY), path) == path
    assert path.read_bytes() == BODY
    assert names_in(path.parent) == ["data.bin"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_download_can_be_read_by_everybody(loopback: LoopbackServer, tmp_path: Path) -> None:
    path = fetch(loopback.add("/data.bin", BODY), tmp_path / "data.bin")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_md5_counts_too(loopback: LoopbackServer, tmp_path: Path) -> None:
    digest = "md5:" + hashlib.md5(BODY).hexdigest()
    assert fetch(loopback.add("/data", BODY), tmp_path / "d", digest=digest).read_bytes() == BODY


def test_file_already_there_needs_no_request(loopback: LoopbackServer, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(BODY)
    fetch(loopback.add("/data.bin", BODY), path)
    assert loopback.requests == []


def test_damaged_file_stays_until_the_new_one_is_whole(
    loopback: LoopbackServer, tmp_path: Path, no_waiting: list[float]
) -> None:
    url, path = loopback.add("/data.bin", BODY), tmp_path / "data.bin"
    path.write_bytes(b"damaged")
    loopback.fail("/data.bin", *[Fault.WRONG_BYTES] * (1 + RETRIES))
    with pytest.raises(SourceError, match="wrong checksum"):
        fetch(url, path)
    assert path.read_bytes() == b"damaged"
    fetch(url, path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    "fault",
    [Fault.STALL, Fault.STALL_HALFWAY, Fault.SHORT_BODY, Fault.UNAVAILABLE, Fault.WRONG_BYTES],
)
def test_passing_fault_is_overcome(
    loopback: LoopbackServer, tmp_path: Path, no_waiting: list[float], fault: Fault
) -> None:
    url = loopback.add("/data.bin", BODY)
    loopback.fail("/data.bin", fault)
    assert fetch(url, tmp_path / "data.bin").read_bytes() == BODY
    assert len(loopback.requests) == 2
    assert len(no_waiting) == 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault.STALL, "no answer within 0.25 s"),
        (Fault.STALL_HALFWAY, "no answer within 0.25 s"),
        (Fault.SHORT_BODY, "broke off"),
        (Fault.UNAVAILABLE, "503"),
    ],
)
def test_lasting_fault_is_named_and_leaves_no_file(
    loopback: LoopbackServer,
    tmp_path: Path,
    no_waiting: list[float],
    fault: Fault,
    cause: str,
) -> None:
    url, path = loopback.add("/data.bin", BODY), tmp_path / "data.bin"
    loopback.fail("/data.bin", *[fault] * 9)
    with pytest.raises(SourceError, match=cause) as caught:
        fetch(url, path)
    assert str(caught.value).isprintable() and caught.value.__cause__
    assert len(loopback.requests) == 1 + RETRIES
    assert names_in(tmp_path) == []


def test_wrong_bytes_are_deleted(
    loopback: LoopbackServer, tmp_path: Path, no_waiting: list[float]
) -> None:
    url = loopback.add("/data.bin", BODY)
    loopback.fail("/data.bin", *[Fault.WRONG_BYTES] * (1 + RETRIES))
    with pytest.raises(SourceError, match="wrong checksum"):
        fetch(url, tmp_path / "data.bin")
    assert names_in(tmp_path) == []


def test_html_page_with_status_200_is_no_data(loopback: LoopbackServer, tmp_path: Path) -> None:
    url = loopback.add("/data.bin", BODY)
    loopback.fail("/data.bin", Fault.HTML_PAGE)
    with pytest.raises(SourceError, match="HTML page came instead of data"):
        fetch(url, tmp_path / "data.bin")
    assert len(loopback.requests) == 1
    assert names_in(tmp_path) == []


def test_missing_file_is_not_retried(loopback: LoopbackServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="404"):
        fetch(loopback.url + "/absent", tmp_path / "data.bin")
    assert len(loopback.requests) == 1


def test_nobody_listening_is_named(tmp_path: Path, no_waiting: list[float]) -> None:
    with LoopbackServer() as server:
        url = server.url
    with pytest.raises(SourceError, match=r"no connection, or it broke off \(Failed to .*refused"):
        fetch(url + "/data.bin", tmp_path / "data.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_stops_a_download(
    loopback: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = loopback.add("/data.bin", BODY), tmp_path / "data.bin"
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr("pooch.downloaders.open", lambda *_: full, raising=False)
    with pytest.raises(SourceError, match="No space left on device"):
        fetch(url, path)
    assert len(loopback.requests) == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["http://example.com/data", "ftp://example.com/data", "http://10.0.0.1/d", "data.bin"]
)
def test_address_must_be_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="https"):
        fetch(url, tmp_path / "data.bin")


def test_redirect_to_plain_http_is_refused(loopback: LoopbackServer, tmp_path: Path) -> None:
    url = loopback.add("/data.bin", b"", redirect="http://example.com/data.bin")
    with pytest.raises(SourceError, match=r"http://example\.com"):
        fetch(url, tmp_path / "data.bin")
    assert len(loopback.requests) == 1


def test_redirect_that_makes_no_sense_is_named(
    loopback: LoopbackServer, tmp_path: Path, no_waiting: list[float]
) -> None:
    url = loopback.add("/data.bin", b"", redirect="https://[half")
    with pytest.raises(SourceError, match=r"could not download .*Invalid IPv6 URL"):
        fetch(url, tmp_path / "data.bin")


def test_compressed_file_stays_compressed(loopback: LoopbackServer, tmp_path: Path) -> None:
    body = gzip.compress(BODY)
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    url = loopback.add("/data.gz", body, headers={"Content-Encoding": "x-gzip"})
    assert fetch(url, tmp_path / "data.gz", digest=digest).read_bytes() == body


def test_redirect_within_the_server_is_followed(loopback: LoopbackServer, tmp_path: Path) -> None:
    target = loopback.add("/real.bin", BODY)
    url = loopback.add("/data.bin", b"", redirect=target)
    assert fetch(url, tmp_path / "data.bin").read_bytes() == BODY


def test_callers_at_the_same_time_share_one_download(
    loopback: LoopbackServer, tmp_path: Path
) -> None:
    url, path = loopback.add("/data.bin", BODY), tmp_path / "data.bin"
    threads = [threading.Thread(target=fetch, args=(url, path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == BODY
    assert len(loopback.requests) == 1


def test_locked_blocks_run_one_after_another(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with lock_file(tmp_path / "data"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with lock_file(tmp_path / "data"):
        inside.set()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_work_goes_on_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(self: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with lock_file(tmp_path / "data"):
        pass


COMMIT = "5" * 40


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_hub_file_is_fetched_once(hub: LoopbackHub, repo_type: str) -> None:
    hub.add("lab/model", "sub/weights.bin", BODY, repo_type=repo_type, revision=COMMIT)
    for _ in range(2):
        path = download_from_hub(
            "lab/model", "sub/weights.bin", revision=COMMIT, digest=DIGEST, repo_type=repo_type
        )
        assert path.read_bytes() == BODY
    assert len([r for r in hub.server.seen("GET") if "resolve" in r.path]) == 1


def test_hub_file_with_wrong_bytes_is_removed_and_fetched_anew(hub: LoopbackHub) -> None:
    path = hub.add("lab/model", "weights.bin", BODY, revision=COMMIT)
    hub.server.fail(path, Fault.WRONG_BYTES)
    with pytest.raises(SourceError, match="wrong checksum"):
        download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    got = download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    assert got.read_bytes() == BODY


@pytest.mark.parametrize("fault", [Fault.STALL_HALFWAY, Fault.SHORT_BODY])
def test_hub_recovers_from_a_passing_fault(
    hub: LoopbackHub, no_waiting: list[float], fault: Fault
) -> None:
    path = hub.add("lab/model", "weights.bin", BODY, revision=COMMIT)
    hub.server.fail(path, fault)
    got = download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    assert got.read_bytes() == BODY


def test_silent_hub_is_named(hub: LoopbackHub) -> None:
    path = hub.add("lab/model", "weights.bin", BODY, revision=COMMIT)
    hub.server.fail(path, Fault.STALL)
    with pytest.raises(SourceError, match=r"weights\.bin of lab/model: timed out"):
        download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)


def test_hub_that_is_down_is_named(hub: LoopbackHub, no_waiting: list[float]) -> None:
    path = hub.add("lab/model", "weights.bin", BODY, revision=COMMIT)
    hub.server.fail(path, *[Fault.UNAVAILABLE] * 20, method="HEAD")
    with pytest.raises(SourceError, match="503"):
        download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    assert no_waiting


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_html_page_from_the_hub_is_no_data(hub: LoopbackHub, method: str) -> None:
    path = hub.add("lab/model", "weights.bin", BODY, revision=COMMIT)
    times = 2 if method == "HEAD" else 1  # the head is asked for twice
    hub.server.fail(path, *[Fault.HTML_PAGE] * times, method=method)
    with pytest.raises(SourceError, match=r"weights\.bin of lab/model"):
        download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    got = download_from_hub("lab/model", "weights.bin", revision=COMMIT, digest=DIGEST)
    assert got.read_bytes() == BODY


def test_a_hub_file_without_a_digest_is_not_checked(hub: LoopbackHub) -> None:
    hub.add("lab/data", "a.bin", BODY, repo_type="dataset")
    path = download_from_hub("lab/data", "a.bin", revision="main", digest=None, repo_type="dataset")
    assert path.read_bytes() == BODY


def test_stand_in_hub_lists_a_repository(hub: LoopbackHub) -> None:
    from huggingface_hub import HfApi

    hub.add("lab/model", "config.json", b"{}")
    hub.add("lab/model", "model.safetensors", BODY)
    api = HfApi(endpoint=hub.server.url)
    assert sorted(api.list_repo_files("lab/model")) == ["config.json", "model.safetensors"]
    assert len(api.model_info("lab/model").sha or "") == 40


def test_without_a_network_and_a_cache_the_hub_is_given_up_at_once(tmp_path: Path) -> None:
    with LoopbackServer() as gone:
        pass
    started = time.monotonic()
    with (
        hub_at(gone, tmp_path, timeout=10.0),
        pytest.raises(SourceError, match=r"could not download model\.bin of a/b: .*refused"),
    ):
        download_from_hub("a/b", "model.bin", revision="main", digest="sha256:00")
    assert time.monotonic() - started < 5


def write_generations(folder: Path, *names: str) -> None:
    for name in names:
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "state.pt").write_text(name)


def list_generations(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.rglob("state.pt"))


def test_a_mirror_follows_its_folder_but_not_what_is_unfinished(tmp_path: Path) -> None:
    source, target = tmp_path / "run", tmp_path / "drive"
    write_generations(source, "step-1", "step-2", ".partial-5")
    (source / ".history.jsonl.0a").write_text("half")
    verified: dict[str, list[int]] = {}
    mirror_folder(source, target, prune="checkpoints", verified=verified)
    assert list_generations(target) == ["step-1", "step-2"] and not list(target.glob(".*"))
    shutil.rmtree(source / "checkpoints" / "step-1")
    write_generations(source, "step-3")
    (target / "checkpoints" / "step-2" / "state.pt").unlink()  # the drive lost it
    mirror_folder(source, target, prune="checkpoints", verified=verified)
    assert list_generations(target) == ["step-2", "step-3"]


def test_a_generation_that_vanishes_under_the_copy_costs_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "run", tmp_path / "drive"
    write_generations(source, "step-1")
    mirror_folder(source, target, prune="checkpoints")
    shutil.rmtree(source / "checkpoints" / "step-1")
    write_generations(source, "step-2")
    copy = files._copy_verified

    def copy_too_late(path: Path, to: Path) -> None:
        shutil.rmtree(path.parent)  # by the training, which has newer ones
        copy(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_copy_verified", copy_too_late)
        mirror_folder(source, target, prune="checkpoints")
    assert list_generations(target) == ["step-1"]


def test_a_copy_that_does_not_read_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "run", tmp_path / "drive"
    write_generations(source, "step-1")
    monkeypatch.setattr(shutil, "copyfileobj", lambda original, file: file.write(b"less"))
    with pytest.raises(SourceError, match="does not read back"):
        mirror_folder(source, target, prune="checkpoints")


def test_leftovers_of_a_killed_process_are_removed_once_they_are_old(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    old, new, other = (
        tmp_path / f".{name}.{number:016x}"
        for name, number in (("data.bin", 1), ("data.bin", 2), ("other.bin", 3))
    )
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    with open_atomic(path) as file:
        file.write(b"1")
    assert sorted(tmp_path.iterdir()) == sorted([new, other, path])


def test_leftovers_of_a_killed_download_are_removed_once_they_are_old(
    loopback: LoopbackServer, tmp_path: Path
) -> None:
    old, new = tmp_path / "tmpabcdefgh", tmp_path / "tmp_bcd1234"
    for left in (old, new):
        left.touch()
    os.utime(old, (0, 0))
    url = loopback.add("/data.bin", b"1")
    digest = "sha256:" + hashlib.sha256(b"1").hexdigest()
    download(url, tmp_path / "data.bin", digest=digest)
    assert not old.exists() and new.exists()


def test_json_of_any_damage_is_a_value_error() -> None:
    for text in ("[" * 200_000, b"\xff", "{", "", '{"a": ' * 100_000):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_folder_of_a_mirror_that_cannot_be_read_is_an_error(
    tmp_path: Path, deny_folder: Callable[[str], None]
) -> None:
    for folder in ("source/checkpoints/step-1", "target/checkpoints/step-0"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "state.pt").touch()
    deny_folder("step-1")
    with pytest.raises(SourceError, match=r"step-1 could not be read: Permission denied"):
        mirror_folder(tmp_path / "source", tmp_path / "target", prune="checkpoints")
    assert (tmp_path / "target/checkpoints/step-0/state.pt").exists()


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LABKIT_CACHE")
    monkeypatch.setattr(Path, "home", find_no_home)
    with pytest.raises(InputError, match="LABKIT_CACHE"):
        get_cache_dir()
