"""Every kind of image source, and one clear line for each that cannot be used."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from labkit import images
from labkit.images import describe, list_images, load_image
from labkit.runtime import InputError, LabkitError, SourceError
from tests.loopback import Fault, LoopbackServer

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
GREY16 = np.array([[0, 128, 129, 257], [32896, 40000, 65406, 65535]], np.uint16)
GREY16_AS_8 = [[0, 0, 1, 1], [128, 156, 254, 255]]  # v / 257, rounded, by hand


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], 2).astype(np.uint8)


def blend_with_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = rgba[..., 3:] / 255.0
    return np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def refusal(kind: type[LabkitError], source: Any, **options: Any) -> str:
    """The message with which `source` is refused: one line that says which source it was."""
    with pytest.raises(kind) as caught:
        load_image(source, **options)
    text = str(caught.value)
    assert text.isprintable() and text.startswith("source ")
    return text


PNG = encode(Image.fromarray(RGB))


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "pillow", "array", "url"])
def test_every_kind_of_source_gives_the_same_pixels_as_a_writable_copy(
    kind: str, tmp_path: Path, loopback: LoopbackServer
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    array, pillow = RGB.copy(), Image.fromarray(RGB)
    source = {
        "path": path,
        "text": str(path),
        "bytes": PNG,
        "pillow": pillow,
        "array": array,
        "url": loopback.add("/image.png", PNG),
    }[kind]
    loaded = load_image(source, allow_private=True)
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, RGB)
    loaded[:] = 0
    np.testing.assert_array_equal(array, RGB)
    np.testing.assert_array_equal(pillow, RGB)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Path("a/b/cat.png"), "cat.png"),
        ("cat.png", "cat.png"),
        ("https://me:secret@host.org:81/a/cat.png?token=secret#x", "https://host.org:81/a/cat.png"),
        (b"", "bytes"),
        (RGB, "array"),
        (Image.fromarray(RGB), "image"),
        ("x" * 500, "x" * 117 + "..."),
    ],
)
def test_names_are_short_and_keep_secrets(source: Any, name: str) -> None:
    assert describe(source) == name


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(smooth(24, 40)), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(load_image(source), expected)


def test_damaged_exif_leaves_the_image_as_it_is_stored() -> None:
    data = encode(Image.fromarray(RGB), exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(load_image(data), RGB)


def make_lab(rgb: tuple[int, int, int]) -> Image.Image:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    image = ImageCms.applyTransform(Image.new("RGB", (3, 2), rgb), to_lab)
    assert image is not None
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("RGBX", (3, 2), (1, 2, 3, 4)), (1, 2, 3)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (3, 2), (76, 85, 255)), (254, 0, 0)),
        (Image.new("HSV", (3, 2), (0, 255, 200)), (200, 0, 0)),
        (make_lab((200, 100, 50)), (200, 100, 50)),
        (Image.new("LA", (3, 2), (0, 51)), (204, 204, 204)),
        (Image.new("La", (3, 2), (0, 51)), (204, 204, 204)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("RGBa", (3, 2), (51, 0, 0, 51)), (255, 204, 204)),
        (Image.new("F", (3, 2), 0.4), (102, 102, 102)),
        (Image.new("I", (3, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (3, 2), 257), (1, 1, 1)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image: Image.Image, colour: tuple[int, int, int]) -> None:
    expected = np.broadcast_to(np.array(colour), (2, 3, 3))
    np.testing.assert_allclose(load_image(image), expected, atol=2 if image.mode == "LAB" else 0)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_files_keep_their_colours(format: str) -> None:
    options: dict[str, Any] = {"quality": 100} if format == "JPEG" else {}
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format, **options)
    assert np.abs(load_image(data).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["index", "bytes"])
def test_palettes_with_transparency_are_laid_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert load_image(encode(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    data = encode(image, transparency=transparency)
    assert load_image(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (9, 9, 9))])
def test_a_transparent_colour_is_laid_on_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 100 if mode == "L" else (100, 100, 100))
    data = encode(image, transparency=key)
    assert load_image(data).tolist() == [[[255] * 3, [100] * 3]]


def test_a_transparent_colour_of_16_bits_is_laid_on_white() -> None:
    colours = [[65535, 0, 0], [1000, 2000, 3000], [255, 0, 0]]
    row = b"\0" + np.array(colours, ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    for index, white in ((0, [255, 255, 255]), (1, [255, 255, 255])):
        key = np.array(colours[index], ">u2").tobytes()
        body = chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        pixels = load_image(PNG[:8] + chunk(b"IHDR", header) + body)
        expected = [[255, 0, 0], [3, 7, 11], [0, 0, 0]]  # the upper 8 bits of each
        expected[index] = white
        assert pixels.tolist() == [expected]


def test_a_colour_profile_of_any_size_is_ignored() -> None:
    profile = chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(2**21)))
    assert np.array_equal(load_image(PNG[:33] + profile + PNG[33:]), RGB)


def make_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so often that there are `count`."""
    data = encode(Image.fromarray(smooth(64, 64)), "JPEG", progressive=True)
    *before, last = re.split(rb"(?=\xff\xda)", data[:-2])
    return b"".join(before) + last * (count + 1 - len(before)) + data[-2:]


