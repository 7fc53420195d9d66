from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from labkit.classify.config import PRESETS, TrainConfig
from labkit.cli import main
from labkit.object_scenes import EVALUATION_SEED, make_object_scene


def labkit(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "labkit", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of two classes of 32 x 32 images, bright and dark."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, level in (("dark", 40), ("bright", 200)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_train_eval_and_refusal_to_overwrite(image_folder: Path, tmp_path: Path) -> None:
    train = ["train", "--preset", "seed-resnet18", "--data", "images", "--epochs", "2"]
    train += ["--out", "out", "--device", "cpu"]
    done = labkit(*train, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "history.jsonl", "metrics.json", "checkpoints", "report.html"} <= names
    measured = labkit("eval", "out", folder=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout == done.stdout
    again = labkit(*train, folder=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("labkit: out already holds a run")


def test_eval_on_other_data_takes_the_image_size_of_the_run(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from labkit import TrainConfig, fit

    config = TrainConfig(
        data=str(image_folder),
        image_size=48,
        model="vit",
        model_options={"patch_size": 12, "embed_dim": 16, "depth": 1, "num_heads": 2},
        epochs=1,
    )
    fit(config, out=tmp_path / "out", device="cpu")
    report = (tmp_path / "out" / "report.html").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    (other / "test" / "dark" / "0.png").unlink()
    command = ["labkit", "eval", str(tmp_path / "out"), "--data", str(other), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", command)
        main()
    assert not stop.value.code
    told = capsys.readouterr().out
    assert "data            other" in told and "report" not in told
    assert (tmp_path / "out" / "report.html").read_bytes() == report


def test_train_takes_the_image_size_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def keep_size(config: TrainConfig, **_: object) -> None:
        sizes.append(config.image_size)
        raise SystemExit

    monkeypatch.setattr("labkit.classify.fit.fit", keep_size)
    for arguments in ([], ["--image-size", "48"]):
        monkeypatch.setattr(sys, "argv", ["labkit", "train", *arguments])
        with pytest.raises(SystemExit):
            main()
    assert sizes == [32, 48]


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_only_the_main_process_prints_the_result(
    rank: str, prints: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = SimpleNamespace(accuracy=0.5, accuracy_interval=(0.4, 0.6), accuracy_tta=0.55)
    data = SimpleNamespace(name="demo scenes")
    run = SimpleNamespace(
        metrics=metrics, data=data, note="demo", folder=Path("out"), is_on_other_data=False
    )
    monkeypatch.setattr("labkit.classify.fit.fit", lambda *_, **__: run)
    monkeypatch.setattr(sys, "argv", ["labkit", "train", "--preset", "demo", "--data", "scenes"])
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        main()
    assert ("test accuracy   50.00%" in capsys.readouterr().out) == prints


def run_command(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `labkit ARGUMENTS` in this process."""
    patch.setattr(sys, "argv", ["labkit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What would have been trained, one configuration a command."""
    seen: list[TrainConfig] = []

    def note_config(config: TrainConfig, **_: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("labkit.classify.fit.fit", note_config)
    return seen


def test_a_preset_keeps_its_own_data_and_validation_split(
    configs: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command(monkeypatch, "train", "--preset", "demo")
    run_command(monkeypatch, "train", "--preset", "demo", "--data", "hub", "--val-size", "0")
    run_command(monkeypatch, "train", "--preset", "speed")
    assert configs[0] == PRESETS["demo"] and configs[0].data == "scenes"
    assert (configs[1].data, configs[1].val_size) == ("hub", 0)
    assert configs[2] == PRESETS["speed"]


def test_every_option_of_train_reaches_the_configuration(
    configs: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--image-size", "48", "--batch-size", "20", "--learning-rate", "0.01"]
    options += ["--weight-decay", "0.2", "--set", "augment.cutmix=0.5", "--set", "clip_norm=2"]
    options += ["--set", "model_options.depth=3", "--epochs", "7", "--seed", "3"]
    run_command(monkeypatch, "train", "--preset", "vit", "--data", "folder", *options)
    vit = PRESETS["vit"]
    assert configs == [
        dataclasses.replace(
            vit,
            data="folder",
            image_size=48,
            batch_size=20,
            learning_rate=0.01,
            weight_decay=0.2,
            clip_norm=2.0,
            epochs=7,
            seed=3,
            augment=dataclasses.replace(vit.augment, cutmix=0.5),
            model_options={**vit.model_options, "depth": 3},
        )
    ]


def test_predict_prints_and_draws_the_classes(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, device = str(tmp_path / "run"), ["--device", "cpu"]
    options = ["--set", "model_options.embed_dim=16", "--set", "model_options.num_heads=2"]
    options += ["--set", "model_options.depth=1", "--image-size", "16", "--batch-size", "8"]
    options += ["--val-size", "0", "--epochs", "8", "--learning-rate", "0.01", *device]
    command = ["train", "--preset", "demo", "--data", str(image_folder), "--out", run]
    assert run_command(monkeypatch, *command, *options) == 0
    shutil.rmtree(image_folder / "train")  # what it was trained on is not needed any more
    capsys.readouterr()
    images = [str(image_folder / "test" / name / "0.png") for name in ("bright", "dark")]
    assert run_command(monkeypatch, "predict", run, *images, *device) == 0
    bright, dark, figure = capsys.readouterr().out.splitlines()
    assert bright.startswith("0.png  bright ") and "%  dark " in bright
    assert dark.startswith("0.png  dark ")
    assert figure == str(tmp_path / "run" / "predictions.png")
    with Image.open(figure) as drawn:
        assert drawn.size[0] > 400
    (tmp_path / "broken.png").write_bytes(b"no image")
    out = tmp_path / "drawn"
    broken = [str(tmp_path / "broken.png"), str(image_folder / "test" / "dark")]
    assert run_command(monkeypatch, "predict", run, *broken, "--out", str(out), *device) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 8 + 1 and (out / "predictions.png").exists()
    assert "broken.png" in printed.err and "1 of 9 images failed" in printed.err


def test_doctor_answers_in_under_five_seconds_of_work(tmp_path: Path) -> None:
    children = os.times()
    done = labkit("doctor", folder=tmp_path)
    after = os.times()
    assert done.returncode == 0, done.stderr
    for word in ("python", "torch", "device", "precision", "disk", "cache"):
        assert word in done.stdout
    assert after.children_user - children.children_user < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "sed-resnet18"], "did you mean 'seed-resnet18'"),
        (["train", "--data", "no-such-folder"], "no-such-folder"),
        (["train", "--data", "scenes", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--data", "scenes", "--val-size=-1"], "val_size must be at least 0"),
        (["train", "--data", "scenes", "--image-size", "0"], "image_size must be at least 1"),
        (["train", "--data", "scenes", "--image-size", "48"], "image_size must be 32 for 'scenes'"),
        (["train", "--data", "scenes", "--device", "warp"], "device 'warp' is unknown"),
        (
            ["train", "--preset", "demo", "--image-size", "0"],
            "image_size must be at least 1, got 0",
        ),
        (["train", "--preset", "demo", "--image-size", "48"], "image_size must be 32 for 'scenes'"),
        (["train", "--preset", "demo", "--batch-size", "0"], "batch_size must be at least 1"),
        (["train", "--preset", "demo", "--learning-rate", "0"], "learning_rate must be positive"),
        (["train", "--preset", "demo", "--weight-decay=-1"], "weight_decay must be at least 0"),
        (["train", "--preset", "demo", "--set", "depth=3"], "setting 'depth' is unknown"),
        (["predict", "no-run", "photo.png"], "no-run holds no finished run"),
        (["segment", "gone.png", "--prompt", "star", "--profile", "demo"], "gone.png"),
        (["segment", "x.png", "--prompt", " ", "--profile", "demo"], "a sentence is empty"),
        (["segment", "x.png", "--prompt", "a", "--not", "a"], "both wanted and not"),
        (["segment", "x.png", "--prompt", "Dog.", "--not", "dog"], "both wanted and not"),
        (["segment", "x.png", "--prompt", "?"], "no word in it"),
        (["segment", "x" * 300, "--prompt", "a", "--profile", "demo"], "could not be read"),
        (["segment", "x.png", "--prompt", "caf\udce9"], "broken text"),
        (["segment", "x.png", "--prompt", "a", "--profile", "dmeo"], "'full' or 'demo'"),
        (["segment", "x.png", "--prompt", "a", "--presence-threshold", "1.1"], "in [0, 1], got"),
        (["segment", "x.png", "--prompt", "a", "--box-threshold", "0"], "between 0 and 1"),
        (["segment", "x.png", "--prompt", "a", "--mask-threshold", "11"], "in [-10, 10], got"),
        (["segment", "x.png", "--prompt", "a", "--overlap-threshold=-1"], "in [0, 1], got"),
        (["segment", "x.png", "--prompt", "a", "--minimum-area", "2"], "minimum_area"),
        (["segment", "x.png", "--prompt", "a", "--maximum-objects", "0"], "1 or more, got 0"),
        (["segment", "x.png", "--prompt", "a", "--presence-threshold", "nan"], "in [0, 1], got"),
        (["segment", "x.png", "--prompt", "a", "--template", "photo"], "must have one {}"),
        (["segment", "x.png", "--prompt", "a", "--clipseg", "."], ". is no CLIPSeg, it lacks"),
        (["segment", "x.png", "--prompt", "a", "--sam2", "."], "one file of weights"),
        (["segment", "x.png", "--prompt", "a", "--sam2", "huge"], "sam2 must be one of tiny"),
        (["segment", "x.png", "--prompt", "a", "--detector", "yolo"], "detector must be one of"),
        (["bench", "segment", "--data", "none"], "there is no none; give a folder of label"),
        (["bench", "segment", "--data", "."], "holds neither NAME_labels.png"),
        (["bench", "segment", "--crops"], "--limit and --crops need --data"),
        (["bench", "segment", "--data", ".", "--limit", "0"], "limit must be at least 1, got 0"),
        (["bench", "segment", "--overlap-threshold", "2"], "in [0, 1], got 2.0"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["labkit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("labkit: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model_options.depth=x"], "model 'vit' cannot be built with {'patch_size': 4"),
        (["--val-size", "900"], "val_size must be between 1 and 47, got 900"),
    ],
)
def test_what_only_the_data_can_tell_is_one_line_and_leaves_no_folder(
    arguments: list[str],
    message: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["train", "--preset", "vit-classic", "--data", str(image_folder), *arguments]
    assert run_command(monkeypatch, *command, "--out", str(tmp_path / "run")) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after the bar of the decoding
    assert line.startswith("labkit: ") and not (tmp_path / "run").exists()
    assert message in line


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(2):
        scene = make_object_scene(number, seed=EVALUATION_SEED)
        Image.fromarray(scene.image).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_segment_writes_masks_overlay_and_report(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = make_object_scene(0, seed=EVALUATION_SEED).present[0]
    command = ["segment", str(scenes / "0.png"), "--prompt", true, "--prompt", "zebra"]
    command += ["--profile", "demo", "--out", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    told = capsys.readouterr().out
    assert "'zebra'  not found" in told and "demo" in told
    document = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert document["images"][0] == {"id": 1, "file_name": "0.png", "width": 128, "height": 128}
    verdicts = {result["sentence"]: result["present"] for result in document["sentences"]}
    assert not verdicts["zebra"]
    with Image.open(tmp_path / "out" / "overlay.png") as overlay:
        assert min(overlay.size) > 100
    assert "demo" in (tmp_path / "out" / "report.html").read_text()


def test_segment_of_a_folder_gives_each_image_a_folder(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["segment", str(scenes), "--prompt", "star", "--profile", "demo"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0001-0", "0002-1"]


def segment_all(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run `labkit segment` on the demo profile; the exit status, None or 0 for success."""
    command = ["segment", *arguments, "--profile", "demo", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def list_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_folder_gets_one_coco_file_and_no_report_unless_asked(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(scenes), "--prompt", "star", "--prompt", "circle", "--out", str(tmp_path)]
    assert not segment_all(monkeypatch, *arguments)
    assert list_files(tmp_path) == ["0001-0/masks.json", "0002-1/masks.json", "masks.json"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "masks.json"))
    assert [image["file_name"] for image in coco.imgs.values()] == ["0.png", "1.png"]
    for number, image_id in enumerate(coco.imgs):
        alone = json.loads((tmp_path / f"000{number + 1}-{number}" / "masks.json").read_text())
        rows = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [row["segmentation"] for row in rows] == [
            row["segmentation"] for row in alone["annotations"]
        ]
    assert not segment_all(monkeypatch, *arguments, "--report", "--format", "geojson")
    names = ["masks.geojson", "masks.json", "overlay.png", "report.html"]
    assert list_files(tmp_path / "0001-0") == list_files(tmp_path / "0002-1") == names


def test_a_folder_goes_on_where_it_was_left(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(scenes, photos)
    arguments = [str(photos), "--prompt", "star", "--out", str(out)]
    assert not segment_all(monkeypatch, *arguments)
    whole = (out / "masks.json").read_bytes()
    first, second = (out / name / "masks.json" for name in ("0001-0", "0002-1"))
    stamps = [path.stat().st_mtime_ns for path in (first, second)]
    second.write_text("{")  # broken off
    (out / "masks.json").unlink()
    capsys.readouterr()
    assert not segment_all(monkeypatch, *arguments)
    assert "1 of 2 images are finished already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == stamps[0] and second.stat().st_mtime_ns > stamps[1]
    assert (out / "masks.json").read_bytes() == whole
    for change in (["--not", "circle"], ["--box-threshold", "0.4"], ["--prompt", "circle"]):
        assert not segment_all(monkeypatch, *arguments, *change)  # another question: all anew
        assert "finished already" not in capsys.readouterr().out
    assert not segment_all(monkeypatch, *arguments)
    later = time.time() + 10
    os.utime(photos / "0.png", (later, later))
    capsys.readouterr()
    assert not segment_all(monkeypatch, *arguments)
    assert "1 of 2 images are finished already" in capsys.readouterr().out


def test_one_image_is_saved_in_the_formats_that_are_asked_for(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(scenes / "0.png"), "--prompt", "star", "--out", str(tmp_path)]
    assert not segment_all(monkeypatch, *arguments, "--format", "labels", "--format", "coco")
    assert list_files(tmp_path) == ["labels.png", "masks.json"]
    assert segment_all(monkeypatch, *arguments, "--format", "pascal") == 1
    assert "formats must be of coco, " in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_narrow_console_ends_no_command(
    encoding: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "猫 é.png"
    image.write_bytes((scenes / "0.png").read_bytes())
    arguments = ["segment", str(image), "--prompt", "star", "--prompt", "猫🦖", "--profile", "demo"]
    outputs = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2)]
    monkeypatch.setattr(sys, "argv", ["labkit", *arguments, "--out", str(tmp_path / "o\udce9")])
    monkeypatch.setattr(sys, "stdout", outputs[0])
    monkeypatch.setattr(sys, "stderr", outputs[1])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    outputs[0].flush()
    told = outputs[0].buffer.getvalue().decode(encoding)
    shown = "猫 é.png  '猫🦖'".encode(encoding, "backslashreplace").decode(encoding)
    assert shown in told and r"o\udce9" in told
    assert outputs[0].errors == outputs[1].errors == "strict"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
def test_paths_and_messages_reach_a_narrow_console(encoding: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "猫")
    done = labkit("doctor", folder=tmp_path, PYTHONIOENCODING=encoding, LABKIT_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert r"\u732b" in done.stdout.splitlines()[-1]
    done = labkit("eval", "猫", folder=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("labkit: ") and r"\u732b" in line


@pytest.mark.parametrize("command", ["train", "segment"])
def test_help_and_usage_reach_a_narrow_console(command: str, tmp_path: Path) -> None:
    asked = labkit(command, "--help", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert asked.returncode == 0 and "--device" in asked.stdout
    wrong = labkit(command, "--猫", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_segment_suggests_the_other_number_of_what_is_absent(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from labkit.segment import pipeline

    true = make_object_scene(0, seed=EVALUATION_SEED).present[0]
    monkeypatch.setattr(pipeline, "vary_sentence", lambda _: [true])
    command = ["segment", str(scenes / "0.png"), "--prompt", "zebras", "--profile", "demo"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    line = capsys.readouterr().out.splitlines()[0]
    (result,) = json.loads((tmp_path / "masks.json").read_text())["sentences"]
    shown = f"rather ask for {true!r} ({result['suggestions'][true]:.2f})"
    assert "'zebras'  not found" in line and shown in line


def test_segment_says_once_that_a_sentence_reads_like_a_list(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["segment", str(scenes), "--prompt", "star, circle", "--profile", "demo"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    hints = [record.getMessage() for record in caplog.records if "a list" in record.getMessage()]
    assert len(hints) == 1 and "'star', 'circle'" in hints[0]


def test_segment_of_a_folder_skips_and_names_what_is_no_image(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "photos"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "._a.png").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("not an image")
    for name in ("a.png", "A: b?.PNG"):
        (folder / name).write_bytes((scenes / "0.png").read_bytes())
    command = ["segment", str(folder), "--prompt", "star", "--profile", "demo"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    documents = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("out/*/masks.json"))]
    assert [d["images"][0]["file_name"] for d in documents] == ["A: b?.PNG", "a.png"]
    names = ["0001-A_b", "0002-a", "masks.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert "skipped 2 that are no images: ._a.png, notes.txt" in caplog.text


def test_a_folder_without_images_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "two\nlines"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system stores no such name")
    command = ["segment", str(folder), "--prompt", "star", "--profile", "demo"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command])
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "lines holds no image" in line


def test_segment_goes_on_after_an_image_that_cannot_be_read(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((scenes / "0.png").read_bytes()[:100])
    command = ["segment", str(damaged), str(scenes / "1.png"), "--prompt", "star"]
    command += ["--profile", "demo", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["labkit", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    first, last = capsys.readouterr().err.strip().splitlines()
    assert "damaged.png" in first and "1 of 2 images failed" in last
    assert (tmp_path / "out" / "0002-1" / "masks.json").exists()


def test_bench_segment_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.setattr(
        sys, "argv", ["labkit", "bench", "segment", "--scenes", "4", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    figures = json.loads(out.read_text())
    named = {"n_scenes", "miou", "miou_ci", "miou_clipseg_only", "miou_peak_0013"}
    named |= {"presence_auroc", "presence_mcc", "instance_recall", "weights", "versions"}
    assert named <= figures.keys() and figures["profile"] == "demo"


def test_bench_segment_measures_photographs_with_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        scene = make_object_scene(number, seed=EVALUATION_SEED)
        labels = scene.masks.any(axis=0).astype("uint8") + 1
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / f"{number}_labels.png")
    (tmp_path / "classes.txt").write_text("zebra\nground, stuff\nshape\n")
    out = tmp_path / "out" / "photos.json"
    assets = Path(__file__).parents[1] / "labkit" / "assets"
    command = ["bench", "segment", "--data", str(tmp_path), "--limit", "2", "--crops"]
    command += ["--clipseg", str(assets / "clipseg-tiny"), "--sam2", str(assets / "sam2-tiny")]
    command += ["--template", "{}", "--box-threshold", "0.4", "--device", "cpu"]
    assert not run_command(monkeypatch, *command, "--out", str(out))
    figures = json.loads(out.read_text())
    assert figures["weights"] == {
        "CLIPSeg": "clipseg-tiny (local, not checked)",
        "SAM-2": "sam2-tiny (local, not checked)",
    }
    assert figures["templates"] == ["{}"] and figures["thresholds"] == {"box": 0.4}
    assert "presence not calibrated" in figures["note"]
    assert (figures["frames"]["n"], figures["crops"]["n"]) == (2, 8)
    named = {"miou_things", "miou_stuff", "miou_clipseg_only", "presence_auroc", "presence_mcc"}
    named |= {"instance_recall", "ciou", "giou", "boundary_miou", "cgf1", "seconds_per_image"}
    for part in (figures["frames"], figures["crops"]):
        assert {*named, *(f"{name}_ci" for name in named)} <= part.keys()


@pytest.mark.parametrize("options", [["--scenes", "2"], ["--data", "photos"]])
def test_thresholds_of_the_command_line_reach_the_bench(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_object_scene(0, seed=EVALUATION_SEED)
    (tmp_path / "photos").mkdir()
    Image.fromarray(scene.image).save(tmp_path / "photos" / "0.png")
    labels = scene.masks.any(axis=0).astype("uint8")
    Image.fromarray(labels).save(tmp_path / "photos" / "0_labels.png")
    (tmp_path / "photos" / "classes.txt").write_text("ground\nstar\n")
    monkeypatch.chdir(tmp_path)
    found = {}
    for threshold in ("0", "1"):
        command = ["bench", "segment", "--device", "cpu", "--presence-threshold", threshold]
        assert not run_command(monkeypatch, *command, *options, "--out", f"{threshold}.json")
        figures = json.loads((tmp_path / f"{threshold}.json").read_text())
        found[threshold] = figures.get("frames", figures)["miou"]
    assert found["0"] > found["1"] == 0


def test_thresholds_of_the_command_line_reach_the_segmenter(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = make_object_scene(0, seed=EVALUATION_SEED).present[0]
    areas = []
    for logit in ("-4", "4"):
        out = tmp_path / logit
        command = ["segment", str(scenes / "0.png"), "--prompt", true, "--profile", "demo"]
        options = [f"--mask-threshold={logit}", "--presence-threshold", "0.1", "--out", str(out)]
        assert not run_command(monkeypatch, *command, *options)
        masks = json.loads((out / "masks.json").read_text())
        areas.append(sum(each["area"] for each in masks["annotations"]))
    assert areas[0] > areas[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--claims", "depth,hight"], "claims must be of adamw-cosine, .*, width, got hight"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--width", "2"], "width must be between 0.015625 and 1, got 2.0"),
    ],
)
def test_a_wrong_option_of_ablate_ends_in_one_line(
    options: list[str],
    message: str,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["labkit", "ablate", "--data", str(image_folder), "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("labkit:")]
    assert re.fullmatch(f"labkit: {message}", line)


def test_ablate_prints_a_verdict_for_each_claim(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["labkit", "ablate", "--data", str(image_folder), "--device", "cpu"]
    command += ["--epochs", "1", "--seeds", "1", "--claims", "crop-flip", "--width", "0.0625"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "random crop and flip bring 2 points: cannot be told" in printed
    assert (tmp_path / "out" / "ablate.json").exists()


WAITING = """
import signal, sys, time
from labkit.classify import fit

# Tests that a script runs in the background inherit that interrupts are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait(*arguments, **options):
    print("ready", flush=True)
    time.sleep(60)

fit.fit = wait
sys.argv = ["labkit", "train", "--preset", "demo"]
from labkit.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_training_that_is_interrupted_says_how_to_go_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "labkit: interrupted; add --resume to go on"
    assert "Traceback" not in errors


@pytest.mark.parametrize("flag", [[], ["--exclusive"]])
def test_limits_and_exclusivity_reach_the_segmenter(
    flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def remember(self: object, *arguments: object, **options: object) -> None:
        asked.append(options)
        raise Asked

    asked: list[dict[str, object]] = []
    monkeypatch.setattr("labkit.segment.pipeline.TextSegmenter.__call__", remember)
    command = ["segment", str(tmp_path / "x.png"), "--prompt", "star", "--profile", "demo"]
    command += ["--minimum-area", "0.25", "--maximum-objects", "2", *flag]
    monkeypatch.setattr(sys, "argv", ["labkit", *command])
    with pytest.raises(Asked):
        main()
    assert asked == [
        {
            "minimum_area": 0.25,
            "maximum_objects": 2,
            "exclusive": bool(flag),
            "assume_present": False,
        }
    ]
