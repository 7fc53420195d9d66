"""Fixtures for all tests: a cache of one's own, a loopback server, the real pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback import LoopbackHub, LoopbackServer


@pytest.fixture(autouse=True)
def labkit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
def hub(
    loopback: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    """A stand-in for the Hugging Face hub that `huggingface_hub` talks to in this test."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    template = loopback.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", loopback.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield LoopbackHub(loopback)
    close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip every sleep between retries; the list collects how long they would have been."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real CIFAR-10 pixels, or a skip."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LABKIT_DATA") or beside)
    if not (folder / "cifar10-jpeg").is_dir():
        pytest.skip(f"no real data: {folder / 'cifar10-jpeg'} is missing (set LABKIT_DATA)")
    return folder