def test_scans_of_a_jpeg_are_limited(tmp_path: Path) -> None:
    assert load_image(make_scans(100)).shape == (64, 64, 3)
    path = tmp_path / "scans.jpg"
    path.write_bytes(make_scans(101))
    for source in (make_scans(101), make_scans(5000), path):
        assert "JPEG of 101 scans or more" in refusal(InputError, source)
    with pytest.raises(InputError, match="scans or more"):
        images.open_image(path, "in a folder of images")


def test_what_looks_like_scans_behind_the_image_is_no_scan() -> None:
    film = make_scans(10) + b"\xff\xda\0\x02" * 500  # telephones append a film
    assert np.array_equal(load_image(film), load_image(make_scans(10)))


@pytest.mark.parametrize(
    ("format", "options"), [("WEBP", {"lossless": True}), ("JPEG", {"progressive": True})]
)
def test_formats_that_are_decoded_twice_have_half_of_the_pixels(
    format: str, options: dict[str, Any]
) -> None:
    data = encode(Image.fromarray(RGB), format, **options)
    assert load_image(data, max_pixels=2 * 35).shape == (5, 7, 3)
    assert "more than 34" in refusal(InputError, data, max_pixels=2 * 35 - 1)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_an_image_converted_in_bands_is_the_same_image(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encode(Image.fromarray(RGBA), exif=exif)
    whole = load_image(data)
    monkeypatch.setattr(images, "BAND_PIXELS", 14)  # two rows
    assert np.array_equal(load_image(data), whole)


MEASURED = """
import sys
from labkit.images import load_image
from labkit.runtime import measure_peak_memory
import torch
cpu = torch.device("cpu")
before = measure_peak_memory(cpu)
load_image(sys.argv[1])
print(measure_peak_memory(cpu) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_a_large_image_takes_twice_the_memory_of_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGBA", (4000, 4000), (1, 2, 3, 4)).save(path)
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    pixels = 16e6 / 2**30
    assert float(done.stdout) < (4 + 3) * pixels + 0.1  # it took 24 bytes a pixel


def test_alpha_is_laid_on_white_with_rounding() -> None:
    expected = blend_with_white(RGBA)
    for source in (RGBA, Image.fromarray(RGBA), encode(Image.fromarray(RGBA))):
        np.testing.assert_array_equal(load_image(source), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_files_keep_their_range(format: str) -> None:
    data = encode(Image.fromarray(GREY16), format)
    for source in (data, Image.open(io.BytesIO(data)).convert("I")):
        np.testing.assert_array_equal(load_image(source), np.stack([GREY16_AS_8] * 3, 2))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_byte_orders_of_16_bit_are_not_mixed_up(mode: str, dtype: str) -> None:
    image = Image.frombytes(mode, (4, 2), GREY16.astype(dtype).tobytes())
    np.testing.assert_array_equal(load_image(image)[..., 0], GREY16_AS_8)


def test_32_bit_numbers_outside_16_bits_are_refused_with_their_range() -> None:
    image = Image.fromarray(np.array([[-5, 70_000]], np.int32))
    assert "from -5 to 70000" in refusal(InputError, image)


def test_a_transparent_value_of_16_bits_is_laid_on_white() -> None:
    header = struct.pack(">IIBBBBB", 4, 1, 16, 0, 0, 0, 0)
    row = np.array([0, 257, 40000, 65535], ">u2").tobytes()
    data = PNG[:8] + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 40000))
    data += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    for source in (data, Image.open(io.BytesIO(data)).convert("I")):
        assert load_image(source)[0, :, 0].tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_the_first_frame_is_taken(format: str, options: dict[str, Any]) -> None:
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    data = encode(red, format, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(load_image(data), np.asarray(red))


def test_the_photographs_of_telephones_are_read() -> None:
    near, far = (Image.new("RGB", (16, 16), colour) for colour in ("white", "black"))
    data = encode(near, "MPO", save_all=True, append_images=[far])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert load_image(data).min() >= 254


@pytest.mark.parametrize(("format", "mode"), [("PPM", "L"), ("PPM", "RGB"), ("PPM", "1")])
def test_portable_pixmaps_are_read(format: str, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(encode(image, format)), expected)


# ---------------------------------------------------------------- HEIC and AVIF


def make_head(brand: bytes, *compatible: bytes) -> bytes:
    """The box with which HEIC and AVIF files begin."""
    body = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 4 + len(body)) + body


HEIC_HEADS = [make_head(b"heic", b"mif1"), make_head(b"mif1", b"heic"), make_head(b"heix")]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow decodes no AVIF")
def test_avif_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(smooth(24, 40)), "AVIF", exif=exif, quality=100)
    expected = np.rot90(smooth(24, 40), -1).astype(int)
    path = tmp_path / "photo.AVIF"
    path.write_bytes(data)
    for source in (data, path):
        assert np.abs(load_image(source) - expected).mean() < 5


def test_avif_that_cannot_be_decoded_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    for head in (make_head(b"avif", b"mif1"), make_head(b"mif1", b"avif"), make_head(b"avis")):
        assert "AVIF, which cannot be read here" in refusal(InputError, head + bytes(200))
        assert "update Pillow to 11.3" in refusal(InputError, head + bytes(200))


@pytest.mark.parametrize("head", HEIC_HEADS)
def test_heic_without_the_plug_in_is_named_with_the_remedy(
    head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    text = refusal(InputError, head + bytes(200))
    assert "HEIC, which cannot be read here" in text and "pip install pillow-heif" in text


@pytest.mark.parametrize("head", HEIC_HEADS)
def test_heic_is_read_by_the_plug_in(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the plug-in decodes a PNG behind the head of a HEIC file."""

    def open_stand_in(file: io.BytesIO, filename: str) -> Image.Image:
        return Image.open(io.BytesIO(file.read()[len(head) :]), formats=["PNG"])

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (open_stand_in, None))

    plug_in = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    np.testing.assert_array_equal(load_image(head + PNG), RGB)


