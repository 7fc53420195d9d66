"""What a run leaves on disk while it goes on: configuration, history, checkpoints, a mirror."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit.classify.checkpoint import CheckpointStore
from labkit.classify.config import TrainConfig
from labkit.files import mirror_folder, write_json, write_json_lines
from labkit.runtime import InputError

CONFIG, HISTORY, CHECKPOINTS = "config.json", "history.jsonl", "checkpoints"


class Keeper:
    """The folder of one run, and the mirror that follows it; without a folder it keeps nothing."""

    def __init__(
        self, folder: Path | None, mirror: Path | None, config: TrainConfig, fingerprint: str
    ) -> None:
        self.folder = folder
        self._mirror = mirror if folder is not None else None
        self._config = config
        self._fingerprint = fingerprint
        self._store = None if folder is None else CheckpointStore(folder / CHECKPOINTS)

    def bring_back(self) -> None:
        """Copy the run from the mirror, where only the mirror has it."""
        if self._mirror is None or self.folder is None or not self._mirror.is_dir():
            return
        if self._store is not None and not self._store.generations():
            mirror_folder(self._mirror, self.folder, prune=CHECKPOINTS)

    def checkpoint(self, *, resume: bool) -> dict[str, Any] | None:
        """The newest checkpoint of this very run; None where there is none.

        Raises:
            InputError: there is one, but `resume` is not set, or it is of another configuration.
            SourceError: there are some, but all are damaged.
        """
        if self._store is None or not self._store.generations():
            return None
        if not resume:
            raise InputError(
                f"{self.folder} already holds a run; resume it (resume=True, --resume), "
                "or choose another folder"
            )
        saved = self._store.load()
        if saved is not None:
            self._check(saved)
        return saved

    def _check(self, saved: Mapping[str, Any]) -> None:
        theirs, ours = saved["config"], self._config.to_json()
        # The fingerprint of the pictures stands for where they came from.
        changed = [name for name in ours if name != "data" and ours[name] != theirs.get(name)]
        found = [f"{name}: {theirs.get(name)!r} -> {ours[name]!r}" for name in changed]
        if saved["fingerprint"] != self._fingerprint:
            found.append("other pictures")
        if found:
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(found)}). "
                "Use the same settings to resume it, or choose another folder."
            )

    def begin(self) -> None:
        """Write the configuration."""
        if self.folder is not None:
            write_json(self.folder / CONFIG, self._config.to_json())

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint of `state` after `step` steps, and let the mirror follow."""
        if self._store is not None:
            identity = {"config": self._config.to_json(), "fingerprint": self._fingerprint}
            self._store.save({**state, **identity}, step)
            self.follow()

    def record(self, history: list[dict[str, float]]) -> None:
        """Write the history, one line an epoch."""
        if self.folder is not None:
            write_json_lines(self.folder / HISTORY, history)

    def follow(self) -> None:
        """Bring the mirror up to date."""
        if self.folder is not None and self._mirror is not None:
            mirror_folder(self.folder, self._mirror, prune=CHECKPOINTS)
