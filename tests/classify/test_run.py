from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData, Split, load_data
from labkit.classify.fit import fit
from labkit.classify.run import Run, compare_runs, load_classifier, load_run
from labkit.runtime import InputError


@pytest.fixture(scope="module")
def run(squares: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A ViT that tells the three colours apart."""
    config = TrainConfig(
        data="squares",
        image_size=16,
        model="vit",
        model_options={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        epochs=8,
        batch_size=32,
        learning_rate=3e-3,
        augment=AugmentConfig(flip="random"),
    )
    return fit(config, data=squares, out=tmp_path_factory.mktemp("run"))


def test_a_file_an_image_and_an_array_are_predicted_alike(
    run: Run, squares: ImageData, tmp_path: Path
) -> None:
    pixels = squares.test.images[0]
    Image.fromarray(pixels).save(tmp_path / "square.png")
    sources = [
        tmp_path / "square.png",
        str(tmp_path / "square.png"),
        Image.fromarray(pixels),
        pixels,
    ]
    probabilities = run.predict_proba(sources)
    assert probabilities.shape == (4, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, run.metrics.probabilities[:1].repeat(4, 0), atol=1e-6)
    expected = squares.classes[run.metrics.probabilities[0].argmax()]
    assert run.predict(sources).tolist() == [expected] * 4
    assert run.predict(tmp_path / "square.png").tolist() == [expected]


def test_an_array_of_images_gives_what_the_evaluation_gave(run: Run, squares: ImageData) -> None:
    probabilities = run.predict_proba(squares.test.images)
    np.testing.assert_allclose(probabilities, run.metrics.probabilities, atol=1e-6)
    names = run.predict(squares.test.images)
    assert names.shape == (60,)
    assert np.mean(names == np.array(squares.classes)[squares.test.labels]) == run.metrics.accuracy


def test_no_images_give_no_predictions(run: Run) -> None:
    assert run.predict_proba([]).shape == (0, 3)
    assert run.predict([]).shape == (0,)


def test_a_photograph_is_cut_as_a_folder_of_images_is(run: Run, image_folder: Path) -> None:
    data = load_data(str(image_folder), image_size=16)
    path = image_folder / "train" / "ant" / "0.png"
    np.testing.assert_array_equal(run.predict_proba(path), run.predict_proba(data.train.images[0]))


def test_the_network_of_a_run_is_loaded_without_its_data(run: Run, squares: ImageData) -> None:
    assert run.folder is not None
    classifier = load_classifier(run.folder, device="cpu")  # its data are nowhere to be found
    images = squares.test.images[:5]
    np.testing.assert_allclose(classifier.predict_proba(images), run.predict_proba(images))
    assert classifier.predict(images).tolist() == run.predict(images).tolist()
    assert classifier.note == "" and tuple(classifier.classes) == squares.classes
    with pytest.raises(InputError, match="no finished run"):
        load_classifier(run.folder / "checkpoints")


def test_an_image_that_cannot_be_read_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png"):
        run.predict(tmp_path / "gone.png")


def test_every_figure_is_a_method(run: Run, squares: ImageData) -> None:
    figures = [
        run.learning_curves(),
        run.confusion_matrix(),
        run.calibration(),
        run.class_scores(),
        run.mistakes(),
        run.attention(),
        run.attention(np.zeros((2, 40, 30, 3), np.uint8)),
        run.predictions(squares.test.images[0]),
        run.predictions([squares.test.images[0], np.zeros((40, 30, 3), np.uint8)]),
    ]
    assert all(isinstance(figure, Figure) for figure in figures)
    assert run.has_attention
    assert {"Learning curves", "Confusion matrix", "Attention roll-out"} <= run.figures().keys()


def create_convolutional_net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )


def test_a_convolutional_network_of_your_own_shows_where_it_looks(
    squares: ImageData, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=1, batch_size=32, image_size=16)
    run = fit(config, model=create_convolutional_net(), data=squares, out=tmp_path, device="cpu")
    assert run.has_attention
    figure = run.attention(squares.test.images[:2])
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said[:2] == run.predict(squares.test.images[:2]).tolist() and "Grad-CAM" in said
    assert "Grad-CAM" in run.figures() and "Attention roll-out" not in run.figures()
    assert "Grad-CAM" in (tmp_path / "report.html").read_text()


def test_runs_are_compared_on_the_images_that_both_saw(run: Run, squares: ImageData) -> None:
    config = TrainConfig(epochs=1, image_size=16)
    weak = fit(config, model=create_convolutional_net(), data=squares, device="cpu")
    labels = squares.test.labels
    right, weakly_right = (one.metrics.probabilities.argmax(1) == labels for one in (run, weak))
    won, lost = (right & ~weakly_right).sum(), (~right & weakly_right).sum()
    assert won > lost + 10
    # The exact test of a fair coin that showed at least `won` heads, on either side.
    tail = sum(math.comb(won + lost, heads) for heads in range(won, won + lost + 1))
    p_value = min(1.0, 2 * tail / 2 ** int(won + lost))
    first, second = (
        compare_runs({"ViT": run, "conv": weak, "ViT again": run}),
        compare_runs({"conv": weak, "conv again": weak}),
    )
    said = [text.get_text() for text in first.axes[2].texts]
    assert f"{p_value:.2g}" in said and "can be told apart" in said
    assert f"{100 * weak.metrics.accuracy:.2f} %" in said
    difference = 100 * (weak.metrics.accuracy - run.metrics.accuracy)
    assert f"{difference:+.2f} points" in said
    said = [text.get_text() for text in second.axes[2].texts]
    assert said[-2:] == ["1", "cannot be told apart"]


def test_runs_on_different_test_images_are_not_compared(run: Run, squares: ImageData) -> None:
    swapped = dataclasses.replace(
        run, data=ImageData.from_splits(squares.test, squares.train, name="swapped")
    )
    with pytest.raises(InputError, match=r"'b' was measured on swapped"):
        compare_runs({"a": run, "b": swapped})
    with pytest.raises(InputError, match="two runs or more"):
        compare_runs({"a": run})


def test_attention_of_a_network_without_any_is_refused(run: Run) -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3))
    plain = dataclasses.replace(run, model=flat)
    assert not plain.has_attention
    with pytest.raises(InputError, match="Sequential"):
        plain.attention()


def test_other_data_is_loaded_at_the_size_of_the_run_and_measured(
    run: Run, squares: ImageData, tmp_path: Path
) -> None:
    """The run has 16 pixels; its classes are red, green and blue, a folder's in order of name."""
    for name, split in (("train", squares.train), ("test", squares.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            folder = tmp_path / name / squares.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:03}.png")
    assert run.folder is not None
    for data in (str(tmp_path), tmp_path, load_data(str(tmp_path), image_size=16)):
        loaded = load_run(run.folder, data=data)
        assert loaded.data.test.images.shape == (60, 16, 16, 3)
        assert loaded.metrics.classes == squares.classes
        assert loaded.metrics.accuracy == run.metrics.accuracy
        np.testing.assert_array_equal(
            np.sort(loaded.metrics.confusion), np.sort(run.metrics.confusion)
        )


def test_a_run_says_what_it_was_measured_on(
    tiny_config: TrainConfig,
    image_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = dataclasses.replace(tiny_config, data=str(image_folder), epochs=1, batch_size=4)
    run = fit(config, out=tmp_path / "run", device="cpu")
    assert run.facts["data_fingerprint"] == run.data.fingerprint
    caplog.clear()
    same = load_run(tmp_path / "run", device="cpu")
    assert same.facts == run.facts and not caplog.records
    Image.new("RGB", (40, 40)).save(image_folder / "test" / "ant" / "9.png")
    changed = load_run(tmp_path / "run", device="cpu")
    assert "has changed since" in caplog.text
    assert changed.facts["evaluated_on_fingerprint"] == changed.data.fingerprint
    assert changed.facts["data_fingerprint"] == run.data.fingerprint


def test_loading_a_run_leaves_random_generators_as_found(
    run: Run, squares: ImageData, tmp_path: Path
) -> None:
    run.save(tmp_path)
    before = torch.get_rng_state()
    load_run(tmp_path, data=squares)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_flipped_bit_in_the_weights_is_noticed(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # of the last number, so that the file can be read all the same
    (copy / "model.safetensors").write_bytes(weights)
    for load in (lambda: load_run(copy, data=run.data), lambda: load_classifier(copy)):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged.*metrics\.json"):
            load()


def test_a_run_measured_on_other_data_never_overwrites_the_original(
    run: Run, squares: ImageData, tmp_path: Path
) -> None:
    assert run.folder is not None
    files = ("config.json", "history.jsonl", "metrics.json", "model.safetensors", "report.html")
    before = {name: (run.folder / name).read_bytes() for name in files}
    inverted = [
        Split(255 - split.images, split.labels, split.classes)
        for split in (squares.train, squares.test)
    ]
    other = load_run(run.folder, data=ImageData.from_splits(*inverted, name="inverted"))
    assert other.is_on_other_data and not run.is_on_other_data
    for write in (other.save, other.report, lambda: other.save(run.folder / ".")):
        with pytest.raises(
            InputError, match=r"measured on inverted, .*; name another folder"
        ) as no:
            write()
        assert "\n" not in str(no.value)
    assert {name: (run.folder / name).read_bytes() for name in files} == before
    other.save(tmp_path / "inverted")
    saved = json.loads((tmp_path / "inverted" / "metrics.json").read_text())
    weights = (tmp_path / "inverted" / "model.safetensors").read_bytes()
    assert saved.pop("weights_sha256") == hashlib.sha256(weights).hexdigest()
    assert saved == other.to_json()
    assert {path.name for path in (tmp_path / "inverted").iterdir()} == set(files)
    again = load_run(tmp_path / "inverted", data=other.data)
    np.testing.assert_array_equal(again.metrics.confusion, other.metrics.confusion)
    same = load_run(run.folder, data=squares)
    assert not same.is_on_other_data
    same.report()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xe9\xff"])
@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "metrics.json"])
def test_a_damaged_file_of_a_run_is_named_in_one_line(
    run: Run, squares: ImageData, tmp_path: Path, name: str, content: bytes
) -> None:
    assert run.folder is not None
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is damaged") as caught:
        load_run(tmp_path / "run", data=squares)
    assert "\n" not in str(caught.value)


def test_damaged_weights_of_a_run_are_named(run: Run, squares: ImageData, tmp_path: Path) -> None:
    assert run.folder is not None
    shutil.copytree(run.folder, tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    for length in (0, 100, len(weights.read_bytes()) - 1):
        weights.write_bytes(weights.read_bytes()[:length])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            load_run(tmp_path / "run", data=squares)


@pytest.mark.parametrize("folder", ["a\0b", "x" * 300])
def test_names_that_no_folder_can_have_hold_no_run(folder: str) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        load_run(folder)


def test_a_run_without_a_folder_is_saved_where_it_is_told(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    unsaved = fit(dataclasses.replace(tiny_config, epochs=1), data=squares, device="cpu")
    with pytest.raises(InputError, match="no folder"):
        unsaved.report()
    unsaved.save(tmp_path / "new")
    assert load_run(tmp_path / "new", data=squares).metrics.accuracy == unsaved.metrics.accuracy


def test_data_of_other_classes_or_another_size_is_refused(
    run: Run, squares: ImageData, image_folder: Path
) -> None:
    assert run.folder is not None
    with pytest.raises(InputError, match=r"data must be a source or .*, got Split"):
        load_run(run.folder, data=squares.test)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cannot be used on animals: .*'red', .*got 2"):
        load_run(run.folder, data=image_folder)
    renamed = [
        Split(split.images, split.labels, ("red", "green", "violet"))
        for split in (squares.train, squares.test)
    ]
    with pytest.raises(InputError, match="missing 'blue', not among them 'violet'"):
        load_run(run.folder, data=ImageData.from_splits(*renamed))
    larger = [
        Split(split.images.repeat(2, 1).repeat(2, 2), split.labels, split.classes)
        for split in (squares.train, squares.test)
    ]
    with pytest.raises(InputError, match=r"16 x 16 pixels, .* 32 x 32; load .*image_size=16"):
        load_run(run.folder, data=ImageData.from_splits(*larger))


def test_a_run_of_48_pixels_is_evaluated_at_48_pixels(
    tiny_config: TrainConfig, image_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        tiny_config, data=str(image_folder), image_size=48, epochs=1, batch_size=4
    )
    fit(config, out=tmp_path / "run", device="cpu")
    for data in (None, image_folder):
        loaded = load_run(tmp_path / "run", data=data, device="cpu")
        assert loaded.data.test.images.shape == (2, 48, 48, 3)
    with pytest.raises(InputError, match="image_size must be 32 for 'scenes', got 48"):
        load_run(tmp_path / "run", data="scenes", device="cpu")
    with pytest.raises(InputError, match="48 x 48 pixels, but those of animals are 32 x 32"):
        load_run(tmp_path / "run", data=load_data(str(image_folder)), device="cpu")


def test_what_was_left_out_of_a_folder_is_told_by_the_run(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    remarks = ("there is no test/: val/ serves as the test split",)
    data = dataclasses.replace(squares, remarks=remarks)
    fit(dataclasses.replace(tiny_config, epochs=1), data=data, out=tmp_path, device="cpu")
    assert json.loads((tmp_path / "metrics.json").read_text())["data_remarks"] == list(remarks)
    assert remarks[0] in (tmp_path / "report.html").read_text()


def test_a_loaded_run_is_measured_in_its_own_precision(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, precision="bf16", epochs=1)
    run = fit(config, data=squares, out=tmp_path, device="cpu")
    loaded = load_run(tmp_path, data=squares, device="cpu")
    np.testing.assert_array_equal(loaded.metrics.probabilities, run.metrics.probabilities)
    images = squares.test.images
    np.testing.assert_allclose(run.predict_proba(images), run.metrics.probabilities, atol=1e-6)


def test_a_run_of_fp16_is_measured_without_a_gpu_in_fp32(
    run: Run, squares: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    assert run.folder is not None
    path = run.folder / "config.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(text), "precision": "fp16"}))
        with caplog.at_level(logging.WARNING):
            loaded = load_run(run.folder, data=squares, device="cpu")
    finally:
        path.write_text(text)
    assert "fp16" in caplog.text
    assert loaded.metrics.accuracy == run.metrics.accuracy


def test_a_run_saved_by_an_earlier_version_still_loads(
    run: Run, squares: ImageData, tmp_path: Path
) -> None:
    assert run.folder is not None
    for name in ("history.jsonl", "model.safetensors"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    config = json.loads((run.folder / "config.json").read_text())
    config["hold_out"] = config.pop("val_size")
    config["augment"]["policy"] = config["augment"].pop("auto_augment")
    config["model_options"] = {"patch": 4, "width": 16, "depth": 2, "heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["training_pictures"] = metrics.pop("training_images")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    loaded = load_run(tmp_path, data=squares)
    assert loaded.config == run.config
    assert loaded.metrics.accuracy == run.metrics.accuracy
    assert loaded.facts["training_pictures"] == 120
