"""The scripts in training/, on a few photographs of stripes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from labkit.files import compute_checksum
from labkit.segment.checkpoints import find_clipseg, find_sam2
from labkit.segment.clipseg import ClipSeg
from labkit.segment.sam2 import Sam2

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "training"))

import calibrate_presence  # noqa: E402
import loop  # noqa: E402
import photo_clipseg  # noqa: E402
import photographs  # noqa: E402
import tiny_clipseg  # noqa: E402
import train_sam2  # noqa: E402
import vocabulary  # noqa: E402

CAR, PEDESTRIAN, BICYCLIST, UNLABELLED = 8, 9, 10, 11


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs in train and in val: a road, a car and one small pedestrian."""
    folder = tmp_path_factory.mktemp("street")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir()
        for number in range(3):
            labels = np.full((200, 260), 3, dtype=np.uint8)
            labels[:60] = 0
            labels[80:140, 20:90] = CAR
            if number == 0:
                labels[70:90, 230:238] = PEDESTRIAN
            labels[195:] = UNLABELLED
            noise = rng.integers(0, 8, (200, 260, 3))
            image = np.uint8(labels[..., None] * 20 + noise)
            Image.fromarray(image).save(folder / split / f"{number}.jpg", quality=95)
            Image.fromarray(labels).save(folder / split / f"{number}_labels.png")
    return folder


@pytest.fixture(scope="module")
def street(data: Path) -> photographs.Photographs:
    return photographs.read_photographs(data / "train")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Training sets the number of threads and the seed of the process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_the_tokenizer_for_scenes_is_the_one_among_the_assets() -> None:
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(ROOT / "labkit" / "assets" / "clipseg-tiny")
    made = vocabulary.create_tokenizer()
    assert made.get_vocab() == shipped.get_vocab()
    sentence = "a photo of a striped red circle beside a horse"
    assert made(sentence)["input_ids"] == shipped(sentence)["input_ids"]


def test_classes_have_synonyms_and_plurals_and_a_person_is_of_two_classes() -> None:
    classes = ("sky", "car", "pedestrian", "bicyclist", "teapot")
    named = vocabulary.name_classes(classes)
    assert named["car"] == named["vehicles"] == (1,)
    assert named["person"] == named["people"] == (2, 3)
    assert named["cyclist"] == (3,)
    assert named["teapots"] == (4,)
    tokenizer = vocabulary.create_tokenizer(named)
    assert tokenizer.tokenize("a photo of a cyclist") == [
        f"{word}</w>" for word in ("a", "photo", "of", "a", "cyclist")
    ]


def test_no_foreign_noun_names_something_in_a_street() -> None:
    classes = ("car", "pedestrian", "bicyclist", "tree", "sign", "road", "building")
    foreign = photo_clipseg.make_foreign_sentences(np.random.default_rng(0))
    assert len(set(foreign)) == photo_clipseg.NUM_FOREIGN
    assert not set(vocabulary.OTHER_NOUNS) - set(vocabulary.STREET_NOUNS) & {
        *vocabulary.name_classes(classes)
    }


def test_photographs_keep_the_labels_and_what_has_none_is_unlabelled(
    street: photographs.Photographs, data: Path
) -> None:
    assert street.names[CAR : BICYCLIST + 1] == ("car", "pedestrian", "bicyclist")
    expected = np.array(Image.open(data / "train" / "0_labels.png"))
    expected[expected == UNLABELLED] = photographs.UNLABELLED
    assert np.array_equal(street.labels[0], expected)
    assert street.shares[0, CAR] == pytest.approx(60 * 70 / (200 * 260))
    assert street.shares[0, PEDESTRIAN] == pytest.approx(160 / (200 * 260))
    assert street.shares[1, PEDESTRIAN] == 0


def test_crops_lie_in_the_photograph_and_often_hold_what_is_rare(
    street: photographs.Photographs,
) -> None:
    crops = [photographs.sample_crop(street, np.random.default_rng(n)) for n in range(300)]
    for crop in crops:
        assert 0 <= crop.rows[0] < crop.rows[1] <= 200
        assert 0 <= crop.columns[0] < crop.columns[1] <= 260
        assert crop.rows[1] - crop.rows[0] >= photographs.MIN_CROP
    shows = [(crop.cut(street.labels[crop.index]) == PEDESTRIAN).any() for crop in crops]
    assert np.mean(shows) > 0.4  # a third of the photographs has one, in a corner
    assert 0.4 < np.mean([crop.is_mirrored for crop in crops]) < 0.6


