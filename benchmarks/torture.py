"""Try to lose, to spoil and to let in what must not be: writes benchmarks/results/trust.json.

python benchmarks/torture.py                   # every line, in full; about 40 minutes of one core
python benchmarks/torture.py --quick           # a short form of every line, as `make test` has it
python benchmarks/torture.py --lines kill      # lines whose name contains this

Each line is a function that counts what was tried and what failed, and a row of the file, which is
written when the line ends: the same command goes on after an interruption, with what is missing.
It needs Linux, where a process can be stopped at every system call.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import io
import json
import logging
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads may have to share a core

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import write_result  # noqa: E402

from labkit.classify.checkpoint import RunFolder  # noqa: E402
from labkit.classify.config import AugmentConfig, TrainConfig  # noqa: E402
from labkit.classify.data import ImageData, Split, load_data  # noqa: E402
from labkit.classify.fit import fit  # noqa: E402
from labkit.classify.run import Run, load_classifier  # noqa: E402
from labkit.classify.sources import CIFAR10_BATCHES, read_batch  # noqa: E402
from labkit.classify.trainer import Callback, TrainState  # noqa: E402
from labkit.files import compute_checksum, download, write_json  # noqa: E402
from labkit.images import fetch, load_image  # noqa: E402
from labkit.runtime import (  # noqa: E402
    InputError,
    LabkitError,
    Precision,
    SourceError,
    TrainingError,
    measure_peak_memory,
    use_seed,
)

RESULT = ROOT / "benchmarks" / "results" / "trust.json"
CPU = torch.device("cpu")
GIB = 2**30
Work = Callable[[], Any]


@dataclass
class Tally:
    """Counts the cases of a line.

    Attributes:
        quick: whether the short form runs.
        work: a folder for the line.
        ends: time of the monotonic clock at which a long line stops; its row says how far it came.
        tried: number of cases.
        failures: what failed, in words.
        figures: what was measured beside.
    """

    quick: bool
    work: Path
    ends: float = float("inf")
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_late(self) -> bool:
        """Whether the time of the line is over."""
        return time.monotonic() >= self.ends

    def choose(self, whole: int, short: int) -> int:
        """A number of cases, of the whole form or the short one."""
        return short if self.quick else whole

    def check(self, is_right: bool, case: str) -> None:
        """Count a case."""
        self.tried += 1
        if not is_right:
            self.failures.append(case)

    def refuse(self, work: Work, case: str, *kinds: type[Exception]) -> None:
        """Count a case in which `work` must raise one of `kinds`, by default a LabkitError."""
        try:
            work()
        except LabkitError as error:
            is_kind = not kinds or isinstance(error, kinds)
            self.check(is_kind, f"{case}: {type(error).__name__}: {error}")
        except Exception as error:
            self.check(False, f"{case}: {type(error).__name__}: {error}")
        else:
            self.check(False, f"{case}: not refused")


# ---------------------------------------------------------------- processes


def start(work: Work) -> int:
    """Start a process that does `work` and ends with status 0, or with 1 where it raises."""
    sys.stdout.flush(), sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which this process has none at work
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        logging.getLogger().error("%s: %s", type(error).__name__, error)
    finally:
        os._exit(status)


def wait_for(pid: int) -> int:
    """Wait for a process; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_apart(work: Work) -> tuple[int, Any]:
    """Do `work` in a process of its own; return its exit status, and what it returned."""
    reader, writer = os.pipe()

    def send() -> None:
        with os.fdopen(writer, "wb") as file:
            pickle.dump(work(), file)

    pid = start(send)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    return wait_for(pid), pickle.loads(data) if data else None


def run_until_call(work: Work, number: int) -> tuple[bool, int]:
    """Kill a process that does `work` at a stop: before or after one of its system calls.

    Args:
        work: what the process does.
        number: of the stop, counted from 0; the even ones are before a call, the odd ones after.

    Returns:
        Whether the work ended before, and the number of stops seen.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    trace_me, go_on, set_options, options = 0, 24, 0x4200, 0x100001

    def work_traced() -> None:
        if libc.ptrace(trace_me, 0, None, None):
            raise OSError(ctypes.get_errno(), "a process cannot be traced here")
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    pid = start(work_traced)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("a process cannot be traced here")
    libc.ptrace(set_options, pid, None, options)
    seen, passed_on = 0, 0
    while True:
        libc.ptrace(go_on, pid, None, passed_on)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status) == 0, seen
        is_call = os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
        passed_on = 0 if is_call else os.WSTOPSIG(status)
        if is_call and seen == number:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False, seen
        seen += is_call


# ---------------------------------------------------------------- what is trained and saved


def make_squares(count: int, seed: int) -> Split:
    """Three classes that differ in which channel is bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 140, (count, 16, 16, 3))
    images[np.arange(count), :, :, labels] += 60
    return Split(images.astype(np.uint8), labels.astype(np.int64), ("red", "green", "blue"))


DATA = ImageData(make_squares(40, 0), make_squares(12, 1), "squares", "squares", "squares-0")
STEPS = 3  # of an epoch: batches of 16, 16 and 8
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
VIT = TrainConfig(
    data="squares",
    image_size=16,
    model="vit",
    model_options={**TINY, "drop_path_rate": 0.2, "head_dropout": 0.2},
    epochs=3,
    batch_size=16,
    learning_rate=3e-3,
    clip_norm=1.0,
    ema_decay=0.9,
    augment=AugmentConfig(pad=2, flip="random", auto_augment="trivial", cutmix=1.0),
)
LOOKAHEAD = TrainConfig.from_json(
    {**VIT.to_json(), "ema_decay": 0.0, "lookahead": 2, "optimizer": "muon"}
)
RESNET = TrainConfig.from_json(
    {**VIT.to_json(), "optimizer": "sgd", "ema_decay": 0.0, "learning_rate": 0.05}
)
KINDS: Mapping[str, TrainConfig] = {
    "ViT, EMA": VIT,
    "ResNet": RESNET,
    "ViT, Muon, lookahead": LOOKAHEAD,
    "ViT, scaled loss": VIT,
}


class Residual(nn.Module):
    """A ResNet of one block, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 3) of images (B, 3, 16, 16)."""
        features = self.stem(images)
        logits: torch.Tensor = self.head((features + self.block(features)).mean((2, 3)))
        return logits


class Report(Callback):
    """Writes the number of each step that was taken, and saved, into a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def on_step_end(self, state: TrainState) -> None:
        """Write the number of the step."""
        os.write(self._pipe, b"%d\n" % (state.epoch * STEPS + state.step))


def train(kind: str, folder: Path, pipe: int | None = None) -> None:
    """Train what `kind` names in `folder`, or go on with it, and save every step."""
    model: nn.Module | None = None
    if kind == "ResNet":
        torch.manual_seed(0)
        model = Residual()
    Run.report = lambda *_: None  # type: ignore[method-assign]  # figures take seconds
    scaled = Precision(autocast_dtype=torch.bfloat16, scale_loss=True)
    if "scaled" in kind:  # fp16 itself needs a GPU
        sys.modules["labkit.classify.fit"].resolve_precision = lambda *_: scaled  # type: ignore[attr-defined]
    callbacks = [] if pipe is None else [Report(pipe)]
    options: dict[str, Any] = {"device": "cpu", "resume": True, "callbacks": callbacks}
    fit(KINDS[kind], model=model, data=DATA, out=folder, save_every=0, **options)


def warm_up(folder: Path) -> None:
    """Load what a training loads, so that the processes started from this one need not.

    Nothing is computed here: the threads of torch would not live on in those processes.
    """
    import importlib

    known = set(sys.modules)

    def list_loaded() -> list[str]:
        for kind in KINDS:
            train(kind, folder / kind)
        return sorted(set(sys.modules) - known)

    for name in run_apart(list_loaded)[1] or []:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)


def find_newest(folder: Path) -> int:
    """The step of the newest whole generation of a run, 0 where there is none."""
    newest = 0
    for generation in folder.glob("checkpoints/step-*"):
        with contextlib.suppress(OSError):
            digest = (generation / "checksum.txt").read_text()
            if compute_checksum(generation / "state.pt") == digest:
                newest = max(newest, int(generation.name.removeprefix("step-")))
    return newest


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return weights


def are_equal(left: Any, right: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        if not isinstance(right, dict) or left.keys() != right.keys():
            return False
        return all(are_equal(left[name], right[name]) for name in left)
    return bool(left == right)


def make_state(step: int) -> dict[str, Any]:
    """A small state of training."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.rand(64, 8, generator=generator)},
        "history": [{"train_loss": 1 / step}],
        "epoch": 0,
        "step": step,
    }


