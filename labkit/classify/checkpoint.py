"""Generations of training state on disk: written whole, checked when read, restored to the bit.

A generation is a folder `step-<n>` with `tensors.safetensors`, `state.json` and `manifest.json`
(the checksums of the other two). It is written under a temporary name, flushed to the disk, and
only then renamed; the generation before it is deleted last. A kill at any moment thus leaves a
whole generation behind.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.files import compute_checksum, sync_folder
from labkit.runtime import SourceError

logger = logging.getLogger(__name__)

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def split_state(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`value` as JSON, its tensors moved into `tensors` under the path where each one stood.

    Takes any nesting of dicts (with keys of any JSON scalar type), lists, tuples, tensors and
    JSON scalars; tuples come back as lists.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu").contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, split_state(item, tensors, f"{path}/{key}")] for key, item in value.items()]
        return {"items": items}
    if isinstance(value, list | tuple):
        return [split_state(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
    return value


def join_state(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `split_state` took apart."""
    if isinstance(value, list):
        return [join_state(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: join_state(item, tensors) for key, item in value["items"]}
    return value


class CheckpointStore:
    """The newest `keep` generations of a run's state, in one folder."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def generations(self) -> list[Path]:
        """Folders of the generations, newest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write `state` as the generation of `step` and drop the generations beyond `keep`.

        Raises:
            SourceError: it could not be written; the generations before it are intact.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self.folder / f"step-{step}"
        partial = self.folder / f".partial-{uuid.uuid4().hex}"
        tensors: dict[str, Tensor] = {}
        skeleton = split_state(state, tensors)
        try:
            partial.mkdir(parents=True)
            save_file(tensors, partial / _TENSORS)
            (partial / _STATE).write_text(json.dumps(skeleton))
            sums = {name: compute_checksum(partial / name) for name in (_TENSORS, _STATE)}
            (partial / _MANIFEST).write_text(json.dumps(sums))
            for name in (_TENSORS, _STATE, _MANIFEST):
                _sync_file(partial / name)
            sync_folder(partial)
            if final.exists():
                os.replace(final, self.folder / f".replaced-{uuid.uuid4().hex}")
            os.replace(partial, final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            raise SourceError(
                f"could not save a checkpoint in {self.folder}: {error}. Free some space or "
                "choose another folder, then resume: the checkpoints before this one are intact."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        leftovers = [*self.folder.glob(".partial-*"), *self.folder.glob(".replaced-*")]
        for old in [*self.generations()[self._keep :], *leftovers]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def load(self) -> dict[str, Any] | None:
        """The newest whole generation; None where there is none at all.

        A damaged generation is passed over with a warning.

        Raises:
            SourceError: there are generations, but every one is damaged.
        """
        generations = self.generations()
        for generation in generations:
            try:
                return _read(generation)
            except (OSError, ValueError, KeyError) as error:
                logger.warning("checkpoint %s is damaged (%s): passed over", generation, error)
        if generations:
            raise SourceError(
                f"every checkpoint in {self.folder} is damaged; delete that folder to start anew"
            )
        return None


def _read(generation: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    sums = json.loads((generation / _MANIFEST).read_text())
    for name in (_TENSORS, _STATE):
        if compute_checksum(generation / name) != sums[name]:
            raise ValueError(f"{name} does not match its checksum")
    state: dict[str, Any] = join_state(
        json.loads((generation / _STATE).read_text()), load_file(generation / _TENSORS)
    )
    return state


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, giving each buffer the memory layout of its parameter.

    `Optimizer.load_state_dict` keeps the layout of the file, in which all is contiguous; that
    would make every later step slower than before the interruption.
    """
    optimizer.load_state_dict(state)
    for parameter, buffers in optimizer.state.items():
        for name, value in buffers.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
