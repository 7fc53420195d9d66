from __future__ import annotations

import logging
from itertools import chain

import pytest
import torch

from labkit.memory import OutOfMemoryError, in_parts, is_out_of_memory
from labkit.runtime import LabkitError

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
    parts = in_parts(Room(4), count, size=4, what="things")
    assert [*chain(*parts)] == list(range(count))
    assert max(len(part) for part in parts) <= 4


def test_nothing_to_do_gives_nothing() -> None:
    work = Room(4)
    assert in_parts(work, 0, size=4, what="things") == []
    assert work.asked == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_parts_are_halved_until_they_fit_and_stay_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    work = Room(3, error)
    with caplog.at_level(logging.WARNING):
        parts = in_parts(work, 7, size=16, what="sentences")
    assert work.asked == [7, 3, 3, 1]
    assert [*chain(*parts)] == list(range(7))
    assert caplog.messages == ["not enough memory: going on with 3 sentences at a time"]


def test_every_halving_is_said(caplog: pytest.LogCaptureFixture) -> None:
    in_parts(Room(1), 3, size=4, what="prompts")
    assert [message.split("with ")[1] for message in caplog.messages] == [
        "1 prompts at a time"
    ]  # 3 of 4 are 1, not 2
    caplog.clear()
    in_parts(Room(1), 4, size=4, what="prompts")
    assert [message.split("with ")[1] for message in caplog.messages] == [
        "2 prompts at a time",
        "1 prompts at a time",
    ]


def test_no_room_for_one_names_the_remedy_and_the_cause() -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"prompts, even one at a time.*device='cpu'"
    ) as info:
        in_parts(Room(0), 5, size=2, what="prompts")
    assert info.value.__cause__ is ERRORS[0]
    assert isinstance(info.value, LabkitError) and isinstance(info.value, MemoryError)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory")])
def test_other_errors_pass_through(error: Exception) -> None:
    work = Room(0, error)
    with pytest.raises(type(error)) as info:
        in_parts(work, 5, size=2, what="prompts")
    assert info.value is error and work.asked == [2]


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
