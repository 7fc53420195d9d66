"""What is global in a process, and must be after every call as it was before."""

from __future__ import annotations

import locale
import logging
import os
import random
import signal
import socket
import threading
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFile

OF_OTHERS = {
    *("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
}
"""Variables that pytest, torch and the libraries below them set once, when they are first used."""


def read_settings() -> dict[str, Any]:
    """Settings of the interpreter and the libraries, by name."""
    mask = os.umask(0o22)
    os.umask(mask)
    return {
        "environment": {k: v for k, v in os.environ.items() if k not in OF_OTHERS},
        "working folder": os.getcwd(),
        "umask": mask,
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": _read_handlers(),
        "socket timeout": socket.getdefaulttimeout(),
        "level of the log": logging.getLogger().level,
        "handling of errors in NumPy": np.geterr(),
        "limit of pixels": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "matplotlib": (matplotlib.get_backend(), dict(matplotlib.rcParams)),
        "threads of torch": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "type of numbers": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "process group": torch.distributed.is_initialized(),
    }


def _read_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def read_generators() -> dict[str, Any]:
    """The states of the random generators, and the filters of warnings."""
    return {
        "random": random.getstate(),
        "numpy.random": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "filters of warnings": list(warnings.filters),
    }


def list_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs, and in dictionaries of which entries."""
    changed = []
    for name, value in before.items():
        now = after[name]
        if isinstance(value, dict):
            keys = sorted(map(str, {k for k in {*value, *now} if value.get(k) != now.get(k)}))
            changed += [f"{name} ({', '.join(keys)})"] if keys else []
        elif value != now:
            changed.append(name)
    return changed


def list_open_files() -> list[str]:
    """What this process has open, on Linux."""
    listed = []
    for path in Path("/proc/self/fd").glob("*"):
        try:
            listed.append(os.readlink(path))
        except OSError:
            continue
    return listed
