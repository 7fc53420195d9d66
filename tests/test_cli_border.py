"""Every option of every command meets values that it cannot have: one line, never a traceback."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer.main
from PIL import Image

from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.cli import app, main
from labkit.runtime import InputError, SourceError, pick_device

NUMBERS = ("-1", "99999999999999999999999", "nan", "inf", "1e400", "", "three")
DEVICES = ("cuda:99", "meta", "xla", "cpu:7", "", ":", "9" * 50)
PLACES = ("x" * 5000, "/proc/version/x", "~nobody/x", "/proc/none", "\udce9", "a.png", "/dev/null")
WORDS = ("", "no-such", "x" * 5000, "é" * 300, "\udce9")
COMMANDS = {
    "train": ["--preset", "demo", "--data", "images", "--out", "out"],
    "eval": ["run"],
    "predict": ["run", "a.png"],
    "segment": ["a.png", "--prompt", "star", "--profile", "demo", "--out", "out"],
    "ablate": ["--data", "images", "--claims", "crop-flip", "--out", "out"],
    "bench segment": ["--profile", "demo", "--out", "out.json"],
    "bench train": ["--presets", "demo", "--out", "out.json"],
}


def list_options() -> list[tuple[str, click.Parameter]]:
    """Every option and argument of every command that takes a value."""
    top: Any = typer.main.get_command(app)
    commands = {name: command for name, command in top.commands.items() if name != "bench"}
    commands |= {f"bench {n}": command for n, command in top.commands["bench"].commands.items()}
    assert set(commands) == {*COMMANDS, "doctor"}
    return [
        (name, parameter)
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "is_flag", False)
    ]


def choose_values(parameter: click.Parameter) -> tuple[str, ...]:
    """Values that a parameter cannot have, or hardly."""
    if parameter.type.name in ("integer", "float", "int"):
        return NUMBERS
    if parameter.name == "device":
        return DEVICES
    return PLACES if parameter.name in ("out", "data", "run", "images") else WORDS


OPTIONS = [
    pytest.param(command, parameter, id=f"{command} {parameter.name}")
    for command, parameter in list_options()
]


OF_MODELS = {"profile", "clipseg", "sam2", "template", "device"}
"""Options that only the loading of a segmenter checks."""


class Reached(Exception):
    """The work itself would begin."""


def stop_work(*_: object, **__: object) -> None:
    """Stands for the work."""
    raise Reached


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with some images, in which no command gets farther than the start of its work."""

    for work in (
        "labkit.classify.fit.prepare",
        "labkit.classify.ablate.run_ablation",
        "labkit.classify.bench.measure_shares",
        "labkit.segment.bench.measure_scenes",
        "labkit.segment.pipeline.TextSegmenter.__call__",
    ):
        monkeypatch.setattr(work, stop_work)
    for split in ("train", "test"):
        for level, name in enumerate(("dark", "bright")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (99 * level,) * 3).save(folder / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "parameter"), OPTIONS)
def test_no_value_of_an_option_ends_in_a_traceback(
    command: str,
    parameter: click.Parameter,
    reach: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if parameter.name not in OF_MODELS:
        monkeypatch.setattr("labkit.segment.pipeline.TextSegmenter.from_profile", stop_work)
    arguments = [*command.split(), *COMMANDS[command]]
    for value in choose_values(parameter):
        given = [f"{parameter.opts[0]}={value}"]
        if parameter.param_type_name == "argument":
            words = command.split()
            place = len(words) + (parameter.name == "images" and command == "predict")
            given, arguments = [], [*arguments[:place], value, *arguments[place + 1 :]]
        monkeypatch.setattr(sys, "argv", ["labkit", *arguments, *given])
        try:
            main()
            status: Any = 0
        except SystemExit as stop:
            status = stop.code
        except Reached:
            status = "reached"
        told = capsys.readouterr().err.strip().splitlines()
        assert status in (0, 1, 2, None, "reached"), value
        if status == 1:
            assert [line for line in told if line.startswith("labkit: ")] == told[-1:], value


ODD: tuple[Any, ...] = (None, "3", b"3", [3], {"a": 3}, 2**70, -(2**70), float("nan"), object(), 3j)


@pytest.mark.parametrize("settings", [TrainConfig, AugmentConfig])
def test_odd_values_in_a_configuration_are_refused_by_name(settings: Any) -> None:
    for field in dataclasses.fields(settings):
        for value in ODD:
            try:
                made = settings(**{field.name: value})
            except InputError as error:
                assert str(error).startswith(field.name), (field.name, value)
            else:  # it is of the right kind
                assert isinstance(getattr(made, field.name), str | dict), (field.name, value)


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = TrainConfig(epochs=np.int64(3), learning_rate=np.float32(0.5), compile=np.bool_(True))  # type: ignore[arg-type]
    assert config == TrainConfig(epochs=3, learning_rate=0.5, compile=True)
    assert config.to_json()["epochs"] == 3 and config.to_json()["compile"] is True
    assert TrainConfig(mean=[0.5, 0.5, 0.5]).mean == (0.5, 0.5, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [*DEVICES, "cuda:-1", None, 5, 2**70])
def test_devices_that_are_not_there_are_refused(device: Any) -> None:
    with pytest.raises(InputError, match="device"):
        pick_device(device)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(5, "Input/output error", "photo.png"), "Input/output error"),
        (MemoryError(), "not enough memory"),
        (SourceError("the disk is full"), "the disk is full"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("labkit.classify.run.load_run", fail)
    monkeypatch.setattr(sys, "argv", ["labkit", "eval", "run"])
    with pytest.raises(SystemExit, match="1"):
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("labkit: ") and words in line


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("labkit.classify.run.load_run", fail)
    monkeypatch.setattr(sys, "argv", ["labkit", "eval", "run"])
    with pytest.raises(KeyError):
        main()
