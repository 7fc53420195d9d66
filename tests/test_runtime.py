from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch

from labkit.runtime import (
    InputError,
    LabkitError,
    OutOfMemoryError,
    World,
    defer_interrupt,
    is_out_of_memory,
    pick_device,
    resolve_precision,
    run_in_parts,
    use_backends,
    use_seed,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_precision_on_a_cpu_is_fp32() -> None:
    assert resolve_precision("auto", CPU).name == "fp32"


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_auto_precision_on_a_gpu_follows_its_capability(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision = resolve_precision("auto", GPU)
    assert precision.name == name
    assert precision.scale_loss == (name == "fp16")


def test_a_gpu_that_is_not_there_is_refused_with_the_menu_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="Change runtime type"):
        pick_device("cuda")


def test_a_scoped_seed_repeats_and_leaves_every_generator_as_found() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with use_seed(7):
        first = draw()
    with pytest.raises(KeyError), use_seed(7):
        assert draw() == first
        raise KeyError
    assert draw() == expected


def get_backends() -> tuple[object, ...]:
    return (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize(
    ("device", "deterministic", "inside"),
    [
        (CPU, False, (False, False, "highest", False, False, None)),
        (CPU, True, (False, False, "highest", True, False, ":4096:8")),
        (GPU, False, (True, True, "high", False, False, None)),
        (GPU, True, (False, True, "high", True, False, ":4096:8")),
    ],
)
def test_backends_are_set_inside_and_left_as_found(
    device: torch.device,
    deterministic: bool,
    inside: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = get_backends()
    with pytest.raises(KeyError), use_backends(device, deterministic=deterministic):
        assert get_backends() == inside
        raise KeyError
    assert get_backends() == before


def test_an_interrupt_is_held_back_until_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with defer_interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_if_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_peak_memory_is_that_of_this_process_and_grows_by_what_it_held() -> None:
    code = (
        "import torch; from labkit.runtime import measure_peak_memory as peak;"
        "cpu = torch.device('cpu'); before = peak(cpu); torch.ones(2**27); print(before, peak(cpu))"
    )
    held = torch.ones(2**28)  # 1 GiB here must not count there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.numel() == 2**28 and 0.05 < before < 1
    assert after - before == pytest.approx(0.5, abs=0.05)


def test_the_world_is_what_torchrun_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.from_environment() == World(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(3, 4, 1) and not world.is_main_process


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory"),
]


class Room:
    """Work that returns its items and has memory for `room` of them; it notes what it was given."""

    def __init__(self, room: int, error: Exception = ERRORS[0]) -> None:
        self.room, self.error = room, error
        self.asked: list[int] = []

    def __call__(self, part: slice) -> list[int]:
        items = list(range(part.start, part.stop))
        self.asked.append(len(items))
        if len(items) > self.room:
            raise self.error
        return items


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 17])
def test_parts_cover_everything_in_order(count: int) -> None:
    parts = run_in_parts(Room(4), count, size=4, what="images")
    assert [*chain(*parts)] == list(range(count))
    assert max(len(part) for part in parts) <= 4


def test_nothing_to_do_gives_nothing() -> None:
    work = Room(4)
    assert run_in_parts(work, 0, size=4, what="images") == []
    assert work.asked == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_parts_are_halved_until_they_fit_and_stay_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    work = Room(3, error)
    with caplog.at_level(logging.WARNING):
        parts = run_in_parts(work, 7, size=16, what="sentences")
    assert work.asked == [7, 3, 3, 1]
    assert [*chain(*parts)] == list(range(7))
    assert caplog.messages == ["not enough memory: going on with 3 sentences at a time"]


def test_every_halving_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run_in_parts(Room(1), 3, size=4, what="prompts")
    assert [message.split("with ")[1] for message in caplog.messages] == [
        "1 prompts at a time"
    ]  # 3 of 4 are 1, not 2
    caplog.clear()
    run_in_parts(Room(1), 4, size=4, what="prompts")
    assert [message.split("with ")[1] for message in caplog.messages] == [
        "2 prompts at a time",
        "1 prompts at a time",
    ]


def test_no_room_for_one_names_the_remedy_and_the_cause() -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"prompts, even one at a time.*device='cpu'"
    ) as info:
        run_in_parts(Room(0), 5, size=2, what="prompts")
    assert info.value.__cause__ is ERRORS[0]
    assert isinstance(info.value, LabkitError) and isinstance(info.value, MemoryError)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory")])
def test_other_errors_pass_through(error: Exception) -> None:
    work = Room(0, error)
    with pytest.raises(type(error)) as info:
        run_in_parts(work, 5, size=2, what="prompts")
    assert info.value is error and work.asked == [2]


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