def test_films_are_no_heic() -> None:
    assert "is no image in PNG" in refusal(InputError, make_head(b"isom", b"mp42") + bytes(99))


# ---------------------------------------------------------------- folders


def list_names(folder: Path, **options: bool) -> list[list[str]]:
    return [
        [path.relative_to(folder).as_posix() for path in paths]
        for paths in list_images(folder, **options)
    ]


def test_folders_are_listed_as_users_have_them(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "c.Jfif", "d.PPM", "._b.JPG", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "no-suffix").write_bytes(PNG)
    (tmp_path / "notes.txt").write_text("BM is how bitmaps begin")
    for name in ("cat.jpg", ".hidden", "__MACOSX"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.heic").touch()
    images = ["a.jpeg", "b.JPG", "c.Jfif", "cat.jpg/x.heic", "d.PPM", "no-suffix"]
    others = [".DS_Store", "._b.JPG", ".hidden", "Thumbs.db", "__MACOSX", "notes.txt"]
    assert list_names(tmp_path) == [images, others]
    images.remove("cat.jpg/x.heic")
    assert list_names(tmp_path, recursive=False) == [images, others]


@pytest.mark.parametrize("format", images.FORMATS[:-1])
def test_images_are_known_by_their_start_where_the_suffix_says_nothing(
    tmp_path: Path, format: str
) -> None:
    (tmp_path / "image").write_bytes(encode(Image.fromarray(RGB), format))
    (tmp_path / "photo").write_bytes(make_head(b"heic", b"mif1"))
    (tmp_path / "film").write_bytes(make_head(b"isom"))
    assert list_names(tmp_path) == [["image", "photo"], ["film"]]


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(PNG)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert list_names(tmp_path / "images") == [["b.png", "folder/a.png"], []]


def test_links_that_lead_nowhere_or_in_a_circle_are_errors(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="circle is a link that leads in a circle"):
        list_images(tmp_path)
    (tmp_path / "circle").unlink()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"gone\.png is a link that leads nowhere"):
        list_images(tmp_path)


