from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.functional import resize

from labkit.runtime import InputError, OutOfMemoryError, SourceError
from labkit.segment import clipseg as clipseg_module
from labkit.segment.checkpoints import Checkpoint, Profile
from labkit.segment.clipseg import (
    ClipSeg,
    fill_template,
    fit_size,
    normalize_sentence,
    shorten_sentence,
    vary_sentence,
)
from tests.segment.conftest import CPU, IMAGE_SIZE, CallsOf, noise

SENTENCES = ["red circle", "a cat", "x", "blue ring on top"]


def one_forward_each(
    clipseg: ClipSeg, image: NDArray[np.uint8], sentences: list[str]
) -> torch.Tensor:
    """Maps (S, side, side) of transformers' own forward pass, one for each sentence."""
    from PIL import Image

    maps = []
    for sentence in sentences:
        inputs = clipseg.processor(
            text=[sentence], images=[Image.fromarray(image)], return_tensors="pt"
        )
        with torch.no_grad():
            maps.append(clipseg.model(**inputs).logits.sigmoid())
    return torch.cat(maps)


def test_encoding_once_equals_one_forward_for_each_sentence(clipseg: ClipSeg) -> None:
    image = noise(IMAGE_SIZE, IMAGE_SIZE)
    maps = clipseg.predict_heat(image, SENTENCES)
    expected = one_forward_each(clipseg, image, SENTENCES).numpy()
    assert maps.dtype == np.float32 and maps.shape == (4, IMAGE_SIZE, IMAGE_SIZE)
    assert np.abs(maps - expected).max() <= 1e-4
    apart = np.abs(expected[:, None] - expected[None]).max(axis=(2, 3))
    assert apart[~np.eye(4, dtype=bool)].min() > 0.05  # else the comparison proves nothing


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (200, 150)])
def test_encoding_once_equals_one_forward_in_other_proportions(
    clipseg: ClipSeg, shape: tuple[int, int]
) -> None:
    image = noise(*shape)
    maps = clipseg.predict_heat(image, SENTENCES)
    square = one_forward_each(clipseg, image, SENTENCES)
    expected = resize(square, list(maps.shape[1:]), antialias=True).numpy()
    assert np.abs(maps - expected).max() <= 1e-4