def test_image_and_labels_of_a_crop_belong_together(street: photographs.Photographs) -> None:
    crop = photographs.Crop(0, (40, 180), (10, 200), True)
    cover = photographs.cut_cover(street, crop, 96)
    image = photographs.cut_image(street, crop, 96, None)
    assert cover.shape == (11, 96, 96) and image.shape == (3, 96, 96)
    assert torch.allclose(cover.sum(0), torch.ones(96, 96), atol=1e-5)
    light = (image * photographs.STD + photographs.MEAN).mean(0) * 255
    painted = torch.einsum("c,chw->hw", 20.0 * torch.arange(11), cover) + 3.5
    assert (light - painted).abs().median() < 3
    share = (street.labels[0][40:180, 10:200] == CAR).mean()
    assert cover[CAR].mean().item() == pytest.approx(share, abs=0.01)


def test_half_of_the_sentences_are_true_and_the_others_have_empty_targets(
    street: photographs.Photographs,
) -> None:
    batches = photo_clipseg.Batches(street, 4, 6, augment=True)
    named = vocabulary.name_classes(street.names)
    for step in range(5):
        batch = batches(step)
        again = batches(step)
        assert torch.equal(batch.images, again.images) and batch.sentences == again.sentences
        foreign = len(batch.sentences) - photo_clipseg.NUM_FOREIGN
        assert foreign == len(named)
        for cover, indices, targets in zip(
            batch.cover, batch.indices.tolist(), batch.targets, strict=True
        ):
            assert len(set(indices)) == 6
            for index, target in zip(indices, targets, strict=True):
                classes = list(named.values())[index] if index < foreign else ()
                assert torch.equal(target, cover[list(classes)].sum(0))
        assert (batch.targets.flatten(2).sum(-1) > 0).sum(1).tolist() == [3, 3, 3, 3]
        for label, row in enumerate(batch.names.tolist()):
            assert list(named.values())[row] == (label,)


def test_unlabelled_pixels_do_not_count_and_small_things_do() -> None:
    target = torch.zeros(1, 2, 40, 40)
    target[0, 0, :4, :4] = 1
    labelled = torch.ones(1, 1, 40, 40)
    labelled[..., 20:, :] = 0
    perfect = 40 * target - 20
    wrong_where_unknown = torch.where(labelled > 0, perfect, -perfect)
    loss = photo_clipseg.compute_sentence_loss
    assert loss(perfect, target, labelled).item() == pytest.approx(0, abs=1e-4)
    assert loss(wrong_where_unknown, target, labelled).item() == pytest.approx(0, abs=1e-4)
    missed = loss(torch.full_like(target, -20.0), target, labelled)  # one pixel in a hundred
    assert missed.item() > 1


def test_regions_are_connected_and_those_too_small_are_none() -> None:
    labels = np.full((100, 100), photographs.UNLABELLED, dtype=np.uint8)
    labels[:10, :10] = labels[50:60, :10] = 1
    labels[:10, 10:20] = 0
    labels[90, 90:95] = 1
    regions = photographs.split_regions(labels, 2)
    numbers = {regions[0, 0], regions[50, 0], regions[0, 10]}
    assert numbers == {1, 2, 3}
    assert regions[90, 90] == regions[70, 70] == 0
    assert (regions == regions[50, 0]).sum() == 100


def test_regions_of_a_batch_are_parts_of_one_class(street: photographs.Photographs) -> None:
    batches = photographs.RegionBatches(street, 3, 4, image_size=128, augment=False)
    images, masks, others = batches(0)
    assert images.shape == (3, 3, 128, 128) and masks.shape == others.shape == (12, 128, 128)
    assert masks.any(dim=(1, 2)).all()
    assert not (masks & others).any()
    light = (images * photographs.STD + photographs.MEAN).mean(1).repeat_interleave(4, 0)
    for values, mask in zip(light, masks, strict=True):
        most = values[mask].median()  # a class has one colour, but for its edges and noise
        assert ((values[mask] - most).abs() < 0.03).float().mean() > 0.6