def test_an_unreadable_folder_inside_is_an_error(
    tmp_path: Path, deny_folder: Callable[[str], None]
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    deny_folder("secret")
    with pytest.raises(SourceError, match="secret could not be read: Permission denied"):
        list_images(tmp_path)


def test_one_pixel_is_an_image() -> None:
    for source in (np.zeros((1, 1), np.uint8), encode(Image.new("1", (1, 1)))):
        assert load_image(source).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB[..., 0], np.stack([RGB[..., 0]] * 3, 2)),
        (RGB[..., :1], np.stack([RGB[..., 0]] * 3, 2)),
        (np.asfortranarray(RGB), RGB),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
        (np.asfortranarray(RGBA), blend_with_white(RGBA)),
        (RGBA.astype(np.uint16) * 257, blend_with_white(RGBA)),
        (RGBA / 255, blend_with_white(RGBA)),
        (GREY16, np.stack([GREY16_AS_8] * 3, 2)),
        (GREY16.astype(">u2"), np.stack([GREY16_AS_8] * 3, 2)),
        (GREY16.astype(np.int32), np.stack([GREY16_AS_8] * 3, 2)),
        (GREY16.astype(">u4"), np.stack([GREY16_AS_8] * 3, 2)),
        (np.zeros((1, 2), np.int32), np.zeros((1, 2, 3))),
        (np.array([[True, False]]), [[[255] * 3, [0] * 3]]),
        ((RGB / 255).astype(np.float32), RGB),
        (np.array([[0, 0.5, 1]], np.float16), [[[0] * 3, [128] * 3, [255] * 3]]),
    ],
)
def test_arrays_become_rgb(array: NDArray[Any], expected: Any) -> None:
    loaded = load_image(array)
    np.testing.assert_array_equal(loaded, expected)
    assert loaded.flags.c_contiguous and loaded.flags.writeable
    assert not np.shares_memory(loaded, array)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), "array.transpose(1, 2, 0)"),
        (np.zeros((8, 9, 2), np.uint8), "got shape (8, 9, 2)"),
        (np.zeros(8, np.uint8), "got shape (8,)"),
        (np.zeros((0, 9, 3), np.uint8), "9 x 0 pixels"),
        (np.zeros((8, 9), np.int64), "int64"),
        (np.full((8, 9), 255, np.int32), "array.astype('uint8') if 255 means white"),
        (np.full((8, 9), 65_536, np.uint32), "from 65536 to 65536"),
        (np.full((8, 9), -1, np.int32), "from -1 to -1"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.array([[0, np.inf]]), "NaN or infinity"),
        (np.array([[0.0, 254.5]]), "from 0 to 254.5"),
        (np.array([[-0.1, 1.0]]), "from -0.1 to 1"),
        (Image.new("F", (2, 2), 200.0), "from 200 to 200"),
        (Image.new("RGB", (0, 2)), "0 x 2 pixels"),
        (io.BytesIO(PNG), "got BytesIO"),
        (None, "got NoneType"),
    ],
)
def test_unusable_values_are_refused_with_the_remedy(source: Any, words: str) -> None:
    assert words in refusal(InputError, source)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + chunk(b"IHDR", header) + PNG[33:]


def png_with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", " " * size, zip=True)
    return encode(Image.fromarray(RGB), pnginfo=info)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"some notes", "is no image in PNG, JPEG"),
        (b"\n<!DOCTYPE html><title>x</title>", "HTML page"),
        (PNG[:20], "damaged"),
        (PNG[:-40], "damaged or cut short"),
        (PNG[:60] + b"\xff" + PNG[61:], "damaged or cut short"),
        (encode(Image.fromarray(smooth(64, 64)), "JPEG")[:-300], "damaged or cut short"),
        (encode(Image.fromarray(smooth(64, 64)), "WEBP")[:-100], "damaged"),
        (encode(Image.fromarray(smooth(64, 64)), "TIFF")[:500], "damaged"),
        (encode(Image.fromarray(smooth(64, 64)), "BMP")[:-500], "damaged or cut short"),
        (encode(Image.fromarray(RGB), "ICO"), "is no image in PNG"),
        (png_with_text(2**21), "damaged or cut short (Decompressed"),
        (png_with_header(12_000, 10_000), "12000 x 10000 pixels, more than 100,000,000"),
        (png_with_header(50_000, 50_000), "2500000000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_give_one_clear_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for source in (data, path):
        assert words in refusal(InputError, source)


@pytest.mark.parametrize("format", images.FORMATS)
def test_random_damage_never_shows_an_error_of_the_decoder(format: str) -> None:
    whole = encode(Image.fromarray(smooth(24, 40)), format)
    random = np.random.default_rng(1)
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        positions = random.integers(0, min(len(data), 300), 3)
        data[positions] = random.integers(0, 256, 3)
        with contextlib.suppress(InputError):
            load_image(data[: random.integers(1, len(data) + 1)].tobytes(), max_pixels=10**6)


def test_paths_that_are_no_files_give_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "does not exist" in refusal(InputError, tmp_path / "no.png")
    assert "does not exist" in refusal(InputError, tmp_path / "file" / "no.png")
    assert "does not exist" in refusal(InputError, "zero\0byte.png")
    assert "folder" in refusal(InputError, tmp_path)
    assert "http" in refusal(InputError, "file:///etc/hostname")
    refusal(SourceError, "x" * 5000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refusal(InputError, tmp_path / "pipe")


def test_an_unreadable_file_is_a_source_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    (path := tmp_path / "a.png").write_bytes(PNG)
    assert "Permission denied" in refusal(SourceError, path)


def test_limits_hold_at_their_exact_value(tmp_path: Path, loopback: LoopbackServer) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    url = loopback.add("/image.png", PNG)
    for source in (path, url, PNG):
        load_image(source, max_bytes=len(PNG), max_pixels=35, allow_private=True)
        assert "max_bytes" in refusal(
            InputError, source, max_bytes=len(PNG) - 1, allow_private=True
        )
    for source in (PNG, RGB, Image.fromarray(RGB)):
        load_image(source, max_pixels=35)
        assert "max_pixels" in refusal(InputError, source, max_pixels=34)


@pytest.mark.parametrize("limit", ["max_pixels", "max_bytes", "timeout"])
def test_a_limit_of_nothing_is_refused(limit: str) -> None:
    with pytest.raises(InputError, match=f"{limit} must be above 0, got 0"):
        load_image(PNG, **{limit: 0})  # type: ignore[arg-type]


def test_an_image_above_pillows_warning_is_read_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    np.testing.assert_array_equal(load_image(PNG), RGB)


@pytest.mark.data
def test_a_real_photograph_is_read_as_pillow_reads_it(real_data: Path) -> None:
    path = real_data / "images" / "zidane.jpg"
    loaded = load_image(path)
    assert loaded.shape == (720, 1280, 3)
    np.testing.assert_array_equal(loaded, np.asarray(Image.open(path)))


def test_this_machine_is_refused_unless_allowed(loopback: LoopbackServer) -> None:
    url = loopback.add("/a.png", PNG)
    assert "allow_private=True" in refusal(InputError, url)
    assert not loopback.requests
    load_image(url, allow_private=True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.STALL_HALFWAY, "no answer within 0.2 s"),
        (Fault.SHORT_BODY, "broke off"),
        (Fault.UNAVAILABLE, "answered 503"),
    ],
)
def test_failing_servers_give_one_clear_line(
    fault: Fault, words: str, loopback: LoopbackServer
) -> None:
    url = loopback.add("/a.png", PNG)
    loopback.fail("/a.png", fault)
    assert words in refusal(SourceError, url, timeout=0.2, allow_private=True)


@pytest.mark.parametrize(("body", "words"), [(b"", "is empty"), (PNG[:-40], "cut short")])
def test_what_a_server_sends_is_checked_as_a_file_is(
    body: bytes, words: str, loopback: LoopbackServer
) -> None:
    assert words in refusal(InputError, loopback.add("/a.png", body), allow_private=True)


@pytest.mark.parametrize(
    "url", ["http://me:secret@host.test/cat.png", "http://me:secret@host:99999/cat.png?secret"]
)
def test_refused_addresses_keep_their_secrets(url: str) -> None:
    assert "secret" not in refusal(InputError, url)
