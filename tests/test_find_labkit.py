"""The set-up cells: where labkit comes from, and that the cells carry the text that is tested."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import nbformat
import pytest

from tests.loopback import Fault, LoopbackServer

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("q1.ipynb", "q2.ipynb")
PLACES = (*NOTEBOOKS, "README.md", "pyproject.toml")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


find_labkit = load_script("find_labkit")
prepare_notebooks = load_script("prepare_notebooks")
colab_check = load_script("colab_check")


def read_setup(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in notebook.cells if "setup" in c.metadata.get("tags", []))
    return str(cell.source)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_set_up_cell_carries_the_text_of_the_script(name: str) -> None:
    (line,) = (x for x in read_setup(ROOT / name).split("\n") if x.startswith("FIND_LABKIT = "))
    text = (ROOT / "scripts" / "find_labkit.py").read_text(encoding="utf-8")
    assert line == f"FIND_LABKIT = {text!r}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada/labkit", ("https://github.com/ada/labkit", "")),
        (" ada/my.fork@v1.2 ", ("https://github.com/ada/my.fork", "v1.2")),
        ("https://github.com/ada/labkit.git@a/b-c", ("https://github.com/ada/labkit", "a/b-c")),
        ("https://github.com/ada/labkit/", ("https://github.com/ada/labkit", "")),
        ("https://git.example.org/x/labkit@0a1b", ("https://git.example.org/x/labkit", "0a1b")),
        ("file:///home/ada/labkit", ("file:///home/ada/labkit", "")),
    ],
)
def test_repositories_are_names_or_addresses_with_a_ref(text: str, expected: object) -> None:
    assert find_labkit.parse_repository(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("labkit", "a/b/c", "ada/lab kit", "-x/labkit", "ada/labkit; ls", "http://github.com/a/b"),
        *("https://user:word@github.com/a/b", "ada/labkit@", "ada/labkit@-x", "ada/labkit@a..b"),
        *("ada/labkit@a b", "ada/labkit@--upload-pack=x", "git+ssh://x/y", "ada/labkit#egg=x"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    if text.endswith("@"):  # no ref is no ref
        assert find_labkit.parse_repository(text)[1] == ""
        return
    with pytest.raises(SystemExit, match="must be"):
        find_labkit.parse_repository(text)


def make_session(address: str) -> dict[str, Any]:
    """A session as Colab lists it for a notebook opened from `address`."""
    return {"id": "1", "path": f"fileId={quote(address, safe='')}", "name": "q1.ipynb"}


def serve(server: LoopbackServer, *sessions: object) -> str:
    body = json.dumps(list(sessions)).encode()
    return server.add("/api/sessions", body, headers={"Content-Type": "application/json"})


FORK = "https://github.com/ada/my-fork/blob/try/2/q1.ipynb"


def test_repository_is_that_from_which_colab_opened_the_notebook(loopback: LoopbackServer) -> None:
    other = {"path": "fileId=1aBcD", "name": "other.ipynb"}
    address = serve(loopback, other, make_session(FORK), make_session(FORK.replace("q1", "q2")))
    found = find_labkit.find_opened_from([loopback.url + "/none", address])
    assert found == ("https://github.com/ada/my-fork", "try/2")


@pytest.mark.parametrize("ref", ["0123456789abcdef0123456789abcdef01234567", "main", "try/2"])
def test_colab_check_plays_the_session_list_of_a_fork(
    ref: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    with colab_check.serve_sessions(
        tmp_path, f"https://github.com/ada/my-fork/blob/{ref}/q2.ipynb"
    ):
        server, colab = find_labkit.list_sessions()
        found = find_labkit.find_opened_from([server])
    assert found == ("https://github.com/ada/my-fork", ref)
    assert colab == find_labkit.COLAB_SESSIONS


def test_colab_check_takes_this_repository_for_the_fork_and_asks_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = tmp_path / "here"
    subprocess.run(["git", "init", "--quiet", repository], check=True)
    monkeypatch.setattr(colab_check, "ROOT", repository)
    for name, value in colab_check.make_git_settings().items():
        monkeypatch.setenv(name, value)
    commands = [["git", "ls-remote", address] for address in (colab_check.FORK, "https://x.test/y")]
    fork, other = (subprocess.run(c, capture_output=True, text=True) for c in commands)
    assert fork.returncode == 0
    assert "transport 'https' not allowed" in other.stderr


@pytest.mark.parametrize(
    "sessions",
    [
        [],
        [{"path": "q1.ipynb"}, None, 5, {"path": None}],
        [make_session("https://github.com.evil.org/ada/labkit/blob/main/q1.ipynb")],
        [make_session("https://github.com/ada/labkit/blob/main/other.ipynb")],
        [make_session("https://github.com/ada/labkit/blob/../../x/q1.ipynb")],
        [make_session("https://github.com/ada/labkit;ls/blob/main/q1.ipynb")],
        [make_session(FORK), make_session(FORK.replace("ada", "eve"))],  # which of the two?
    ],
    ids=["none", "strange", "other host", "other notebook", "dots", "shell", "two repositories"],
)
def test_what_names_no_single_repository_ends_in_one_clear_sentence(
    loopback: LoopbackServer, sessions: list[object]
) -> None:
    with pytest.raises(SystemExit, match="owner/name, or upload the folder of labkit"):
        find_labkit.find_opened_from([serve(loopback, *sessions)])


def test_a_silent_list_of_sessions_is_given_up_after_two_seconds(loopback: LoopbackServer) -> None:
    address = serve(loopback, make_session(FORK))
    loopback.fail("/api/sessions", Fault.STALL)
    started = time.monotonic()
    with pytest.raises(SystemExit, match="labkit was not found"):
        find_labkit.find_opened_from([address])
    assert 1.5 < time.monotonic() - started < 6


class Commands:
    """In the place of pip: keeps what it was asked to install."""

    def __init__(self) -> None:
        self.sources: list[list[str]] = []

    def run(self, command: list[str], **_: object) -> None:
        assert command[1:4] == ["-m", "pip", "install"]
        if "--require-hashes" in command:
            assert {"--no-deps", "--no-build-isolation"} <= set(command)
            self.sources.append([Path(command[command.index("-r") + 1]).read_text()])
            return
        self.sources.append([part for part in command[4:] if not part.startswith("--")])


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(subprocess, "run", commands.run)
    return commands


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find_spec = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> Any:
        return None if name in names else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)


def test_an_installed_labkit_is_used(commands: Commands, capsys: Any) -> None:
    find_labkit.install_labkit("ada/labkit", extras=["segment"], needs=["sam2"])
    assert commands.sources == [] and "labkit is installed" in capsys.readouterr().out


def test_extras_that_an_installed_labkit_lacks_are_added(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "sam2", "hydra")
    find_labkit.install_labkit(extras=["segment"], needs=["sam2", "hydra"])
    added, sam2 = commands.sources
    assert any(requirement.startswith("hydra-core") for requirement in added)
    assert not any(requirement.startswith("labkit") for requirement in added)
    assert sam2 == [find_labkit.SAM2]


def test_sam2_is_pinned_alike_wherever_it_is_installed() -> None:
    (pin,) = (
        line
        for line in (ROOT / "requirements-sam2.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert pin == find_labkit.SAM2
    assert re.fullmatch(r"sam2==[\d.]+ --hash=sha256:[0-9a-f]{64}", pin)
    assert pin.split()[0] in (ROOT / "constraints.txt").read_text().splitlines()
    assert "sam2" in (ROOT / "requirements.txt").read_text().splitlines()
    makefile = (ROOT / "Makefile").read_text()
    by_hash = "--no-build-isolation --no-deps --require-hashes -r requirements-sam2.txt"
    assert 0 < makefile.index(by_hash) < makefile.index("-r requirements.txt")


def test_a_checkout_beside_the_notebook_comes_before_a_repository(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    hide(monkeypatch, "labkit")
    (tmp_path / "labkit" / "labkit").mkdir(parents=True)
    (tmp_path / "labkit" / "labkit" / "__init__.py").touch()
    (tmp_path / "labkit" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    find_labkit.install_labkit("ada/labkit", extras=["segment"])
    assert commands.sources == [[f"{tmp_path / 'labkit'}[segment]"]]
    assert f"checkout {tmp_path / 'labkit'}" in capsys.readouterr().out


def test_a_folder_of_the_name_is_no_installed_labkit(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "labkit" / "labkit").mkdir(parents=True)
    (tmp_path / "labkit" / "labkit" / "__init__.py").touch()
    (tmp_path / "labkit" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    namespace = importlib.machinery.PathFinder.find_spec("labkit", [str(tmp_path)])
    assert namespace and namespace.origin is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    find_labkit.install_labkit()
    assert commands.sources == [[str(tmp_path / "labkit")]]


def test_the_named_repository_comes_before_the_one_it_was_opened_from(
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loopback: LoopbackServer,
    capsys: Any,
) -> None:
    hide(monkeypatch, "labkit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_labkit, "list_sessions", lambda: [serve(loopback, make_session(FORK))])
    find_labkit.install_labkit("eve/labkit@v2", extras=["segment"])
    find_labkit.install_labkit()
    assert commands.sources == [
        ["labkit[segment] @ git+https://github.com/eve/labkit@v2"],
        ["labkit @ git+https://github.com/ada/my-fork@try/2"],
    ]
    assert "https://github.com/ada/my-fork at try/2" in capsys.readouterr().out


def test_no_place_names_an_owner() -> None:
    for name in PLACES:
        text = (ROOT / name).read_text(encoding="utf-8")
        owners = set(re.findall(r"github(?:\.com)?/([A-Za-z0-9-]+/[\w.-]+)", text))
        assert owners <= {"owner/name"}, name
    assert "labkit/labkit" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_installs_the_other_labkit_from_the_index() -> None:
    paths = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "labkit").rglob("*.py")]
    for path in [*paths, *(ROOT / "scripts").glob("*.py"), *(ROOT / n for n in NOTEBOOKS)]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install[^\n]*[\s'\"]labkit(\[[a-z,]*\])?['\"]?(\s|$|,)", text)


def test_address_is_written_into_all_places_at_once(tmp_path: Path) -> None:
    for name in PLACES:
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, ROOT / "scripts" / "prepare_notebooks.py", "--root", tmp_path]
    for repository in ("ada/first", "ada/labkit"):  # the second replaces the first
        subprocess.run([*command, "--repo", repository], check=True)
        for name in PLACES:
            text = (tmp_path / name).read_text(encoding="utf-8")
            found = set(re.findall(r"github(?:\.com)?/([A-Za-z0-9-]+/[\w.-]+)", text))
            assert found - {"owner/name"} == {repository}, name
    for name in NOTEBOOKS:
        nbformat.validate(nbformat.read(tmp_path / name, as_version=4))
        assert read_setup(tmp_path / name) == read_setup(ROOT / name)
    bad = subprocess.run([*command, "--repo", "nonsense"], capture_output=True, text=True)
    assert bad.returncode and "owner/name" in bad.stderr
