"""The folder of a run: configuration, history, and generations of the training state.

A generation is a folder `checkpoints/step-<n>` with `state.pt` (written by `torch.save`) and
`checksum.txt`, its SHA-256. It is written under a temporary name, flushed to the disk, and only
then renamed; the generation before it is deleted last. A kill at any moment thus leaves a whole
generation behind, from which training goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from labkit.classify.config import TrainConfig
from labkit.classify.optim import lr_factor
from labkit.files import (
    compute_checksum,
    describe_unreadable,
    lock_file,
    mirror_folder,
    open_atomic,
    remove_leftovers,
    sync_folder,
    write_json,
    write_json_lines,
    write_text,
)
from labkit.runtime import InputError, SourceError, as_one_line

logger = logging.getLogger(__name__)

CONFIG, HISTORY, METRICS = "config.json", "history.jsonl", "metrics.json"
CHECKPOINTS = "checkpoints"
STATE, CHECKSUM = "state.pt", "checksum.txt"
KEPT_GENERATIONS = 2


_GENERATION = re.compile(r"step-(0|[1-9][0-9]*)")


def _is_whole(generation: Path) -> bool:
    """Whether a generation is there, and is what was written."""
    try:
        return compute_checksum(generation / STATE) == (generation / CHECKSUM).read_text()
    except (OSError, ValueError):
        return False


def _read_step(generation: Path) -> int:
    """The step of a generation, or of one that was moved aside; -1 where its name has none."""
    match = re.search(r"step-([0-9]+)", generation.name)
    return int(match[1]) if match else -1


def _remove(path: Path) -> None:
    """Remove a file or folder, if that can be."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


