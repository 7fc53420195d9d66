"""Device, precision, random numbers, timing and versions: what every other module stands on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

T = TypeVar("T")
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

logger = logging.getLogger(__name__)

_GPU_REMEDY = (
    "In Colab: Runtime > Change runtime type > T4 GPU. On a CPU use precision='fp32' or 'auto'."
)


class LabkitError(Exception):
    """Something the user can mend: the message names the cause and the remedy."""


class InputError(LabkitError, ValueError):
    """An argument, setting or file content that cannot be used."""


class SourceError(LabkitError, OSError):
    """Data or weights that could not be had from where they were asked for."""


class TrainingError(LabkitError, RuntimeError):
    """A training run that can not, or should not, go on."""


class OutOfMemoryError(LabkitError, MemoryError):
    """The device has no room even for the smallest part of the work."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: `name` is no device, or a device this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; use 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but no GPU was found. {_GPU_REMEDY}")
    return device


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Arithmetic of a forward pass: the autocast type (None: plain fp32) and loss scaling."""

    autocast_dtype: torch.dtype | None
    scale_loss: bool

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names[self.autocast_dtype]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A fresh autocast context for one forward pass on `device`."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """What `name` means on `device`.

    `auto` is fp32 on a CPU, bf16 on a GPU of compute capability 8.0 or more, and fp16 with loss
    scaling on an older one (a T4 has no native bf16).

    Raises:
        InputError: fp16 without a CUDA device: its gradients need the scaled loss of one.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        if not on_gpu:
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if name == "fp16":
        if not on_gpu:
            raise InputError(
                f"precision 'fp16' needs a CUDA GPU, got {device.type!r}. {_GPU_REMEDY}"
            )
        return Precision(autocast_dtype=torch.float16, scale_loss=True)
    if name == "bf16":
        return Precision(autocast_dtype=torch.bfloat16, scale_loss=False)
    if name == "fp32":
        return Precision(autocast_dtype=None, scale_loss=False)
    raise InputError(f"precision must be 'auto', 'fp32', 'bf16' or 'fp16', got {name!r}")


@contextlib.contextmanager
def use_seed(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside the block and leave all three as found after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda_devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda_devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class Interrupt:
    """Whether the user, or the system, has asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False

    def raise_if_requested(self) -> None:
        """Raise the KeyboardInterrupt that was held back."""
        if self.requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def defer_interrupt() -> Iterator[Interrupt]:
    """Hold back Ctrl-C (in a notebook: Interrupt) and SIGTERM, so that a step can be finished.

    A second signal is not held back. Outside the main thread, where Python delivers no signals,
    nothing is changed.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class World:
    """The processes that train together, as `torchrun` announces them; one where it does not."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """The world that `RANK`, `WORLD_SIZE` and `LOCAL_RANK` describe."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True)
        )
        return cls(rank, size, local_rank)

    def wait(self) -> None:
        """Wait until every process has come this far."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """The process group of this world, where it has more than one process."""
        if self.size == 1:
            yield
            return
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def run_in_parts(work: Callable[[slice], T], count: int, *, size: int, what: str) -> list[T]:
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
        logger.warning("not enough memory: going on with %d %s at a time", size, what)
    return done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )


def measure_peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of `device` if it is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def as_one_line(value: object) -> str:
    """`value` as one short, printable line; the name of its type where it says nothing."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    text = " ".join(text.split()) or type(value).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def find_root_cause(error: BaseException) -> BaseException:
    """The exception that began the chain of explicit causes of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shows_progress() -> bool:
    """Whether somebody can see a progress bar: in a notebook or a terminal, not in a log file."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def describe_device(device: torch.device) -> str:
    """A name a reader recognises: the GPU's, or the processor architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def get_versions() -> dict[str, str]:
    """Installed versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("labkit", "torch", "torchvision", "timm", "transformers", "numpy", "sam2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
