"""Work in parts that fit: when a device has no room, the parts get smaller, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from labkit.runtime import LabkitError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class OutOfMemoryError(LabkitError, MemoryError):
    """The device has no room even for the smallest part of the work."""


def in_parts(work: Callable[[slice], T], count: int, *, size: int, what: str) -> list[T]:
    """What `work` returns for consecutive slices that cover range(count), in order.

    A part for which there is no memory is tried again at half its size, and so are those after it.

    Args:
        work: gets a slice of at most `size` items.
        count: number of items; 0 gives an empty list.
        size: items of the largest part, at least 1.
        what: the items, in the plural, for messages.

    Raises:
        OutOfMemoryError: there is no memory for a single item.
    """
    done: list[T] = []
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            done.append(work(part))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemoryError(
                    f"no memory left for {what}, even one at a time. "
                    "Use a smaller checkpoint or image, or device='cpu'."
                ) from error
            size = max(1, min(size, part.stop - part.start) // 2)
        else:
            start = part.stop
            continue
        # Outside the handler: the traceback that holds on to the memory is gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _LOG.warning("not enough memory: going on with %d %s at a time", size, what)
    return done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )
