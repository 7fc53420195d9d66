"""Fixtures for all tests: a cache of one's own, a loopback server, the real pixels."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback import LoopbackHub, LoopbackServer

# The threads of a small network wait for each other far longer than they compute, above all on a
# busy machine. Torch, here and in the processes that tests start, reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Every test leaves settings of interpreter and libraries as it found them.

    Tests draw from random generators themselves, and libraries set variables, colours and the level
    of the log when they are first used; `19 global state` of the torture looks at those.
    """
    from tests.global_state import list_changes, read_settings

    before = read_settings()
    yield
    after, of_libraries = read_settings(), ("environment", "matplotlib", "level of the log")
    kept = {name: value for name, value in before.items() if name not in of_libraries}
    changed = list_changes(kept, after)
    assert not changed, f"left changed: {', '.join(changed)}"


@pytest.fixture(autouse=True)
def labkit_cache(global_state: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for every test."""
    folder = tmp_path / "labkit-cache"
    monkeypatch.setenv("LABKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def loopback() -> Iterator[LoopbackServer]:
    """A web server on this machine."""
    with LoopbackServer() as server:
        yield server


@pytest.fixture
def hub(loopback: LoopbackServer, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A stand-in for the Hugging Face hub that `huggingface_hub` talks to in this test."""
    with hub_at(loopback, tmp_path / "hub-cache"):
        yield LoopbackHub(loopback)


@contextlib.contextmanager
def hub_at(server: LoopbackServer, cache: Path, timeout: float = 0.3) -> Iterator[None]:
    """Make `huggingface_hub` talk to `server` alone, with a cache and a patience of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": timeout,
        "HF_HUB_DOWNLOAD_TIMEOUT": timeout,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield
    close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip every sleep between retries; the list collects how long they would have been."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def find_data(needed: str, what: str) -> Path:
    """The folder of data that is not part of the repository, or a skip if `needed` is not in it."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LABKIT_DATA") or beside)
    if not (folder / needed).is_dir():
        pytest.skip(f"no {what}: {folder / needed} is missing (set LABKIT_DATA)")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real CIFAR-10 pixels, or a skip."""
    return find_data("cifar10-jpeg", "real data")


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder with the annotated photographs, `camvid` and `photos`, or a skip."""
    return find_data("camvid", "photographs")


@pytest.fixture
def deny_folder(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make folders of a name unreadable, which permissions cannot do for the superuser."""
    scan = os.scandir

    def deny(name: str) -> None:
        def refuse(path: Any) -> Any:
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return deny


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twins of the published models with random weights: `clipseg/` and `sam2/` as on the hub."""
    from benchmarks.standins import write_clipseg, write_sam2

    folder = tmp_path_factory.mktemp("full-size")
    write_clipseg(folder / "clipseg")
    write_sam2(folder / "sam2")
    yield folder
    shutil.rmtree(folder)  # pytest would keep the last three, 0.8 GB each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the internet are skipped unless LABKIT_NETWORK says that it is there."""
    if not os.environ.get("LABKIT_NETWORK"):
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="needs the internet: set LABKIT_NETWORK=1"))