class RunFolder:
    """The folder of one run, and the mirror that follows it.

    Every process of a run has one; only that of the main process writes.

    Args:
        folder: where the run is kept; None keeps nothing.
        config: the recipe of the run.
        fingerprint: identifies its data.
        mirror: a second folder that follows the first.
        is_main_process: whether this process is the one that writes.
    """

    def __init__(
        self,
        folder: Path | str | None,
        config: TrainConfig,
        fingerprint: str,
        *,
        mirror: Path | str | None = None,
        is_main_process: bool = True,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._mirror = None if mirror is None else Path(mirror)
        self._config, self._fingerprint = config, fingerprint
        self._writes = self.folder is not None and is_main_process
        self._copier: threading.Thread | None = None
        self._verified: dict[str, list[int]] = {}
        self._has_warned = False
        self._saved_moment: tuple[Any, Any] | None = None  # epoch and step of the newest one

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder inside the block, and clean up after killed ones.

        Raises:
            InputError: another process trains in this folder.
        """
        if self.folder is None or not self._writes:
            yield
            return
        with lock_file(self.folder.resolve(), wait=False):
            remove_leftovers(self.folder)
            for name in self._list_checkpoints():
                if name.startswith(".partial-"):
                    _remove(self.folder / CHECKPOINTS / name)
            yield

    def generations(self) -> list[Path]:
        """Folders of the generations, newest first.

        Raises:
            SourceError: the folder of the checkpoints cannot be read.
        """
        matches = map(_GENERATION.fullmatch, self._list_checkpoints())
        steps = sorted((int(match[1]) for match in matches if match), reverse=True)
        return [Path(self.folder or "", CHECKPOINTS, f"step-{step}") for step in steps]

    def _list_checkpoints(self) -> list[str]:
        """Names of all that is in the folder of the checkpoints, hidden ones too."""
        if self.folder is None:
            return []
        folder = self.folder / CHECKPOINTS
        try:
            return os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise describe_unreadable(folder, error) from error

    def restore_from_mirror(self) -> None:
        """Copy the run from its mirror, where only the mirror has it."""
        if not self._writes or self.folder is None or self._mirror is None:
            return
        if self._mirror.is_dir() and not self.generations():
            mirror_folder(self._mirror, self.folder, prune=CHECKPOINTS)

    def update_mirror(self) -> None:
        """Begin to bring the mirror up to date, while training goes on.

        Where a copy is still under way, the next call takes along what is new.
        """
        if not self._writes or self.folder is None or self._mirror is None:
            return
        if self._copier is None or not self._copier.is_alive():
            self._copier = threading.Thread(target=self._copy_to_mirror, daemon=True)
            self._copier.start()

    def finish_mirror(self) -> None:
        """Bring the mirror up to date, and return when it is."""
        if self._copier is not None:
            self._copier.join()
        self._copy_to_mirror()

    def _copy_to_mirror(self) -> None:
        """Copy what is new; a drive that fails is one warning, and never ends the training."""
        if not self._writes or self.folder is None or self._mirror is None:
            return
        try:
            mirror_folder(self.folder, self._mirror, prune=CHECKPOINTS, verified=self._verified)
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "%s could not be copied to %s (%s): the run goes on, and is whole in %s",
                    self.folder,
                    self._mirror,
                    error,
                    self.folder,
                )
            self._has_warned = True

    def save_config(self) -> None:
        """Write the configuration."""
        if self._writes and self.folder:
            write_json(self.folder / CONFIG, self._config.to_json())

    def save_history(self, history: list[dict[str, float]]) -> None:
        """Write the history, one line an epoch."""
        if self._writes and self.folder:
            write_json_lines(self.folder / HISTORY, history)

    def save_state(self, state: dict[str, Any], step: int) -> None:
        """Write `state` as the generation of `step`, drop the oldest one, update the mirror.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.
            step: number of steps since training began.

        Raises:
            SourceError: it could not be written; the generations before it are intact.
        """
        if not self._writes or self.folder is None:
            return
        final = self.folder / CHECKPOINTS / f"step-{step}"
        moment = (state.get("epoch"), state.get("step"))
        is_saved = None not in moment and moment == self._saved_moment and _is_whole(final)
        if not is_saved:
            self._write_generation(final, state)
            self._saved_moment = moment
        for old in [*self.generations()[KEPT_GENERATIONS:], *self._replaced()]:
            _remove(old)
        self.update_mirror()

    def _write_generation(self, final: Path, state: dict[str, Any]) -> None:
        """Write `state` into the folder `final`, which appears only when it is whole."""
        folder = final.parent
        partial = folder / f".partial-{secrets.token_hex(8)}"
        identity = {"config": self._config.to_json(), "fingerprint": self._fingerprint}
        try:
            with open_atomic(partial / STATE) as file:
                torch.save({**identity, "state": state}, file)
            write_text(partial / CHECKSUM, compute_checksum(partial / STATE))
            if final.exists():  # of the same step before its epoch was closed, or damaged
                os.replace(final, folder / f".replaced-{final.name}-{secrets.token_hex(8)}")
            os.replace(partial, final)
            sync_folder(folder)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as the latter
            raise SourceError(
                f"could not save a checkpoint in {folder}: {error}. Free some space or "
                "choose another folder, then resume: the checkpoints before this one are intact."
            ) from error
        finally:
            _remove(partial)

    def _replaced(self) -> list[Path]:
        """Generations that were moved aside by a process that was then killed."""
        names = [name for name in self._list_checkpoints() if name.startswith(".replaced-")]
        return [Path(self.folder or "", CHECKPOINTS, name) for name in sorted(names)]

    def load_state(self, *, resume: bool = True) -> dict[str, Any] | None:
        """The state in the newest whole generation of this very run; None where there is none.

        A damaged generation is passed over with a warning. A finished run may be given more
        epochs: it goes on, from where it stands, on the schedule of a run of that many.

        Raises:
            InputError: there is one, but `resume` is not set, or it is of another configuration,
                or of an older labkit.
            SourceError: there are some, but all are damaged.
        """
        generations = [*self.generations(), *self._replaced()]
        generations.sort(key=_read_step, reverse=True)  # of one step the regular one comes first
        is_finished = self.folder is not None and (self.folder / METRICS).exists()
        if is_finished and resume and not generations:
            raise InputError(
                f"{self.folder} holds a finished run whose checkpoints are gone; read it with "
                "labkit.load_run, or train in another folder"
            )
        if (generations or is_finished) and not resume:
            raise InputError(
                f"{self.folder} already holds a run; resume it (resume=True, --resume), "
                "or choose another folder"
            )
        for generation in generations:
            if (generation / "tensors.safetensors").exists():
                raise InputError(
                    f"the checkpoints in {self.folder} were written by an older labkit; finish "
                    "the run with that version, or train in another folder"
                )
            try:
                if not _is_whole(generation):
                    raise ValueError(f"{STATE} does not match its checksum")
                saved = torch.load(generation / STATE, map_location="cpu", weights_only=True)
                state: dict[str, Any] = dict(saved["state"])
                plain, fingerprint = dict(saved["config"]), str(saved["fingerprint"])
            except Exception as error:  # what torch and its unpickler raise has no common base
                reason = as_one_line(error)
                logger.warning("checkpoint %s is damaged (%s): passed over", generation, reason)
                continue
            config = TrainConfig.from_json(plain)
            if state.get("epoch") == config.epochs < self._config.epochs:
                if self._writes:
                    self._announce_extension(config.epochs)
                config = dataclasses.replace(config, epochs=self._config.epochs)
            self._check_identity(config, fingerprint)
            if _GENERATION.fullmatch(generation.name):
                self._saved_moment = (state.get("epoch"), state.get("step"))
            return state
        if generations:
            raise SourceError(
                f"every checkpoint in {self.folder} is damaged; delete that folder to start anew"
            )
        return None

    def _announce_extension(self, finished: int) -> None:
        config = self._config
        progress = finished / config.epochs
        factor = lr_factor(progress, config.warmup, config.schedule, config.final_lr)
        logger.warning(
            "%s: the finished run of %d epochs goes on to %d. From here it follows the schedule "
            "of a run of %d epochs: the learning rate goes on at %.3g of its peak",
            self.folder,
            finished,
            config.epochs,
            config.epochs,
            factor,
        )

    def _check_identity(self, saved: TrainConfig, fingerprint: str) -> None:
        before, now = saved.to_json(), self._config.to_json()
        # The fingerprint of the data stands for where they came from.
        changes = [
            f"{name}: {before[name]!r} -> {now[name]!r}"
            for name in now
            if name != "data" and now[name] != before[name]
        ]
        if fingerprint != self._fingerprint:
            changes.append("other images")
        if changes:
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(changes)}). "
                "Use the same settings to resume it, or choose another folder; a finished run "
                "can be given more epochs."
            )
