"""The errors of labkit, and what every other module needs to know about the machine.

In this order: device and precision, seeding and repeatability, interruption, several processes,
memory, messages and versions.
"""

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
    """An error that the user can mend; its message names the cause and the remedy."""


class InputError(LabkitError, ValueError):
    """An argument, setting or file content that cannot be used."""


class SourceError(LabkitError, OSError):
    """Data or weights that could not be read, downloaded or written."""


class TrainingError(LabkitError, RuntimeError):
    """A training that cannot go on, or should not."""


class OutOfMemoryError(LabkitError, MemoryError):
    """The device has no memory even for the smallest part of the work."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: `name` is no device, or a GPU that this machine does not have.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    unknown = f"device {str(name)[:60]!r} is unknown; use 'auto', 'cpu' or 'cuda'"
    try:
        device = torch.device(str(name))
    except (RuntimeError, ValueError, OverflowError) as error:
        raise InputError(unknown) from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    if device.type not in counts:
        raise InputError(unknown)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but no GPU was found. {_GPU_REMEDY}")
    if (device.index or 0) >= counts[device.type]:
        raise InputError(
            f"device {name!r} is not there: this machine has {counts[device.type]} of "
            f"{device.type!r}, counted from 0"
        )
    return device


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The arithmetic of a forward pass.

    Attributes:
        autocast_dtype: the type of matrix products and convolutions; None means fp32 everywhere.
        scale_loss: whether the loss must be scaled before the backward pass.
    """

    autocast_dtype: torch.dtype | None
    scale_loss: bool

    @property
    def name(self) -> str:
        """The name: `fp32`, `bf16` or `fp16`."""
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names[self.autocast_dtype]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Return a new autocast context for one forward pass on `device`."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Return the precision called `name` on `device`.

    `auto` is fp32 on a CPU, bf16 on a GPU of compute capability 8.0 or more, and fp16 with a
    scaled loss on an older GPU (a T4 has no native bf16).

    Raises:
        InputError: `name` is unknown, or fp16 was asked for without a CUDA device.

    Example:
        >>> resolve_precision("auto", torch.device("cpu")).name
        'fp32'
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
    """Seed Python, NumPy and torch inside the block, and restore all three after it.

    Example:
        >>> with use_seed(0):
        ...     first = torch.rand(2)
        >>> with use_seed(0):
        ...     torch.equal(torch.rand(2), first)
        True
    """
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


@contextlib.contextmanager
def use_backends(device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Choose how torch computes on `device` inside the block, and restore all after it.

    On a CPU, two runs of one seed with the same number of threads are equal bit for bit as they
    are, and nothing is set. On a GPU, products of fp32 numbers use TF32 (10 bits of mantissa) where
    it can. Without `deterministic`, cuDNN tries out which of its algorithms is the fastest, and
    sums are added up in any order, so that two runs differ in their last bits.

    Args:
        device: where the network is.
        deterministic: two runs of one seed on the same kind of GPU are equal bit for bit, at some
            cost in speed. An operation that torch has no such algorithm for raises RuntimeError.

    Example:
        >>> with use_backends(torch.device("cpu"), deterministic=True):
        ...     torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """
    cudnn, workspace = torch.backends.cudnn, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if device.type == "cuda":
            cudnn.benchmark, cudnn.allow_tf32 = not deterministic, True
            torch.set_float32_matmul_precision("high")
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else cuBLAS refuses to work
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before[:2]
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before[2])
        if deterministic:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            else:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@dataclass
class Interrupt:
    """Whether the user, or the system, has asked this process to stop."""

    requested: bool = False

    def raise_if_requested(self) -> None:
        """Raise KeyboardInterrupt if the process was asked to stop."""
        if self.requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def defer_interrupt() -> Iterator[Interrupt]:
    """Hold back Ctrl-C (in a notebook: Interrupt) and SIGTERM, so that a step can be finished.

    A second signal is not held back. Outside the main thread, where Python delivers no signals,
    the block runs as usual.

    Example:
        >>> with defer_interrupt() as interrupt:
        ...     for step in range(3):
        ...         interrupt.raise_if_requested()  # between two steps
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle_signal(number: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle_signal) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class World:
    """The processes that train together, one for each GPU; by default a single one.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        local_rank: the number of this process, and of its GPU, on this machine.

    Example:
        >>> World().is_main_process
        True
        >>> World(rank=1, size=2, local_rank=1).is_main_process
        False
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Read `RANK`, `WORLD_SIZE` and `LOCAL_RANK`, which `torchrun` sets."""
        rank, size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, size, local_rank)

    def wait(self) -> None:
        """Wait until every process has reached this line."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def join(self, device: torch.device) -> Iterator[None]:
        """Belong to the process group inside the block; a single process needs none."""
        if self.size == 1:
            yield
            return
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def run_in_parts(work: Callable[[slice], T], count: int, *, size: int, what: str) -> list[T]:
    """Call `work` for consecutive slices of range(count), and return its results in order.

    If there is no memory for a part, it is tried again at half its size, and all later parts are
    as small.

    Args:
        work: takes a slice of at most `size` items.
        count: the number of items; 0 gives an empty list.
        size: the largest number of items in a part, at least 1.
        what: what the items are, in the plural, for messages.

    Raises:
        OutOfMemoryError: there is no memory for a single item.

    Example:
        >>> run_in_parts(lambda part: (part.start, part.stop), 5, size=2, what="images")
        [(0, 2), (2, 4), (4, 5)]
    """
    results: list[T] = []
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            results.append(work(part))
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
        # Outside the handler, since its traceback would keep the memory alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("not enough memory: going on with %d %s at a time", size, what)
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that a GPU, or the machine, has no memory left.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory"))
        True
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )


def measure_peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of `device` if it is a GPU, else of this process.

    Example:
        >>> measure_peak_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def as_one_line(value: object) -> str:
    r"""Return `value` as one printable line of at most 120 characters.

    If its text is empty, the line is the name of its type.

    Example:
        >>> as_one_line("two\nlines")
        'two lines'
        >>> as_one_line(MemoryError())
        'MemoryError'
    """
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    text = " ".join(text.split()) or type(value).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def find_root_cause(error: BaseException) -> BaseException:
    """Return the exception that began the chain of explicit causes of `error`.

    Example:
        >>> try:
        ...     raise ValueError("outer") from KeyError("inner")
        ... except ValueError as error:
        ...     find_root_cause(error)
        KeyError('inner')
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_interactive() -> bool:
    """Return whether somebody can see a progress bar: in a notebook or terminal, not in a log."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture and thread count of a processor.

    Example:
        >>> describe_device(torch.device("cpu"))  # doctest: +ELLIPSIS
        'cpu (... threads)'
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def get_versions() -> dict[str, str]:
    """Return the installed versions of Python and of the libraries that results depend on.

    Example:
        >>> get_versions()["python"] == platform.python_version()
        True
    """
    versions = {"python": platform.python_version()}
    for name in ("labkit", "torch", "torchvision", "timm", "transformers", "numpy", "sam2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