def open_run(folder: Path, fingerprint: str = "images") -> RunFolder:
    """The folder of a run of the default recipe."""
    return RunFolder(folder, TrainConfig(), fingerprint)


def save_steps(folder: Path, *steps: int) -> None:
    """Save the states of these steps."""
    run = open_run(folder)
    for step in steps:
        run.save_state(make_state(step), step)


def list_hidden(folder: Path) -> list[str]:
    """Names of the hidden files and folders below `folder`."""
    return [path.name for path in folder.rglob(".*")]


# ---------------------------------------------------------------- 13: kills


def kill_at_system_calls(tally: Tally) -> None:
    """13. SIGKILL before and after each system call of a save."""
    first, second, third = make_state(1), make_state(2), make_state(3)
    closed = {**second, "epoch": 1, "step": 0}
    scenarios: dict[str, tuple[list[int], dict[str, Any], int, list[Any]]] = {
        "the first generation": ([], first, 1, [None, first]),
        "a third generation": ([1, 2], third, 3, [second, third]),
        "the same step again": ([1, 2], closed, 2, [second, closed]),
    }
    calls = 0
    for name, (before, state, step, allowed) in scenarios.items():
        base = tally.work / "base"
        save_steps(base, *before)
        number = tally.choose(0, 3)
        while True:
            folder = tally.work / "run"
            shutil.rmtree(folder, ignore_errors=True)
            if base.exists():
                shutil.copytree(base, folder)
            run = open_run(folder)
            run.load_state()
            has_ended, seen = run_until_call(functools.partial(run.save_state, state, step), number)
            loaded = open_run(folder).load_state()
            right = [allowed[1]] if has_ended else allowed
            is_right = any(are_equal(loaded, each) for each in right)
            tally.check(is_right, f"{name}: other state after stop {number}")
            again = open_run(folder)
            with again.lock():
                again.load_state()
                again.save_state(make_state(9), 9)
            is_right = are_equal(open_run(folder).load_state(), make_state(9))
            is_clean = not list_hidden(folder)
            tally.check(is_right and is_clean, f"{name}: cannot go on after stop {number}")
            if has_ended:
                calls += seen
                break
            number += tally.choose(1, 23)
            if tally.is_late:
                tally.figures["stopped_at"] = f"stop {number} of {name}"
                return
        shutil.rmtree(base, ignore_errors=True)
    path = tally.work / "metrics.json"
    for number in range(0, 1000, tally.choose(1, 9)):
        write_json(path, {"value": 1})
        has_ended, seen = run_until_call(lambda: write_json(path, {"value": 2}), number)
        value = json.loads(path.read_text())["value"]
        tally.check(value == 2 if has_ended else value in (1, 2), f"JSON: stop {number}")
        if has_ended:
            calls += seen
            break
    tally.figures |= {"system_calls": calls // 2, "scenarios": len(scenarios) + 1}


def kill_at_random(tally: Tally) -> None:
    """13. SIGKILL at random instants of a small training, resumed to the end."""
    warm_up(tally.work / "first")
    rng, kills, lost, deepest = random.Random(13), 0, 0, 0
    by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
    wanted = tally.choose(500, 8)
    references, seconds = {}, {}
    for kind in KINDS if not tally.quick else ["ViT, EMA", "ResNet"]:
        folder = tally.work / f"reference {kind}"
        began = time.monotonic()
        status, _ = run_apart(functools.partial(train, kind, folder))
        seconds[kind] = time.monotonic() - began
        tally.check(status == 0, f"{kind}: the uninterrupted run ended with {status}")
        references[kind] = load_weights(folder)
    kinds = list(references)
    while kills < wanted and not tally.is_late:
        kind, folder, depth = kinds[0], tally.work / "run", 0
        kinds.append(kinds.pop(0))
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            reader, writer = os.pipe()
            pid = start(functools.partial(train, kind, folder, writer))
            os.close(writer)
            # Less of the way is left each time; and a run must end some time.
            ends = time.monotonic() + (rng.uniform(0, seconds[kind]) if depth < 12 else 600)
            reported = _watch(pid, reader, ends)
            status = wait_for(pid)
            newest = find_newest(folder)
            lost = max(lost, reported - newest)
            tally.check(newest >= reported, f"{kind}: step {reported} was saved, {newest} is there")
            if status != -signal.SIGKILL:
                break
            kills, depth = kills + 1, depth + 1
            by_kind[kind] += 1
        deepest = max(deepest, depth)
        tally.check(status == 0, f"{kind}: resumed {depth} times, ended with {status}")
        is_equal = status == 0 and are_equal(load_weights(folder), references[kind])
        tally.check(is_equal, f"{kind}: other weights after {depth} kills")
        tally.check(not list_hidden(folder), f"{kind}: {list_hidden(folder)} are left")
    tally.figures |= {"kills": by_kind, "intervals_lost_at_most": lost, "deepest_resume": deepest}


def _watch(pid: int, reader: int, ends: float) -> int:
    """The last step that a process reports before it ends, or is killed at the time `ends`."""
    text = b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, ends - time.monotonic()))
        part = os.read(reader, 65536) if ready else b""
        if not ready:
            os.kill(pid, signal.SIGKILL)
            ends = time.monotonic() + 60  # what is in the pipe is read to its end
        elif not part:
            os.close(reader)
            return int(text.split()[-1]) if text else 0
        text += part


def kill_two_processes(tally: Tally) -> None:
    """13. The same with two processes that train together."""
    warm_up(tally.work / "first")
    rng, kills, runs = random.Random(31), 0, 0

    def train_pair(folder: Path, seconds: float) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in (0, 1):

            def work(rank: int = rank) -> None:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                train("ViT, EMA", folder)

            pids.append(start(work))
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.005)
            if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return [wait_for(pid) for pid in pids]
        for pid in rng.sample(pids, 2):
            os.kill(pid, signal.SIGKILL)
        return [wait_for(pid) for pid in pids]

    began = time.monotonic()
    reference = tally.work / "reference"
    tally.check(train_pair(reference, 300) == [0, 0], "the uninterrupted run failed")
    whole = time.monotonic() - began
    while kills < tally.choose(20, 1) and not tally.is_late:
        folder = tally.work / f"run {runs}"
        runs, depth, statuses = runs + 1, 0, [-signal.SIGKILL]
        while statuses[0] == -signal.SIGKILL:
            newest = find_newest(folder)
            statuses = train_pair(folder, rng.uniform(0, whole) if depth < 6 else 300)
            tally.check(find_newest(folder) >= newest, f"run {runs}: a generation was lost")
            kills, depth = kills + 1, depth + 1
        kills -= 1  # the last one ended by itself
        is_equal = statuses == [0, 0] and are_equal(load_weights(folder), load_weights(reference))
        tally.check(is_equal, f"run {runs}: {statuses}, or other weights after {depth - 1} kills")
    tally.figures |= {"kills": kills, "runs": runs}