def test_one_forward_of_all_sentences_gives_the_same(clipseg: ClipSeg) -> None:
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    inputs = clipseg.processor(text=SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = clipseg.model(pixel_values=pixels.repeat(4, 1, 1, 1), **inputs).logits
        towers = clipseg.model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
        layers = tuple(towers[index + 1] for index in clipseg.model.extract_layers)
        maps = clipseg._decode(layers, clipseg._embed(SENTENCES, ["{}"]), (IMAGE_SIZE, IMAGE_SIZE))
    assert np.abs(maps - together.sigmoid().numpy()).max() <= 1e-4


def test_image_is_encoded_once_for_many_sentences(
    clipseg: ClipSeg, calls_of: CallsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipseg_module, "_SENTENCES_AT_ONCE", 3)
    vision, text, decoder = (
        calls_of(module)
        for module in (
            clipseg.model.clip.vision_model,
            clipseg.model.clip.text_model,
            clipseg.model.decoder,
        )
    )
    clipseg.predict_heat(noise(20, 30), [f"object {letter}" for letter in "abcdefghij"])
    assert (len(vision), len(text), len(decoder)) == (1, 1, 4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (48, 64)),
        ((640, 480), (64, 48)),
        ((64, 64), (64, 64)),
        ((1, 1), (64, 64)),
        ((1, 1000), (1, 64)),
        ((1000, 1), (64, 1)),
    ],
)
def test_maps_keep_the_proportions_of_the_image(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_size(size, 64) == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 40), (40, 3), (5, 300)])
def test_strange_shapes_of_images_work_in_silence(
    clipseg: ClipSeg, shape: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    maps = clipseg.predict_heat(noise(*shape), ["red circle"])
    assert maps.shape == (1, *fit_size(shape, IMAGE_SIZE))
    assert (maps >= 0).all() and (maps <= 1).all()
    assert capfd.readouterr() == ("", "")


def test_embeddings_are_averaged_over_templates(clipseg: ClipSeg) -> None:
    image, templates = noise(IMAGE_SIZE, IMAGE_SIZE), ["{}", "a {}", "the {} there"]
    maps = clipseg.predict_heat(image, ["cat", "dog"], templates)
    for index, sentence in enumerate(["cat", "dog"]):
        texts = [template.format(sentence) for template in templates]
        inputs = clipseg.processor(text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            mean = clipseg.model.get_conditional_embeddings(3, **inputs).mean(0, keepdim=True)
            pixels = clipseg.processor(images=image, return_tensors="pt")["pixel_values"]
            logits = clipseg.model(pixel_values=pixels, conditional_embeddings=mean).logits
        assert np.abs(maps[index] - logits[0].sigmoid().numpy()).max() <= 1e-4


def test_braces_in_a_sentence_are_text(clipseg: ClipSeg) -> None:
    maps = clipseg.predict_heat(noise(9, 9), ["{} {x}", "x"], ["a {}"])
    assert len(maps) == 2


def test_order_and_company_of_sentences_change_nothing(
    clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(40, 50)
    maps = clipseg.predict_heat(image, SENTENCES)
    monkeypatch.setattr(clipseg_module, "_SENTENCES_AT_ONCE", 2)
    assert np.abs(clipseg.predict_heat(image, SENTENCES) - maps).max() <= 1e-5
    assert np.abs(clipseg.predict_heat(image, SENTENCES[::-1])[::-1] - maps).max() <= 1e-5
    assert np.abs(clipseg.predict_heat(image, SENTENCES[1:2]) - maps[1]).max() <= 1e-5


def test_sentences_that_do_not_fit_into_memory_are_decode_in_smaller_parts(
    clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, whole = noise(20, 20), clipseg._decode
    maps = clipseg.predict_heat(image, SENTENCES)

    def cramped(layers: Any, conditions: torch.Tensor, size: Any) -> NDArray[np.float32]:
        if len(conditions) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(layers, conditions, size)

    monkeypatch.setattr(clipseg, "_decode", cramped)
    room = 1
    assert np.abs(clipseg.predict_heat(image, SENTENCES) - maps).max() <= 1e-5
    room = 0
    with pytest.raises(OutOfMemoryError, match="sentences"):
        clipseg.predict_heat(image, SENTENCES)


def test_unusable_sentences_are_refused(clipseg: ClipSeg) -> None:
    image = noise(9, 9)
    with pytest.raises(InputError, match="got none"):
        clipseg.predict_heat(image, [])
    with pytest.raises(InputError, match="24 tokens, got 'cat cat"):
        clipseg.predict_heat(image, ["dog", "cat " * 20])
    with pytest.raises(InputError, match="24 tokens"):
        clipseg.predict_heat(image, ["abcdefghijklmnopqr"], ["a photo of a {}"])
    assert clipseg.predict_heat(image, ["abcdefghijklmnopqr"]).shape == (1, IMAGE_SIZE, IMAGE_SIZE)


def test_the_article_of_a_sentence_is_not_doubled_in_the_map(clipseg: ClipSeg) -> None:
    image = noise(IMAGE_SIZE, IMAGE_SIZE)
    filled = clipseg.predict_heat(image, ["the cat"], ["a {}"])
    np.testing.assert_array_equal(filled, clipseg.predict_heat(image, ["the cat"], ["{}"]))


@pytest.mark.parametrize("templates", [[], "a {}", ["a dog"], ["{} and {}"], ["{0}"], ["a {"]])
def test_a_template_has_one_place_for_the_sentence(clipseg: ClipSeg, templates: Any) -> None:
    with pytest.raises(InputError, match=r"templates? must"):
        clipseg.predict_heat(noise(9, 9), ["dog"], templates)


@pytest.mark.parametrize("templates", [["{}"], ["{}", "a {}"]])
def test_a_sentence_is_too_long_by_its_tokens_not_its_letters(
    clipseg: ClipSeg, templates: list[str]
) -> None:
    """A letter of the tiny tokenizer is a token, one of Chinese is three, a space none."""
    many_letters, many_tokens = "a" + " " * 50 + "b", "猫" * 9
    with pytest.raises(InputError, match=r"24 tokens, got '猫猫.* of (29|30)"):
        clipseg.predict_heat(noise(9, 9), ["dog", many_letters, many_tokens, "cat"], templates)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("red ball", "red ball"),
        (" Red\tBALL. ", "red ball"),
        ("red ball?!...", "red ball"),
        ("CAFE\u0301", "café"),
        ("\uff52\uff45\uff44", "red"),
        ("r\u200be\u00add", "red"),
        ("St. Bernard", "st. bernard"),
        ("dog (left)", "dog (left)"),
        ("猫。", "猫"),
        (" . ", ""),
        ("", ""),
    ],
)
def test_spellings_of_a_sentence_have_one_normal_form(sentence: str, expected: str) -> None:
    assert normalize_sentence(sentence) == expected
    assert normalize_sentence(expected) == expected


def test_weights_are_fp32_and_for_inference(clipseg: ClipSeg) -> None:
    assert {parameter.dtype for parameter in clipseg.model.parameters()} == {torch.float32}
    assert not clipseg.model.training
    assert clipseg.image_size == IMAGE_SIZE and clipseg.precision.name == "fp32"


@pytest.mark.parametrize("bars", [True, False])
def test_loading_and_inference_leave_global_state_as_found(
    tiny_profile: Profile, bars: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def state() -> list[Any]:
        return [
            logging.is_progress_bar_enabled(),
            logging.get_verbosity(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
        ]

    enabled = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        before = state()
        clipseg = ClipSeg.from_checkpoint(tiny_profile.clipseg, CPU)
        clipseg.predict_heat(noise(9, 9), ["cat"])
        assert state() == before
    finally:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    assert capfd.readouterr() == ("", "")


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(config))

    return edit


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut, "damaged"),
    "no weights in it": (lambda f: (f / "model.safetensors").write_bytes(b"?" * 99), "damaged"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "there is no"),
    "configuration gone": (lambda f: (f / "config.json").unlink(), "weights are missing"),
    "configuration cut": (lambda f: (f / "config.json").write_text("{"), "as a CLIPSeg"),
    "another model": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "weights are missing",
    ),
    "another width": (edit_config(reduce_dim=32), "another shape"),
    "one layer more": (edit_config(vision_config={"num_hidden_layers": 5}), "missing"),
    "tokenizer gone": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "tokenizer has 2 tokens",
    ),
    "processor gone": (lambda f: (f / "processor_config.json").unlink(), "as a CLIPSeg"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_of_no_whole_clipseg_are_refused_in_one_line(
    tiny_profile: Profile, tmp_path: Path, name: str
) -> None:
    damage, message = DAMAGE[name]
    folder = tmp_path / "copy"
    shutil.copytree(tiny_profile.clipseg.source, folder)
    damage(folder)
    with pytest.raises(SourceError, match=message) as info:
        ClipSeg.from_checkpoint(Checkpoint(source=str(folder)), CPU)
    assert "\n" not in str(info.value) and str(folder) in str(info.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere") as info:
        ClipSeg.from_checkpoint(Checkpoint(source=str(tmp_path / "nowhere")), CPU)
    assert "\n" not in str(info.value)


def test_weights_with_another_digest_are_refused(tiny_profile: Profile) -> None:
    checkpoint = Checkpoint(source=tiny_profile.clipseg.source, digest="sha256:" + "0" * 64)
    with pytest.raises(SourceError, match="wrong checksum"):
        ClipSeg.from_checkpoint(checkpoint, CPU)


NUMBERS = [
    ("dog", "dogs"),
    ("box", "boxes"),
    ("bus", "buses"),
    ("glass", "glasses"),
    ("dish", "dishes"),
    ("watch", "watches"),
    ("beach", "beaches"),
    ("house", "houses"),
    ("horse", "horses"),
    ("nurse", "nurses"),
    ("lens", "lenses"),
    ("puppy", "puppies"),
    ("city", "cities"),
    ("monkey", "monkeys"),
    ("cookie", "cookies"),
    ("tie", "ties"),
    ("movie", "movies"),
    ("potato", "potatoes"),
    ("tomato", "tomatoes"),
    ("photo", "photos"),
    ("piano", "pianos"),
    ("zoo", "zoos"),
    ("shoe", "shoes"),
    ("canoe", "canoes"),
    ("toe", "toes"),
    ("knife", "knives"),
    ("wife", "wives"),
    ("leaf", "leaves"),
    ("shelf", "shelves"),
    ("bookshelf", "bookshelves"),
    ("wolf", "wolves"),
    ("scarf", "scarves"),
    ("roof", "roofs"),
    ("cliff", "cliffs"),
    ("glove", "gloves"),
    ("giraffe", "giraffes"),
    ("olive", "olives"),
    ("sleeve", "sleeves"),
    ("stomach", "stomachs"),
    ("headache", "headaches"),
    ("quiz", "quizzes"),
    ("prize", "prizes"),
    ("vase", "vases"),
    ("rose", "roses"),
    ("fuse", "fuses"),
    ("virus", "viruses"),
    ("menu", "menus"),
    ("sofa", "sofas"),
    ("pizza", "pizzas"),
    ("gas", "gases"),
    ("kiwi", "kiwis"),
    ("person", "people"),
    ("man", "men"),
    ("woman", "women"),
    ("fireman", "firemen"),
    ("human", "humans"),
    ("child", "children"),
    ("mouse", "mice"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("goose", "geese"),
    ("mongoose", "mongooses"),
    ("ox", "oxen"),
    ("cactus", "cacti"),
    ("grandchild", "grandchildren"),
    ("t-shirt", "t-shirts"),
    ("café", "cafés"),
    ("tv", "tvs"),
]


@pytest.mark.parametrize(("singular", "plural"), NUMBERS)
def test_a_noun_varies_between_singular_and_plural(singular: str, plural: str) -> None:
    assert vary_sentence(singular) == [plural]
    assert vary_sentence(plural) == [singular]


UNCHANGED = ["sheep", "deer", "fish", "goldfish", "aircraft", "series", "scissors", "trousers"]


@pytest.mark.parametrize("sentence", [*UNCHANGED, "", "?!", "a", "x", "two", "猫", "r2d2", "🦖"])
def test_what_has_one_form_does_not_vary(sentence: str) -> None:
    assert vary_sentence(sentence) == []


@pytest.mark.parametrize(
    ("sentence", "form"),
    [
        ("dogs on a sofa", "dog on a sofa"),
        (" Red  Balls. ", "red ball"),
        ("the man with two hats", "the men with two hats"),
        ("a dog", "dogs"),
        ("3 dogs", "dog"),
        ("two children in a garden", "child in a garden"),
        ("person wearing a hat", "people wearing a hat"),
        ("men sitting on a bench", "man sitting on a bench"),
        ("dog running", "dogs running"),
        ("brown running shoe", "brown running shoes"),
        ("a walking stick", "walking sticks"),
        ("cup of coffee", "cups of coffee"),
        ("man's hat", "man's hats"),
    ],
)
def test_a_phrase_varies_in_its_head_noun(sentence: str, form: str) -> None:
    assert vary_sentence(sentence) == [form]


@pytest.mark.parametrize(
    ("sentence", "forms"),
    [
        ("red ball", ["ball"]),
        ("Football player.", ["player"]),
        ("three small dogs", ["small dogs", "dogs"]),
        ("dog on a sofa", ["dog"]),
        ("a man", ["man"]),
        ("old small wooden house", ["small wooden house", "wooden house", "house"]),
        ("dog", []),
        ("", []),
        ("three", []),
    ],
)
def test_shorter_forms_keep_the_head_noun(sentence: str, forms: list[str]) -> None:
    assert shorten_sentence(sentence) == forms


def test_embeddings_are_computed_once_for_a_list_of_sentences(
    clipseg: ClipSeg, calls_of: CallsOf
) -> None:
    tower = calls_of(clipseg.model.clip.text_model)
    image = noise(20, 30)
    first = clipseg.predict_heat(image, ["once", "twice"])
    assert np.array_equal(clipseg.predict_heat(image, ["once", "twice"]), first)
    assert len(tower) == 1
    for number in range(70):
        clipseg.predict_heat(image, [f"x{number}"])
    assert len(clipseg._embeddings) == 64
    assert np.array_equal(clipseg.predict_heat(image, ["once", "twice"]), first)


def test_layers_that_nothing_reads_are_not_computed(tiny_profile: Profile) -> None:
    """The tiny model reads all its layers, so two are added behind them."""
    whole = ClipSeg.from_checkpoint(tiny_profile.clipseg, CPU)
    model = copy.deepcopy(whole.model)
    layers = model.clip.vision_model.encoder.layers
    layers.extend([copy.deepcopy(layers[0]), copy.deepcopy(layers[0])])
    assert len(layers) == 6
    longer = ClipSeg(model, whole.processor, CPU, whole.precision)
    assert len(model.clip.vision_model.encoder.layers) == 4
    image = noise(20, 30)
    assert np.array_equal(longer.predict_heat(image, ["a"]), whole.predict_heat(image, ["a"]))


def test_images_that_are_encoded_together_have_the_maps_of_each_alone(clipseg: ClipSeg) -> None:
    images = [noise(20, 30), noise(50, 10, seed=1), noise(7, 7, seed=2)]
    for image, encoded in zip(images, clipseg.encode_batch(images), strict=True):
        alone = clipseg.predict_heat(image, ["a", "b"])
        assert np.abs(clipseg.predict_heat(encoded, ["a", "b"]) - alone).max() <= 1e-5
    assert clipseg.encode_batch([]) == []


def test_an_encoded_image_gives_the_same_maps(clipseg: ClipSeg) -> None:
    image = noise(20, 31)
    encoded = clipseg.encode(image)
    assert np.array_equal(
        clipseg.predict_heat(encoded, SENTENCES), clipseg.predict_heat(image, SENTENCES)
    )


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("man", "a photo of a man"),
        ("the man", "a photo of the man"),
        ("an old man", "a photo of an old man"),
        ("their dogs", "a photo of their dogs"),
        ("theatre", "a photo of a theatre"),
        ("a {} in braces", "a photo of a {} in braces"),
    ],
)
def test_a_sentence_with_an_article_gets_no_second_one(sentence: str, text: str) -> None:
    assert fill_template("a photo of a {}", sentence) == text
    assert fill_template("{}", sentence) == sentence
