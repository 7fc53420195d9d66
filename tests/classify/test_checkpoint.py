from __future__ import annotations

import errno
import io
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from labkit.classify.checkpoint import CHECKPOINTS, RunFolder
from labkit.classify.config import TrainConfig
from labkit.files import compute_checksum
from labkit.runtime import InputError, SourceError

STATE = {
    "weights": {"layer.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "b": [1, 2]}]},
    "text": "ü",
    "nothing": None,
    "flag": True,
}


def run_folder(folder: Path, **options: bool) -> RunFolder:
    return RunFolder(folder, TrainConfig(), "images", **options)


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


def test_what_is_saved_is_loaded_and_only_two_generations_stay(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    for step in (9, 10, 11):
        folder.save_state({**STATE, "step": step}, step)
    assert [path.name for path in folder.generations()] == ["step-11", "step-10"]
    loaded = folder.load_state()
    assert loaded is not None
    assert_same(loaded, {**STATE, "step": 11})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": 1}, 5)
    folder.save_state({"value": 2}, 5)
    assert folder.load_state() == {"value": 2}
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-5"]


def test_a_moment_that_stands_whole_is_not_written_again(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"epoch": 1, "step": 2, "value": 1}, 6)
    file = folder.generations()[0] / "state.pt"
    written = file.stat().st_ino
    folder.save_state({"epoch": 1, "step": 2, "value": 1}, 6)
    assert file.stat().st_ino == written
    folder.save_state({"epoch": 2, "step": 0, "value": 1}, 6)  # the same step, its epoch closed
    assert file.stat().st_ino != written
    file.write_bytes(b"damaged")
    folder.save_state({"epoch": 2, "step": 0, "value": 1}, 6)
    assert folder.load_state() == {"epoch": 2, "step": 0, "value": 1}


def test_a_kill_between_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path).save_state({"value": 1}, 5)
    rename, calls = os.replace, []

    def be_killed(source: Path, target: Path) -> None:
        calls.append(target)
        if Path(source).name.startswith(".partial-"):
            raise SystemExit  # the process is gone; its finally blocks do not count below
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("labkit.classify.checkpoint.os.replace", be_killed)
        run_folder(tmp_path).save_state({"value": 2}, 5)
    (left,) = (tmp_path / CHECKPOINTS).iterdir()
    assert left.name.startswith(".replaced-") and len(calls) >= 2
    folder = run_folder(tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        folder.load_state(resume=False)
    assert folder.load_state() == {"value": 1}
    folder.save_state({"value": 3}, 6)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-6"]


def test_what_was_moved_aside_by_a_killed_process_comes_before_older_generations(
    tmp_path: Path,
) -> None:
    folder = run_folder(tmp_path)
    for step in (4, 5):
        folder.save_state({"value": step}, step)
    newest = folder.generations()[0]
    newest.rename(newest.with_name(".replaced-step-5-0123456789abcdef"))
    assert run_folder(tmp_path).load_state() == {"value": 5}
    folder.save_state({"value": 6}, 5)
    assert run_folder(tmp_path).load_state() == {"value": 6}


def test_a_lock_cleans_up_after_killed_processes_and_nothing_else(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": 1}, 1)
    left = [".metrics.json.0123456789abcdef", "checkpoints/.partial-0123456789abcdef"]
    (tmp_path / left[0]).write_bytes(b"half")
    (tmp_path / left[1]).mkdir()
    (tmp_path / left[1] / "state.pt").write_bytes(b"half")
    (tmp_path / ".mine").touch()
    with run_folder(tmp_path, is_main_process=False).lock():
        assert all((tmp_path / name).exists() for name in left)
    with folder.lock():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoints"]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert folder.load_state() == {"value": 1}


def test_a_generation_that_stands_whole_is_cleaned_up_around(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"epoch": 1, "step": 0, "value": 1}, 5)
    (tmp_path / CHECKPOINTS / ".replaced-step-5-0123456789abcdef").write_text("a file")
    folder.save_state({"epoch": 1, "step": 0, "value": 1}, 5)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-5"]


@pytest.mark.parametrize("content", [5, [1], {"state": 1}, {"state": {}, "config": 1}])
def test_a_checkpoint_of_another_shape_is_damaged(content: object, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": 1}, 1)
    folder.save_state({"value": 2}, 2)
    newest = folder.generations()[0]
    torch.save(content, newest / "state.pt")
    (newest / "checksum.txt").write_text(compute_checksum(newest / "state.pt"))
    assert folder.load_state() == {"value": 1}


def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        folder.load_state(resume=False)
    with pytest.raises(InputError, match=r"whose checkpoints are gone.*labkit\.load_run"):
        folder.load_state()


def test_checkpoints_that_cannot_be_read_are_an_error_and_no_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("labkit.classify.checkpoint.os.listdir", refuse)
    with pytest.raises(SourceError, match=r"checkpoints could not be read.*Permission denied"):
        run_folder(tmp_path).load_state()


def test_folders_that_only_look_like_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-", "step-one", "step-5-copy", "steps", "step-07", "step-५"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    folder = run_folder(tmp_path)
    assert folder.load_state() is None
    folder.save_state({"value": 1}, 5)
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == 7


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(
    tmp_path: Path,
) -> None:
    first, second = run_folder(tmp_path / "run"), run_folder(tmp_path / "run" / "." / "")
    with first.lock():
        with pytest.raises(InputError, match=r"another process is at work on .*run; wait"):
            second.lock().__enter__()
        with run_folder(tmp_path / "run", is_main_process=False).lock():
            pass  # its own other processes
    with second.lock():
        pass


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert run_folder(tmp_path / "none").load_state() is None


@pytest.mark.parametrize("name", ["state.pt", "checksum.txt"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_generation_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({**STATE, "step": 1}, 1)
    folder.save_state({**STATE, "step": 2}, 2)
    file = folder.generations()[0] / name
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-7])
    elif damage == "altered":
        file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        loaded = folder.load_state()
    assert loaded is not None and loaded["step"] == 1
    assert "step-2 is damaged" in caplog.text


def test_only_damaged_generations_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state(STATE, 1)
    (folder.generations()[0] / "checksum.txt").unlink()
    with pytest.raises(SourceError, match="delete that folder"):
        folder.load_state()


def test_a_full_disk_leaves_the_generations_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": 1}, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SourceError, match="No space left"):
            folder.save_state({"value": 2}, 2)
    assert folder.load_state() == {"value": 1}
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-1"]


def test_restored_optimiser_buffers_keep_the_layout_of_their_parameters() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters())

    layer, optimizer = make()
    layer(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh_layer, fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    before = optimizer.state[layer.weight]["exp_avg"]
    after = fresh.state[fresh_layer.weight]["exp_avg"]
    assert torch.equal(before, after)
    assert after.stride() == fresh_layer.weight.stride()


def test_a_write_that_fails_half_way_leaves_the_generations_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": 1}, 1)

    def fail(state: object, file: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(SourceError, match=r"unexpected pos.*are intact"):
            folder.save_state({"value": 2}, 2)
    assert folder.load_state() == {"value": 1}


def test_a_checkpoint_of_the_older_layout_is_refused_in_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / CHECKPOINTS / "step-7"
    old.mkdir(parents=True)
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        (old / name).write_bytes(b"{}")
    with pytest.raises(InputError, match="written by an older labkit"):
        run_folder(tmp_path).load_state()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    folder = RunFolder(
        tmp_path / "a", TrainConfig(), "images", mirror=tmp_path / "b", is_main_process=False
    )
    folder.save_config()
    folder.save_history([{"epoch": 1}])
    folder.save_state(STATE, 1)
    folder.update_mirror()
    folder.finish_mirror()
    assert not list(tmp_path.iterdir())
    run_folder(tmp_path / "a").save_state({"value": 1}, 1)
    assert folder.load_state() == {"value": 1}


def test_the_mirror_is_written_beside_the_training_and_no_file_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[Path, bool]] = []

    def hash_and_note(path: Path, algorithm: str = "sha256") -> str:
        hashed.append((path, threading.current_thread() is threading.main_thread()))
        return compute_checksum(path, algorithm)

    monkeypatch.setattr("labkit.files.compute_checksum", hash_and_note)
    drive = tmp_path / "drive"
    folder = RunFolder(tmp_path / "run", TrainConfig(), "images", mirror=drive)
    folder.save_state({"value": 1}, 1)
    folder.finish_mirror()
    first = [path for path, _ in hashed if drive in path.parents]
    assert sorted(path.name for path in first) == ["checksum.txt", "state.pt"]
    hashed.clear()
    folder.save_state({"value": 2}, 2)
    assert folder._copier is not None
    folder._copier.join()
    assert not any(is_main for _, is_main in hashed)
    later = [path for path, _ in hashed if drive in path.parents]
    assert {path.parent.name for path in later} == {"step-2"}
    mirrored = RunFolder(drive, TrainConfig(), "images")
    assert [path.name for path in mirrored.generations()] == ["step-2", "step-1"]
    assert mirrored.load_state() == {"value": 2}


def test_training_does_not_wait_for_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive_answers = threading.Event()
    copied: list[Path] = []

    def copy_when_it_answers(source: Path, target: Path, **_: object) -> None:
        drive_answers.wait(60)
        copied.append(target)

    monkeypatch.setattr("labkit.classify.checkpoint.mirror_folder", copy_when_it_answers)
    folder = RunFolder(tmp_path / "run", TrainConfig(), "images", mirror=tmp_path / "drive")
    for step in (1, 2, 3):
        folder.save_state({"value": step}, step)
    assert not copied
    drive_answers.set()
    folder.finish_mirror()
    assert len(copied) == 2  # one for all three saves, and the last one


def test_a_failing_drive_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "drive").write_text("a file where the folder should be")
    folder = RunFolder(tmp_path / "run", TrainConfig(), "images", mirror=tmp_path / "drive")
    for step in (1, 2):
        folder.save_state({"value": step}, step)
        folder.finish_mirror()
    (record,) = caplog.records
    assert "could not be copied" in record.getMessage() and "drive" in record.getMessage()
    assert folder.load_state() == {"value": 2}


def test_a_configuration_saved_with_a_warm_up_in_epochs_resumes(tmp_path: Path) -> None:
    config = TrainConfig(epochs=80, warmup=0.2)
    folder = RunFolder(tmp_path, config, "images")
    old = {**config.to_json(), "warmup_epochs": 16}
    del old["warmup"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "to_json", lambda self: old)
        folder.save_state({"value": 1}, 1)
    assert folder.load_state() == {"value": 1}


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.save_state({"value": Path("no plain value")}, 1)
    with pytest.raises(SourceError, match="every checkpoint"):
        folder.load_state()