# ---------------------------------------------------------------- 14: damage and failing disks


def damage_checkpoints(tally: Tally) -> None:
    """14. Checkpoints truncated, flipped, empty, of another run."""
    folder = tally.work / "run"
    save_steps(folder, 1, 2)
    file, digest = (folder / "checkpoints" / "step-2" / n for n in ("state.pt", "checksum.txt"))
    whole, text = file.read_bytes(), digest.read_bytes()

    def is_noticed(state: bytes, checksum: bytes = text) -> bool:
        file.write_bytes(state), digest.write_bytes(checksum)
        with Warnings() as warned:
            loaded = open_run(folder).load_state()
        return are_equal(loaded, make_state(1)) and "is damaged" in warned.text

    rng = random.Random(14)
    for percent in range(0, 100, tally.choose(1, 20)):
        size = len(whole) * percent // 100
        tally.check(is_noticed(whole[:size]), f"state cut at {percent} %")
        size = len(text) * percent // 100
        tally.check(is_noticed(whole, text[:size]), f"checksum cut at {percent} %")
    for _ in range(tally.choose(3000, 100)):
        bit = rng.randrange(8 * len(whole))
        tally.check(is_noticed(flip(whole, bit)), f"bit {bit} of the state flipped")
    for bit in range(0, 8 * len(text), tally.choose(1, 64)):
        tally.check(is_noticed(whole, flip(text, bit)), f"bit {bit} of the checksum flipped")
    other = tally.work / "other"
    RunFolder(other, VIT, "other images").save_state(make_state(2), 2)
    foreign = (other / "checkpoints" / "step-2" / "state.pt").read_bytes()
    tally.check(is_noticed(foreign), "the state of another run, by its file alone")
    shutil.copytree(other / "checkpoints" / "step-2", file.parent, dirs_exist_ok=True)
    tally.refuse(open_run(folder).load_state, "the generation of another run", InputError)
    for name in ("step-1", "step-2"):
        (folder / "checkpoints" / name / "state.pt").write_bytes(b"")
    tally.refuse(open_run(folder).load_state, "all generations empty", SourceError)