def test_clipseg_begins_with_the_weights_for_scenes() -> None:
    tokenizer = vocabulary.create_tokenizer(["car"])
    same_size = tiny_clipseg.CLIPSegNetwork(tokenizer, 112)
    same_size.read(tiny_clipseg.ASSETS)
    shipped = load_file(tiny_clipseg.ASSETS / "model.safetensors")
    for name, weights in same_size.clipseg.state_dict().items():
        if name != tiny_clipseg.TOKENS:
            assert torch.equal(weights, shipped[name].float()), name
    larger = tiny_clipseg.CLIPSegNetwork(tokenizer, 176)
    larger.read(tiny_clipseg.ASSETS)
    positions = larger.clipseg.state_dict()[tiny_clipseg.POSITIONS]
    corner = shipped[tiny_clipseg.POSITIONS][[1, 14, -14, -1]].float()
    assert torch.allclose(positions[[1, 22, -22, -1]], corner, atol=0.25)


def test_calibration_asks_about_frames_crops_and_nouns_that_no_street_shows(data: Path) -> None:
    questions = list(calibrate_presence.ask_about_photographs(data / "val", 1))
    assert [image.shape[:2] for image, _, _ in questions] == [(200, 260), *[(100, 100)] * 6]
    for image, sentences, truth in questions:
        answers = dict(zip(sentences, truth, strict=True))
        assert len(answers) == len(sentences) == len(truth)
        assert sum(answers.values()) == sum(truth) and not any(truth[-3:])
        grey = image.mean(axis=2)
        assert answers["sky"] == bool((grey < 20).any())
        assert not answers["tree"]


def make_arguments(data: Path, out: Path, **extra: int) -> argparse.Namespace:
    out.mkdir(parents=True)
    return argparse.Namespace(data=data, out=out, steps=4, images=1, lr=2e-3, **extra)


def check_resuming(
    train: Callable[[], None], again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run `train`; then run `again` twice, of which the first time is cut after two steps."""
    torch.manual_seed(0)
    train()
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_SECONDS", -1)
        save = loop.TrainingLoop.save

        def save_and_stop(self: loop.TrainingLoop) -> None:
            save(self)
            if self.step == 2:
                raise KeyboardInterrupt

        patch.setattr(loop.TrainingLoop, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            again()
    torch.manual_seed(123)
    again()


def test_clipseg_resumes_exactly_and_its_weights_are_loaded_by_labkit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_clipseg, "VAL_STEPS", 1)
    monkeypatch.setattr(photo_clipseg, "IMAGE_SIZE", 64)
    whole = make_arguments(data, tmp_path / "whole", sentences=2)
    cut = make_arguments(data, tmp_path / "cut", sentences=2)
    check_resuming(
        lambda: photo_clipseg.train_on_photographs(whole),
        lambda: photo_clipseg.train_on_photographs(cut),
        monkeypatch,
    )
    weights = [out.out / "model.safetensors" for out in (whole, cut)]
    assert compute_checksum(weights[0]) == compute_checksum(weights[1])
    assert load_file(weights[0])["clip.logit_scale"].dtype == torch.half
    clipseg = ClipSeg.from_checkpoint(find_clipseg(str(cut.out)), torch.device("cpu"))
    heat = clipseg.predict_heat(np.zeros((40, 80, 3), np.uint8), ["car", "unheard of"])
    assert heat.shape == (2, 32, 64)


def test_sam2_resumes_exactly_and_its_weights_are_loaded_by_labkit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_sam2, "PHOTO_SIZE", 128)
    whole = make_arguments(data, tmp_path / "whole", prompts=2)
    cut = make_arguments(data, tmp_path / "cut", prompts=2)
    check_resuming(lambda: train_sam2.train(whole), lambda: train_sam2.train(cut), monkeypatch)
    weights = [out.out / "sam2.safetensors" for out in (whole, cut)]
    assert compute_checksum(weights[0]) == compute_checksum(weights[1])
    sam2 = Sam2.from_checkpoint(find_sam2(str(cut.out)), torch.device("cpu"))
    assert sam2.image_size == 128
    features = sam2.encode(np.zeros((40, 80, 3), np.uint8))
    logits, ious = sam2.predict_points(features, np.array([[20.0, 20.0]]))
    assert logits.shape == (1, 4, 32, 32) and ious.shape == (1, 4)


def test_weights_from_photographs_never_go_to_the_assets_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_sam2.py", "--data", "photos"])
    with pytest.raises(SystemExit):
        train_sam2.main()
    assert "--data needs --out" in capsys.readouterr().err
