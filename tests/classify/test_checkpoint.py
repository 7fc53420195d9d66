from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from labkit.classify.checkpoint import CheckpointStore, join_state, restore_optimizer, split_state
from labkit.runtime import SourceError

STATE = {
    "weights": {"layer.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "b": [1, 2]}]},
    "text": "ü",
    "nothing": None,
    "flag": True,
}


def assert_same(left: object, right: object) -> None:
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert isinstance(right, dict) and list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert left == right


def test_a_state_taken_apart_joins_to_the_same_state() -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert_same(join_state(split_state(STATE, tensors), tensors), STATE)


def test_what_is_saved_is_loaded_and_only_two_generations_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (9, 10, 11):
        store.save({**STATE, "step": step}, step)
    assert [path.name for path in store.generations()] == ["step-11", "step-10"]
    loaded = store.load()
    assert loaded is not None
    assert_same(loaded, {**STATE, "step": 11})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"value": 1}, 5)
    store.save({"value": 2}, 5)
    assert store.load() == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").load() is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_generation_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    store.save({**STATE, "step": 1}, 1)
    file = store.save({**STATE, "step": 2}, 2) / name
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-7])
    elif damage == "altered":
        file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        loaded = store.load()
    assert loaded is not None and loaded["step"] == 1
    assert "step-2 is damaged" in caplog.text


def test_only_damaged_generations_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.save(STATE, 1) / "manifest.json").unlink()
    with pytest.raises(SourceError, match="delete that folder"):
        store.load()


def test_a_full_disk_leaves_the_generations_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"value": 1}, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SourceError, match="No space left"):
            store.save({"value": 2}, 2)
    assert store.load() == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_restored_optimiser_buffers_keep_the_layout_of_their_parameters() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters())

    layer, optimizer = make()
    layer(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    skeleton = split_state(optimizer.state_dict(), tensors)
    fresh_layer, fresh = make()
    restore_optimizer(fresh, join_state(skeleton, tensors))
    before = optimizer.state[layer.weight]["exp_avg"]
    after = fresh.state[fresh_layer.weight]["exp_avg"]
    assert torch.equal(before, after)
    assert after.stride() == fresh_layer.weight.stride()