def damage_weights(tally: Tally) -> None:
    """14. The finished weights of a run, and the cache of decoded images, damaged."""
    run, rng = tally.work / "run", random.Random(15)
    run_apart(functools.partial(train, "ViT, EMA", run))
    metrics = json.loads((run / "metrics.json").read_text())
    load_classifier(run, device="cpu")
    path = run / "model.safetensors"
    whole = path.read_bytes()
    damages = [(f"cut at {p} %", whole[: len(whole) * p // 100]) for p in range(100)]
    bits = [rng.randrange(8 * len(whole)) for _ in range(tally.choose(1000, 20))]
    damages = damages[:: tally.choose(1, 25)] + [(f"bit {b}", flip(whole, b)) for b in bits]
    for name, damaged in damages:
        path.write_bytes(damaged)
        load = functools.partial(load_classifier, run, device="cpu")
        tally.refuse(load, f"weights, {name}", InputError)
    path.write_bytes(whole)
    tally.check(metrics["data_fingerprint"] == DATA.fingerprint, "no fingerprint of the data")

    images, cache = tally.work / "images", tally.work / "cache"
    for split, count in (("train", 6), ("test", 3)):
        for index, (pixels, label) in enumerate(zip(DATA.train.images, "abc" * 20, strict=False)):
            if index < count:
                folder = images / split / label
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    load = functools.partial(load_data, str(images), cache=cache, image_size=16)
    right = load()
    files = [path for path in sorted((cache / "decoded").rglob("*")) if path.is_file()]
    for file in files:
        if file.name.startswith("."):
            continue
        content = file.read_bytes()
        damages = [content[: len(content) * p // 100] for p in range(0, 100, tally.choose(1, 50))]
        damages += [
            flip(content, rng.randrange(8 * len(content))) for _ in range(tally.choose(200, 4))
        ]
        for number, damaged in enumerate(damages):
            file.write_bytes(damaged)
            with Warnings() as warned:
                loaded = load()
            is_right = all(
                np.array_equal(getattr(loaded, s).images, getattr(right, s).images)
                and np.array_equal(getattr(loaded, s).labels, getattr(right, s).labels)
                for s in ("train", "test")
            ) and (loaded.classes == right.classes)
            noticed = "damaged" in warned.text or file.name == "content.json"
            tally.check(is_right and noticed, f"cache, {file.name}, damage {number}")
            file.write_bytes(content)


def flip(data: bytes, bit: int) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Warnings(logging.Handler):
    """Keeps the text of what is logged inside its block."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.text += record.getMessage() + "\n"

    def __enter__(self) -> Warnings:
        logging.getLogger("labkit").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("labkit").removeHandler(self)


CALLS = ("fsync", "replace", "mkdir", "open", "unlink", "scandir", "listdir", "rename")
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EDQUOT)


@contextlib.contextmanager
def failing(name: str, number: int, code: int) -> Iterator[list[int]]:
    """Let the call `number` of `os.<name>`, and all after it, fail with `code`."""
    original, seen = getattr(os, name), [0]

    def fail(*arguments: Any, **options: Any) -> Any:
        seen[0] += 1
        if seen[0] > number:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    setattr(os, name, fail)
    try:
        yield seen
    finally:
        setattr(os, name, original)


def fail_disks(tally: Tally) -> None:
    """14. A disk that is full, read-only, not permitted, that refuses to rename; and its quota."""
    folder = tally.work / "run"
    save_steps(folder, 1, 2)
    for name in CALLS:
        for code in ERRORS if not tally.quick else ERRORS[:2]:
            for number in range(40):
                copy = tally.work / "copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(folder, copy)
                run, reported = open_run(copy), True
                run.load_state()
                case = f"{name}, call {number}, {errno.errorcode[code]}"
                with failing(name, number, code) as seen:
                    try:
                        run.save_state(make_state(3), 3)
                    except SourceError:
                        reported = False
                    except Exception as error:
                        tally.check(False, f"{case}: {type(error).__name__}: {error}")
                        continue
                loaded = open_run(copy).load_state()
                right = [make_state(3)] if reported else [make_state(2), make_state(3)]
                tally.check(any(are_equal(loaded, state) for state in right), case)
                if seen[0] <= number:
                    break

    def save_within(limit: int, copy: Path) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_steps(copy, 3)
        except SourceError:
            return "refused"
        return "saved"

    size = (folder / "checkpoints" / "step-2" / "state.pt").stat().st_size
    for percent in range(0, 110, tally.choose(1, 30)):
        copy = tally.work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        _, said = run_apart(functools.partial(save_within, size * percent // 100, copy))
        step = {"refused": 2, "saved": 3}.get(str(said), 0)
        is_right = step > 0 and are_equal(open_run(copy).load_state(), make_state(step))
        tally.check(is_right, f"the disk is full after {percent} % of a state: {said}")
        tally.check(percent >= 100 or said == "refused", f"{percent} % were reported as saved")


# ---------------------------------------------------------------- 15: downloads


def break_downloads(tally: Tally) -> None:
    """15. Twelve faults of a server, passing and lasting."""
    import hashlib

    import pooch

    from tests.loopback import Fault, LoopbackServer

    pooch.get_logger().setLevel("ERROR")
    body = random.Random(15).randbytes(40_000)
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    sleep, time.sleep = time.sleep, lambda _: None
    definite = {Fault.HTML_PAGE, Fault.GATED, Fault.UNAUTHORIZED}  # not tried again
    longest = 0.0
    try:
        with LoopbackServer() as server, contextlib.redirect_stderr(io.StringIO()):
            good = server.add("/good.bin", body)
            html = {"Content-Type": "text/html"}
            cases: dict[str, tuple[str, Fault | None]] = {
                **{fault.name.lower(): (good, fault) for fault in Fault},
                "404": (server.url + "/none.bin", None),
                "http elsewhere": (server.add("/a", b"", redirect="http://192.0.2.1/x"), None),
                "redirected in a circle": (
                    server.add("/b", b"", redirect=server.url + "/b"),
                    None,
                ),
                "other bytes": (server.add("/c", body[:-1] + b"x"), None),
                "nothing": (server.add("/d", b""), None),
                "a page": (server.add("/e", b"<html>", headers=html), None),
                "nobody listens": ("http://127.0.0.1:9/x", None),
            }
            for name, (url, fault) in cases.items():
                for is_lasting in (False, True) if fault else (True,):
                    path = tally.work / f"{name} {is_lasting}.bin"
                    server._faults.clear()
                    if fault:
                        server.fail("/good.bin", *[fault] * (9 if is_lasting else 1))
                    began = time.monotonic()
                    get = functools.partial(download, url, path, digest=digest, timeout=0.3)
                    if is_lasting or fault in definite:
                        tally.refuse(get, name, SourceError)
                        tally.check(not path.exists(), f"{name}: a file is there")
                    else:
                        get()
                        tally.check(path.read_bytes() == body, f"{name}: other bytes")
                    longest = max(longest, time.monotonic() - began)
                    left = [p.name for p in tally.work.iterdir() if not p.name.endswith(".lock")]
                    wrong = [n for n in left if not n.endswith(".bin")]
                    tally.check(not wrong, f"{name}: {wrong} are left")
    finally:
        time.sleep = sleep
    tally.figures |= {"faults": len(cases), "longest_seconds": round(longest, 1)}


# ---------------------------------------------------------------- 16: images


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Odd = tuple[str, bytes, tuple[int, int] | None]  # name, content, (height, width) if it is right


def _is_readable(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:
        return False
    return True


def make_odd_images(is_whole: bool) -> Iterator[Odd]:
    """Images that are rare, large, or no images; the size of those that must be read."""
    for mode in MODES:
        for kind in IMAGE_FORMATS:
            for size in ((1, 1), (23, 17)):
                image = Image.new(mode, size)
                with contextlib.suppress(OSError, KeyError, ValueError):
                    data = encode(image, kind)
                    right = size[::-1] if _is_readable(data) else None  # Pillow wrote it, but ...
                    yield f"{mode} as {kind}, {size}", data, right
    for orientation in range(0, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.new("RGB", (9, 5)), "JPEG", exif=exif)
        yield f"orientation {orientation}", data, (9, 5) if orientation in (5, 6, 7, 8) else (5, 9)
    small = Image.new("RGB", (8, 8), (200, 10, 10))
    png, jpeg = encode(small, "PNG"), encode(small, "JPEG", progressive=True)
    for width, height in (
        (50_000, 50_000),
        (2**31 - 1, 1),
        (0, 5),
        (2**31, 2**31),
        (12_000, 10_000),
    ):
        header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        yield f"a PNG that says {width} x {height}", png[:8] + header + png[33:], None
        text = f"P6 {width} {height} 255\n".encode()
        yield f"a PPM that says {width} x {height}", text, None
    for name, body in (("iCCP", bytes(2**21)), ("zTXt", bytes(2**21)), ("eXIf", b"MM\0*" * 500)):
        packed = b"x\0\0" + zlib.compress(body) if name != "eXIf" else body
        data = png[:33] + make_chunk(name.encode(), packed) + png[33:]
        yield f"a PNG with a large {name}", data, None if name == "zTXt" else (8, 8)
    cut = jpeg.rindex(b"\xff\xda")
    yield "a JPEG of 9,000 scans", jpeg[:cut] + jpeg[cut:-2] * 9000 + jpeg[-2:], None
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        frames = [Image.new("RGB", (6, 4), (n, 0, 0)) for n in range(30)]
        yield (
            f"a film as {kind}",
            encode(frames[0], kind, save_all=True, append_images=frames[1:]),
            (4, 6),
        )
    for name, data in {
        "nothing": b"",
        "a page": b"<!doctype html><html>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PDF": b"%PDF-1.4\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "zip": b"PK\3\4" + bytes(60),
        "a program": b"\x7fELF" + bytes(60),
        "ICO": encode(small, "ICO"),
        "zeros": bytes(5000),
        "ones": b"\xff" * 5000,
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(80),
        "text": "Hôtel\n".encode() * 99,
    }.items():
        yield name, data, None
    for kind in IMAGE_FORMATS:
        data = encode(Image.effect_noise((40, 40), 80).convert("RGB"), kind)
        for part in (0.1, 0.3, 0.5):
            yield f"{kind} cut at {part}", data[: int(part * len(data))], None
        yield f"{kind} and more behind it", data + b"\xff\xda\0\2" * 300, (40, 40)
    for name, size in (("wide", (65_000, 1)), ("high", (1, 65_000))):
        yield f"a {name} PNG", encode(Image.new("L", size), "PNG"), size[::-1]
    if is_whole:
        large = Image.new("RGBA", (9_999, 9_999))
        yield "99.98 megapixels as RGBA PNG", encode(large, "PNG"), (9_999, 9_999)
        yield "99.98 megapixels as WEBP", encode(large, "WEBP", quality=1, method=0), None
        half = Image.new("RGBA", (7_000, 7_000))
        yield "49 megapixels as WEBP", encode(half, "WEBP", quality=1, method=0), (7_000, 7_000)
        large = Image.new("RGB", (9_999, 9_999))
        yield "99.98 megapixels as JPEG", encode(large, "JPEG", quality=5), (9_999, 9_999)
        data = encode(large, "JPEG", progressive=True, quality=5)
        yield "99.98 megapixels as progressive JPEG", data, None
        data = encode(half.convert("RGB"), "JPEG", progressive=True, quality=5)
        yield "49 megapixels as progressive JPEG", data, (7_000, 7_000)


def read_odd_images(tally: Tally) -> None:
    """16. Odd images: a right one or an error of one line, in less than 1 GiB."""
    folder = tally.work / "odd"
    folder.mkdir()
    kept: list[tuple[str, tuple[int, int] | None]] = []
    for name, data, size in make_odd_images(not tally.quick):
        (folder / f"{len(kept)}").write_bytes(data)
        kept.append((name, size))

    def read_all() -> tuple[list[str], int, float, float]:
        before, wrong, slowest = measure_peak_memory(CPU), [], 0.0
        for number, (name, size) in enumerate(kept):
            began = time.process_time()
            try:
                image = load_image(folder / f"{number}")
                if size and (image.shape != (*size, 3) or image.dtype != np.uint8):
                    wrong.append(f"{name}: {image.shape}")
            except LabkitError as error:
                if size or "\n" in str(error):
                    wrong.append(f"{name}: {error}")
            except BaseException as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.process_time() - began)
        return wrong, len(kept), measure_peak_memory(CPU) - before, slowest

    status, answer = run_apart(read_all)
    _count(tally, status, answer, len(kept))


def _count(tally: Tally, status: int, answer: Any, tried: int) -> None:
    """Take over what a process found that read images."""
    wrong, read, peak, slowest = answer or ([f"ended with {status}"], 0, 0.0, 0.0)
    tally.tried, tally.failures = tried + 1, list(wrong)
    if status or peak > 1 or read < tried:
        tally.failures.append(f"{read} read, status {status}, {peak:.2f} GiB")
    tally.figures |= {"peak_gib": round(peak, 2), "slowest_seconds": round(slowest, 2)}


def fuzz_images(tally: Tally) -> None:
    """16. Fuzzed images: a right one or an error of one line, in less than 1 GiB."""
    count = tally.choose(100_000, 1_500)

    def read_all() -> tuple[list[str], int, float, float]:
        rng, seeds = random.Random(16), []
        base = Image.effect_noise((24, 20), 90)
        for kind in IMAGE_FORMATS:
            for mode in ("RGB", "L", "P", "1"):
                with contextlib.suppress(OSError):
                    seeds.append(encode(base.convert(mode), kind))
        seeds.append(encode(base.convert("RGB"), "JPEG", progressive=True))
        seeds.append(encode(base.convert("RGBA"), "PNG"))
        before, wrong, slowest = measure_peak_memory(CPU), [], 0.0
        for number in range(count):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.choice((1, 1, 2, 4, 16))):
                place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(40)
                place = min(place, len(data) - 1)
                data[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
            if rng.random() < 0.1:
                del data[rng.randrange(1, len(data)) :]
            if rng.random() < 0.05:
                other = rng.choice(seeds)
                data += other[rng.randrange(len(other)) :]
            began = time.process_time()
            try:
                image = load_image(bytes(data))
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                    wrong.append(f"{number}: {image.shape}")
            except LabkitError as error:
                if "\n" in str(error):
                    wrong.append(f"{number}: {error}")
            except BaseException as error:
                wrong.append(f"{number}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.process_time() - began)
        return wrong, count, measure_peak_memory(CPU) - before, slowest

    status, answer = run_apart(read_all)
    _count(tally, status, answer, count)


# ---------------------------------------------------------------- 17: what is let in


PRIVATE = (
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "0", "0.0.0.0"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "localhost"),
    *("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1", "192.168.255.1"),
    *("169.254.169.254", "[fe80::1]", "[fc00::1]", "[fd12::1]", "[fec0::1]", "[ff02::1]"),
    *("100.64.0.1", "100.127.255.254", "192.0.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1"),
    *(
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
    ),
    *("192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1", "[2001:db8::1]", "[2001::1]"),
    *("[2001:2::1]", "[2001:10::1]", "[2001:20::1]", "[2002:7f00:1::]", "[2002:a00:1::1]"),
    *(
        "[2620:4f:8000::1]",
        "[3fff::1]",
        "[5f00::1]",
        "[100::1]",
        "[100:0:0:1::1]",
        "[64:ff9b:1::1]",
    ),
    *("[::127.0.0.1]", "[::10.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[3ffe::1]", "[4000::1]"),
)


def ask_private_addresses(tally: Tally) -> None:
    """17. Ways to a private address, by number, by name and by redirect."""
    from tests.loopback import LoopbackServer

    options: dict[str, Any] = {"max_bytes": 1000, "timeout": 2.0}
    with LoopbackServer() as server:
        port = server.url.rpartition(":")[2]
        server.add("/x", b"secret")
        for host in PRIVATE:
            url = f"http://{host}:{port}/x"
            get = functools.partial(fetch, url, "image", allow_private=False, **options)
            tally.refuse(get, url)
        original = socket.getaddrinfo
        for host in PRIVATE:
            if host[0] not in "[0123456789" or "x" in host:
                continue
            plain = host.strip("[].")
            if plain.count(".") not in (0, 3) or (":" not in plain and plain.count(".") < 3):
                continue
            family = socket.AF_INET6 if ":" in plain else socket.AF_INET
            answers = [(family, socket.SOCK_STREAM, 6, "", (plain, int(port)))]
            socket.getaddrinfo = lambda *_, answers=answers, **__: answers  # type: ignore[assignment]
            try:
                url = f"http://name-of-{plain.replace(':', '-').replace('.', '-')}.example:{port}/x"
                get = functools.partial(fetch, url, "image", allow_private=False, **options)
                tally.refuse(get, url)
            finally:
                socket.getaddrinfo = original
        for scheme in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"):
            get = functools.partial(fetch, scheme, "image", allow_private=False, **options)
            tally.refuse(get, scheme)
        asked = len(server.requests)
    tally.check(asked == 0, f"{asked} requests arrived")
    tally.figures |= {"requests_that_arrived": asked}


class Evil:
    """What it is unpickled to is the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def make_evils(marker: Path) -> list[tuple[str, Any]]:
    """Objects that would write `marker`, or harm the interpreter, where they are unpickled."""
    import builtins
    import importlib
    import operator
    import runpy

    text = f"open({str(marker)!r}, 'w')"
    command = f"touch {marker}"
    write = functools.partial(Evil, os.system)
    return [
        ("os.system", write(command)),
        ("os.popen", Evil(os.popen, command)),
        ("eval", Evil(eval, text)),
        ("exec", Evil(exec, text)),
        ("open", Evil(open, str(marker), "w")),
        ("io.open", Evil(io.open, str(marker), "w")),
        ("subprocess", Evil(subprocess.Popen, ["touch", str(marker)])),
        ("call", Evil(subprocess.check_output, ["touch", str(marker)])),
        ("mkdir", Evil(os.mkdir, str(marker))),
        ("symlink", Evil(os.symlink, "/", str(marker))),
        ("compile", Evil(compile, text, "x", "eval")),
        ("import", Evil(importlib.import_module, "antigravity")),
        ("runpy", Evil(runpy.run_path, str(ROOT / "benchmarks" / "common.py"))),
        ("getattr", Evil(getattr, os, "system")),
        ("methodcaller", Evil(operator.methodcaller, "system", command)),
        ("partial", functools.partial(os.system, command)),
        ("print", Evil(builtins.print, "x")),
        ("exit", Evil(sys.exit, 0)),
        ("path", Path("x")),
        ("memmap", Evil(np.memmap, str(marker), "uint8", "w+", 0, (5,))),
        ("frombuffer", Evil(np.frombuffer, b"12345678", "O")),
        ("ndarray", Evil(np.ndarray, (2**40,), "O")),
        ("fromfile", Evil(np.fromfile, "/etc/hostname", "uint8")),
        ("torch.load", Evil(torch.load, str(marker))),
        ("bytearray", Evil(bytearray, 2**45)),
    ]


def unpack_archives(tally: Tally) -> None:
    """17. Hostile members of an archive, hostile pickles in it: nothing outside, nothing run."""
    from labkit.classify.sources import _read_archive
    from tests.classify.small_cifar import batch_files

    place = tally.work / "a" / "b"
    place.mkdir(parents=True)
    marker = tally.work / "marker"
    files, folder = batch_files(), "cifar-10-batches-py"
    names = CIFAR10_BATCHES["train"]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    outside = ("../../escaped", "/tmp/labkit-escaped", f"{folder}/../../../escaped", "a" * 5000)

    def build(extra: Sequence[tarfile.TarInfo], replaced: Mapping[str, bytes | None]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for member in extra:
                tar.addfile(member, io.BytesIO(bytes(member.size)) if member.size else None)
            for name, body in {**files, **replaced}.items():
                if body is not None:
                    member = tarfile.TarInfo(f"{folder}/{name}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
        return buffer.getvalue()

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Any:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        return info

    first = f"{folder}/{names[0]}"
    cases: dict[str, bytes] = {}
    for name in outside:
        cases[f"file {name[:40]}"] = build([member(name, size=9)], {})
        for kind in kinds:
            cases[f"{kind!r} {name[:40]}"] = build([member(name, kind, "/etc/passwd")], {})
    for kind in kinds:
        for link in ("/etc/passwd", "../../escaped", first):
            cases[f"the batch is {kind!r} to {link}"] = build(
                [member(first, kind, link)], {names[0]: None}
            )
    whole = build([], {})
    cases |= {f"cut at {p} %": whole[: len(whole) * p // 100] for p in (0, 10, 50, 90, 99)}
    cases["a pickle that is none"] = build([], {names[0]: b"\x80\4."})
    cases["a batch too large to be true"] = build([], {names[0]: b"\x80\4\x8e" + b"\xff" * 8})

    def read(data: bytes) -> None:
        path = place / "archive.tar.gz"
        path.write_bytes(data)
        with contextlib.suppress(LabkitError):
            for images, labels in _read_archive(path, names):
                assert len(images) == len(labels) == 8
        path.unlink()

    def list_files() -> list[str]:
        return sorted(str(path) for path in tally.work.rglob("*"))

    before = list_files()
    for case, data in list(cases.items())[:: tally.choose(1, 8)]:
        status, _ = run_apart(functools.partial(read, data))
        is_clean = list_files() == before and not Path("/tmp/labkit-escaped").exists()
        tally.check(status == 0 and is_clean, f"{case}: status {status}")
    for name, evil in make_evils(marker)[:: tally.choose(1, 6)]:
        for wrapped in (evil, {b"data": evil, b"labels": [1]}, [evil]):
            with contextlib.suppress(Exception):
                body = pickle.dumps(wrapped, protocol=2)
                refuse = functools.partial(read_batch, io.BytesIO(body), "batch")
                status, _ = run_apart(functools.partial(_expect_refusal, refuse))
                is_clean = list_files() == before
                tally.check(status == 0 and is_clean, f"pickle of {name}: status {status}")


def _expect_refusal(work: Work) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 * GIB, 16 * GIB))
    try:
        work()
    except LabkitError:
        return
    raise AssertionError("not refused")


def load_hostile_weights(tally: Tally) -> None:
    """17. Hostile weight files: nothing executed, no crash, one error."""
    import hashlib

    from safetensors.torch import save

    marker, run = tally.work / "marker", tally.work / "run"
    evils = make_evils(marker)
    generation = tally.work / "saved" / "checkpoints" / "step-1"
    generation.mkdir(parents=True)

    def load_state(data: bytes) -> None:
        (generation / "state.pt").write_bytes(data)
        (generation / "checksum.txt").write_text(hashlib.sha256(data).hexdigest())
        _expect_refusal(open_run(tally.work / "saved").load_state)

    config, good = TrainConfig().to_json(), make_state(1)
    for name, evil in evils[:: tally.choose(1, 6)]:
        saved = {"config": config, "fingerprint": "images", "state": {**good, "evil": evil}}
        for is_zip in (True, False):
            file = io.BytesIO()
            with contextlib.suppress(Exception):
                torch.save(saved, file, _use_new_zipfile_serialization=is_zip)
                status, _ = run_apart(functools.partial(load_state, file.getvalue()))
                tally.check(status == 0 and not marker.exists(), f"{name}, zip {is_zip}: {status}")
    run_apart(functools.partial(train, "ViT, EMA", run))
    metrics = json.loads((run / "metrics.json").read_text())
    weights = load_weights(run)
    right = save(weights)
    size = int.from_bytes(right[:8], "little")
    header = json.loads(right[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def rebuild(changes: Mapping[str, Any], body: bytes = right[8 + size :]) -> bytes:
        text = json.dumps({**header, first: {**header[first], **changes}}).encode()
        return len(text).to_bytes(8, "little") + text + body

    files = {
        "nothing": b"",
        "eight zeros": bytes(8),
        "a header without end": (2**62).to_bytes(8, "little") + b"{}",
        "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
        "no JSON": (4).to_bytes(8, "little") + b"abcd",
        "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "offsets below 0": rebuild({"data_offsets": [-8, 8]}),
        "offsets behind the end": rebuild({"data_offsets": [0, 2**60]}),
        "offsets backwards": rebuild({"data_offsets": [64, 0]}),
        "a shape that overflows": rebuild({"shape": [2**32, 2**32]}),
        "a shape below 0": rebuild({"shape": [-1]}),
        "another type": rebuild({"dtype": "Q99"}),
        "another shape": rebuild({"shape": [1]}),
        "half of it": right[: len(right) // 2],
        "others": save({"other": torch.zeros(3)}),
        "a pickle": pickle.dumps(evils[0][1]),
    }

    def load_weights_of(data: bytes) -> None:
        (run / "model.safetensors").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        write_json(run / "metrics.json", {**metrics, "weights_sha256": digest})
        _expect_refusal(functools.partial(load_classifier, run, device="cpu"))

    for name, data in list(files.items())[:: tally.choose(1, 4)]:
        status, _ = run_apart(functools.partial(load_weights_of, data))
        tally.check(status == 0 and not marker.exists(), f"safetensors, {name}: {status}")


BANDIT: list[str] = []  # the command, as --bandit gives it


def run_bandit(tally: Tally) -> None:
    """17. bandit over the package."""
    command = BANDIT or [sys.executable, "-m", "bandit"]
    done = subprocess.run(
        [*command, "-q", "-r", str(ROOT / "labkit"), "-f", "json"], capture_output=True, text=True
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        tally.figures["not_run"] = "bandit is not installed"
        return
    for issue in found["results"]:
        place = f"{Path(issue['filename']).relative_to(ROOT)}:{issue['line_number']}"
        tally.failures.append(f"{issue['test_id']} {place}")
    tally.tried = len([name for name in found["metrics"] if name != "_totals"])
    tally.figures |= {"files": tally.tried, "justified": found["metrics"]["_totals"]["nosec"]}


# ---------------------------------------------------------------- 18: numbers that go wrong


class Faulty(nn.Module):
    """A network whose training goes wrong at its forward pass number `at`."""

    def __init__(self, fault: str, at: int) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 16 * 3, 3)
        self.zero = nn.Parameter(torch.zeros(()))
        self.fault, self.at, self.passes = fault, at, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 3) of images (B, 3, 16, 16), or what goes wrong."""
        logits: torch.Tensor = self.head(images.flatten(1))
        if not self.training:
            return logits
        self.passes += 1
        if self.passes <= self.at:
            return logits
        if self.fault == "NaN":
            return logits * float("nan")
        if self.fault == "infinity":  # of the gradient; the loss is finite
            return logits + 0 * self.zero.sqrt()
        if self.fault == "collapse":
            return logits + (self.zero * 1e38 * 1e38 * 0).nan_to_num() + 0 * self.zero.sqrt()
        if self.fault == "memory" or len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return logits


FAULTS = {
    "NaN": "became nan|non-finite",
    "infinity": "non-finite",
    "collapse": "collapsed",
    "memory": "out of memory on cpu with batches of",
    "parts": "",
}


def spoil_training(tally: Tally) -> None:
    """18. NaN, infinity, collapse of the scale, out of memory, at 100 steps each."""
    import re

    Run.report = lambda *_: None  # type: ignore[method-assign]
    module: Any = sys.modules["labkit.classify.fit"]
    plain = TrainConfig(
        data="squares", image_size=16, epochs=tally.choose(50, 14), batch_size=16, precision="fp32"
    )
    scaled = Precision(autocast_dtype=torch.bfloat16, scale_loss=True)
    resolve, folder = module.resolve_precision, tally.work / "run"
    steps = (0, 5) if tally.quick else random.Random(18).sample(range(100), 100)
    for at in steps:
        for fault, words in FAULTS.items():
            if tally.is_late:
                return
            tally.figures["runs"] = tally.figures.get("runs", 0) + 1
            shutil.rmtree(folder, ignore_errors=True)
            torch.manual_seed(0)
            model, case = Faulty(fault, at), f"{fault} at step {at}"
            message = ""
            if fault == "collapse":
                module.resolve_precision = lambda *_: scaled
            try:
                with Warnings() as warned:
                    fit(plain, model=model, data=DATA, out=folder, device="cpu", save_every=0)
            except TrainingError as error:
                message = str(error)
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
            finally:
                module.resolve_precision = resolve
            is_told = bool(re.search(words, message)) if words else not message
            if fault == "parts":
                is_told = is_told and "in 4 parts" in warned.text
            tally.check(is_told, f"{case}: {message or 'no error'}")
            for generation in folder.glob("checkpoints/step-*"):
                saved = torch.load(generation / "state.pt", weights_only=True)["state"]
                values = [saved["model"], *saved["optimizer"]["state"].values()]
                numbers = [v for part in values for v in part.values() if torch.is_tensor(v)]
                is_finite = all(bool(torch.isfinite(v).all()) for v in numbers)
                tally.check(is_finite, f"{case}: {generation.name} is poisoned")


# ---------------------------------------------------------------- 19: the same twice


def train_twice(tally: Tally) -> None:
    """19. Two runs with one random seed, at one and at two threads each."""
    warm_up(tally.work / "first")
    for threads in (1, 2):

        def train_with(kind: str, folder: Path, threads: int = threads) -> None:
            torch.set_num_threads(threads)
            train(kind, folder)

        for kind in KINDS if not tally.quick else ["ViT, EMA"]:
            if tally.is_late:
                return
            weights = []
            for number in range(tally.choose(4, 2)):
                folder = tally.work / f"{kind} {threads} {number}"
                status, _ = run_apart(functools.partial(train_with, kind, folder))
                weights.append(load_weights(folder) if status == 0 else None)
            for number, other in enumerate(weights[1:], 1):
                is_equal = other is not None and are_equal(weights[0], other)
                tally.check(is_equal, f"{kind}, {threads} threads, run {number}")


def compare_state(tally: Tally) -> None:
    """19. Global state as before after every public call."""
    status, answer = run_apart(lambda: _call_everything(tally.work))
    names, changed = answer or ([], [f"ended with {status}"])
    tally.tried, tally.failures = len(names), changed
    tally.figures["calls"] = names


def _call_everything(work: Path) -> tuple[list[str], list[str]]:
    import labkit
    from tests.global_state import list_changes, read_generators, read_settings

    torch.set_num_threads(1)
    pixels = make_squares(8, 3)
    scene = labkit.make_object_scene(0, seed=20)
    config = TrainConfig.from_json({**VIT.to_json(), "epochs": 1})
    out = work / "run"
    segmenter = labkit.TextSegmenter.from_profile("demo", device="cpu")
    results: dict[str, Any] = {}

    def keep(name: str, call: Work) -> Work:
        return lambda: results.__setitem__(name, call())

    calls: dict[str, Work] = {
        "fit": keep("run", lambda: labkit.fit(config, data=DATA, out=out, device="cpu")),
        "fit, deterministic": lambda: labkit.fit(
            TrainConfig.from_json({**config.to_json(), "deterministic": True}), data=DATA
        ),
        "load_run": lambda: labkit.load_run(out, data=DATA, device="cpu"),
        "evaluate": lambda: labkit.evaluate(results["run"].model, DATA.test),
        "compare_runs": lambda: labkit.compare_runs({"a": results["run"], "b": results["run"]}),
        "Run.predict": lambda: results["run"].predict(pixels.images),
        "Run.figures": lambda: results["run"].figures(),
        "Run.save": lambda: results["run"].save(work / "copy"),
        # It draws weights from the generator of torch, as every network of torch does.
        "create_model": lambda: use_seed(0)(labkit.create_model)(
            "vit", num_classes=3, image_size=16, **TINY
        ),
        "list_models": labkit.list_models,
        "list_presets": labkit.list_presets,
        "get_preset": lambda: labkit.get_preset("vit", epochs=2),
        "train_val_split": lambda: labkit.train_val_split(pixels, 3),
        "load_image": lambda: labkit.load_image(encode(Image.fromarray(pixels.images[0]), "JPEG")),
        "make_object_scene": lambda: labkit.make_object_scene(1, seed=20),
        "pick_device": lambda: labkit.pick_device("cpu"),
        "ImageData.from_splits": lambda: labkit.ImageData.from_splits(pixels, pixels),
        "TextSegmenter.from_profile": lambda: labkit.TextSegmenter.from_profile("demo"),
        "TextSegmenter": keep("found", lambda: segmenter(scene.image, [scene.present[0], "zebra"])),
        "Segmentation.save": lambda: results["found"].save(work / "found"),
        "Segmentation.figure": lambda: results["found"].figure(),
        "Segmentation.to_coco": lambda: results["found"].to_coco(),
        "a refusal of fit": lambda: labkit.fit(config, data=DATA, device="warp"),
        "a refusal of load_image": lambda: labkit.load_image(b"nothing"),
        "a refusal of load_run": lambda: labkit.load_run(work / "none"),
    }
    changed = []
    for name, call in calls.items():
        before = read_settings() | read_generators()
        try:
            call()
        except LabkitError as error:
            if "refusal" not in name:
                changed.append(f"{name}: {error}")
        changed += [
            f"{name}: {what}" for what in list_changes(before, read_settings() | read_generators())
        ]
    return list(calls), changed


# ---------------------------------------------------------------- 20: no growth


def measure_growth(
    tally: Tally, work: Callable[[int], Any], count: int, warm: int
) -> tuple[float, int, int]:
    """Growth of resident memory in MiB, and of open files, from call `warm` on; number of calls."""
    from tests.global_state import list_open_files

    def read_memory() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    memory, files = 0.0, 0
    for number in range(count):
        work(number)
        if number == warm:
            memory, files = read_memory(), len(list_open_files())
        if number > warm and tally.is_late:
            break
    return read_memory() - memory, len(list_open_files()) - files, number + 1


GROWTH_MIB = 64  # that a process may grow once it is warm
GROWTH_FILES = 2


def _count_growth(tally: Tally, work: Work, what: str) -> None:
    status, answer = run_apart(work)
    memory, files, count = answer or (float("inf"), 0, 0)
    tally.check(status == 0, f"{what}: ended with {status}")
    tally.check(memory <= GROWTH_MIB, f"{what}: {memory:.0f} MiB more")
    tally.check(files <= GROWTH_FILES, f"{what}: {files} open files more")
    tally.tried = count
    tally.figures |= {"growth_mib": round(memory, 1), "bound_mib": GROWTH_MIB, "files": files}


def segment_many(tally: Tally) -> None:
    """20. Images segmented in one process: no growth."""
    count = tally.choose(500, 6)

    def work() -> tuple[float, int, int]:
        from labkit import TextSegmenter, make_object_scene

        torch.set_num_threads(1)
        segmenter = TextSegmenter.from_profile("demo", device="cpu")
        scenes = [make_object_scene(n, seed=20) for n in range(10)]
        return measure_growth(
            tally,
            lambda n: segmenter(scenes[n % 10].image, [scenes[n % 10].present[0]]),
            count,
            min(50, count // 2),
        )

    _count_growth(tally, work, "images")


def train_many(tally: Tally) -> None:
    """20. Trainings of one batch in one process: no growth."""
    count = tally.choose(20, 3)
    config = TrainConfig.from_json({**VIT.to_json(), "epochs": 1, "batch_size": 40})

    def work() -> tuple[float, int, int]:
        torch.set_num_threads(1)
        return measure_growth(
            tally,
            lambda n: fit(config, data=DATA, out=tally.work / f"run {n}", device="cpu"),
            count,
            min(5, count - 1),
        )

    _count_growth(tally, work, "trainings")


def segment_folder(tally: Tally) -> None:
    """20. A folder of small images through `labkit segment`: streamed, resumed, memory flat."""
    from labkit import make_object_scene

    count = tally.choose(FOLDER_IMAGES[0], 3)
    images, out = tally.work / "images", tally.work / "out"
    images.mkdir()
    drawn = [
        Image.fromarray(make_object_scene(n, seed=20).image).resize((64, 64)) for n in range(10)
    ]
    for number in range(count):
        drawn[number % 10].save(images / f"{number:05}.png")
    command = [sys.executable, "-m", "labkit", "segment", str(images), "--prompt", "star"]
    command += ["--profile", "demo", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def go() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def count_done() -> int:
        return len(list(out.glob("*/masks.json")))

    process, memory = go(), []
    while count_done() < max(1, count // 3) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    killed_at = count_done()
    tally.check(killed_at < count, "nothing was streamed: all were there at once")
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/masks.json")}
    process = go()
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            if pages and count_done() > killed_at:
                memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        time.sleep(0.2)
    tally.check(process.returncode == 0, f"ended with {process.returncode}")
    tally.check(count_done() == count, f"{count_done()} of {count} are there")
    is_kept = all(path.stat().st_mtime_ns == before for path, before in times.items())
    tally.check(is_kept, "what was there was made again")
    early, late = (memory[len(memory) // 4], memory[-1]) if len(memory) > 8 else (0.0, 0.0)
    tally.check(late - early < GROWTH_MIB, f"{late - early:.0f} MiB more")
    tally.tried = count
    tally.figures |= {"growth_mib": round(late - early, 1), "bound_mib": GROWTH_MIB}
    tally.figures |= {"killed_after": killed_at}


FOLDER_IMAGES = [10_000]


# ---------------------------------------------------------------- the table


LINES: Mapping[str, tuple[str, Callable[[Tally], None]]] = {
    "13 kill at system calls": (
        "SIGKILL before and after each system call of a save",
        kill_at_system_calls,
    ),
    "13 kill at random": (
        "SIGKILL at random instants of small trainings, resumed to the end",
        kill_at_random,
    ),
    "13 kill two processes": (
        "SIGKILL at random instants of two processes that train together",
        kill_two_processes,
    ),
    "14 damaged checkpoints": (
        "checkpoints cut at every percent, bits flipped, empty, of another run",
        damage_checkpoints,
    ),
    "14 damaged weights and caches": (
        "finished weights and decoded images cut at every percent, bits flipped",
        damage_weights,
    ),
    "14 failing disks": (
        "disk full, read-only, not permitted, rename refused, at each call of a save",
        fail_disks,
    ),
    "15 downloads": ("faults of a server, passing and lasting", break_downloads),
    "16 odd images": ("odd images, of 100 megapixels too", read_odd_images),
    "16 fuzzed images": ("fuzzed images", fuzz_images),
    "17 addresses": ("ways to a private address", ask_private_addresses),
    "17 archives": ("hostile members of archives and pickles in them", unpack_archives),
    "17 weights": ("hostile weight files", load_hostile_weights),
    "17 bandit": ("modules of the package under bandit", run_bandit),
    "18 numbers": (
        "NaN, infinity, collapsed loss scale, out of memory, and the checkpoints left",
        spoil_training,
    ),
    "19 same seed": ("pairs of trainings with one random seed, 1 and 2 threads", train_twice),
    "19 global state": ("public calls that leave global state as found", compare_state),
    "20 images": ("images segmented in one process", segment_many),
    "20 trainings": ("trainings of one batch in one process", train_many),
    "20 folder": ("images of a folder through `labkit segment`, killed once", segment_folder),
}


def run_line(name: str, quick: bool, seconds: float = float("inf")) -> dict[str, Any]:
    """Run one line; its row."""
    what, work = LINES[name]
    began = time.perf_counter()
    memory = Path("/dev/shm")  # a kill loses nothing that was written, on whatever disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        tally = Tally(quick, Path(folder), time.monotonic() + seconds)
        try:
            work(tally)
        except Exception as error:
            tally.check(False, f"the line itself: {type(error).__name__}: {error}")
    return {
        "line": name,
        "what": what,
        "tried": tally.tried,
        "failed": len(tally.failures),
        "failures": tally.failures[:20],
        "figures": tally.figures,
        "seconds": round(time.perf_counter() - began, 1),
    }


def describe_missing(name: str) -> dict[str, Any]:
    """The row of a line that was not run."""
    row = {"line": name, "what": LINES[name][0], "tried": 0, "failed": 0, "failures": []}
    return {**row, "figures": {"not_run": "not measured"}, "seconds": 0.0}


def main() -> None:
    """Run the lines that are missing, and write each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", default="", help="only lines whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="a short form of each line")
    parser.add_argument("--again", action="store_true", help="run lines that are there already too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop long lines then")
    parser.add_argument("--bandit", default="", help="the command that runs bandit")
    parser.add_argument("--images", type=int, help="of the folder of line 20 [default: 10000]")
    parser.add_argument("--out", type=Path, help="file [default: benchmarks/results/trust.json]")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        raise SystemExit("figures of the short form do not belong into trust.json: choose an --out")
    logging.getLogger("labkit").propagate = False
    logging.getLogger("labkit").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    BANDIT[:] = arguments.bandit.split()
    if arguments.images:
        FOLDER_IMAGES[:] = [arguments.images]
    out = arguments.out or RESULT
    saved = json.loads(out.read_text())["lines"] if out.exists() else []
    rows = {row["line"]: row for row in saved if "not_run" not in row["figures"]}
    words = [word for word in arguments.lines.split(",") if word] or [""]
    for name in LINES:
        if any(word in name for word in words) and (arguments.again or name not in rows):
            print(f"{name} ...", flush=True)
            rows[name] = row = run_line(name, arguments.quick, arguments.seconds)
            print(f"  {row['failed']} of {row['tried']} failed, {row['seconds']} s", flush=True)
            for failure in row["failures"][:5]:
                print(f"    {failure[:300]}", flush=True)
            lines = [rows.get(line) or describe_missing(line) for line in LINES]
            with contextlib.redirect_stdout(io.StringIO()):
                write_result(out, {"quick": arguments.quick, "lines": lines})
    failed = [name for name, row in rows.items() if row["failed"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
