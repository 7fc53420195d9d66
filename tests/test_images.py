"""Every kind of image source, and one clear line for each that cannot be used."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from labkit import images
from labkit.images import describe, load_image
from labkit.runtime import InputError, LabkitError, SourceError
from tests.loopback import Fault, LoopbackServer

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
GREY16 = np.array([[0, 128, 129, 257], [32896, 40000, 65406, 65535]], np.uint16)
GREY16_AS_8 = [[0, 0, 1, 1], [128, 156, 254, 255]]  # v / 257, rounded, by hand


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], 2).astype(np.uint8)


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = rgba[..., 3:] / 255.0
    return np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def refusal(kind: type[LabkitError], source: Any, **options: Any) -> str:
    """The message with which `source` is refused: one line that says which source it was."""
    with pytest.raises(kind) as caught:
        load_image(source, **options)
    text = str(caught.value)
    assert text.isprintable() and text.startswith("source ")
    return text


PNG = encoded(Image.fromarray(RGB))


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "picture", "array", "url"])
def test_every_kind_of_source_gives_the_same_pixels_as_a_writable_copy(
    kind: str, tmp_path: Path, loopback: LoopbackServer
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    array, picture = RGB.copy(), Image.fromarray(RGB)
    source = {
        "path": path,
        "text": str(path),
        "bytes": PNG,
        "picture": picture,
        "array": array,
        "url": loopback.add("/picture.png", PNG),
    }[kind]
    loaded = load_image(source, allow_private=True)
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, RGB)
    loaded[:] = 0
    np.testing.assert_array_equal(array, RGB)
    np.testing.assert_array_equal(picture, RGB)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Path("a/b/cat.png"), "cat.png"),
        ("cat.png", "cat.png"),
        ("https://me:secret@host.org:81/a/cat.png?token=secret#x", "https://host.org:81/a/cat.png"),
        (b"", "bytes"),
        (RGB, "array"),
        (Image.fromarray(RGB), "picture"),
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
    data = encoded(Image.fromarray(smooth(24, 40)), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(load_image(source), expected)


def test_damaged_exif_leaves_the_picture_as_it_is_stored() -> None:
    data = encoded(Image.fromarray(RGB), exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(load_image(data), RGB)


def lab_of(rgb: tuple[int, int, int]) -> Image.Image:
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
        (lab_of((200, 100, 50)), (200, 100, 50)),
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
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format, **options)
    assert np.abs(load_image(data).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["index", "bytes"])
def test_palette_transparency_is_laid_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert load_image(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    data = encoded(image, transparency=transparency)
    assert load_image(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (9, 9, 9))])
def test_a_transparent_colour_is_laid_on_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 100 if mode == "L" else (100, 100, 100))
    data = encoded(image, transparency=key)
    assert load_image(data).tolist() == [[[255] * 3, [100] * 3]]


def test_alpha_is_laid_on_white_with_rounding() -> None:
    expected = on_white(RGBA)
    for source in (RGBA, Image.fromarray(RGBA), encoded(Image.fromarray(RGBA))):
        np.testing.assert_array_equal(load_image(source), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_files_keep_their_range(format: str) -> None:
    data = encoded(Image.fromarray(GREY16), format)
    for source in (data, Image.open(io.BytesIO(data)).convert("I")):
        np.testing.assert_array_equal(load_image(source), np.stack([GREY16_AS_8] * 3, 2))


def test_big_endian_16_bit_is_not_mixed_up() -> None:
    image = Image.frombytes("I;16B", (4, 2), GREY16.astype(">u2").tobytes())
    np.testing.assert_array_equal(load_image(image)[..., 0], GREY16_AS_8)


def test_32_bit_numbers_outside_16_bits_are_refused_with_their_range() -> None:
    image = Image.fromarray(np.array([[-5, 70_000]], np.int32))
    assert "from -5 to 70000" in refusal(InputError, image)


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_the_first_frame_is_taken(format: str, options: dict[str, Any]) -> None:
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(load_image(data), np.asarray(red))


def test_the_photographs_of_telephones_are_read() -> None:
    near, far = (Image.new("RGB", (16, 16), colour) for colour in ("white", "black"))
    data = encoded(near, "MPO", save_all=True, append_images=[far])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert load_image(data).min() >= 254


def test_one_pixel_is_an_image() -> None:
    for source in (np.zeros((1, 1), np.uint8), encoded(Image.new("1", (1, 1)))):
        assert load_image(source).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB[..., 0], np.stack([RGB[..., 0]] * 3, 2)),
        (RGB[..., :1], np.stack([RGB[..., 0]] * 3, 2)),
        (np.asfortranarray(RGB), RGB),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
        (np.asfortranarray(RGBA), on_white(RGBA)),
        (RGBA.astype(np.uint16) * 257, on_white(RGBA)),
        (RGBA / 255, on_white(RGBA)),
        (GREY16, np.stack([GREY16_AS_8] * 3, 2)),
        (GREY16.astype(">u2"), np.stack([GREY16_AS_8] * 3, 2)),
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
    return encoded(Image.fromarray(RGB), pnginfo=info)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"some notes", "is no image in PNG, JPEG"),
        (b"\n<!DOCTYPE html><title>x</title>", "HTML page"),
        (PNG[:20], "damaged"),
        (PNG[:-40], "damaged or cut short"),
        (PNG[:60] + b"\xff" + PNG[61:], "damaged or cut short"),
        (encoded(Image.fromarray(smooth(64, 64)), "JPEG")[:-300], "damaged or cut short"),
        (encoded(Image.fromarray(smooth(64, 64)), "WEBP")[:-100], "damaged"),
        (encoded(Image.fromarray(smooth(64, 64)), "TIFF")[:500], "damaged"),
        (encoded(Image.fromarray(smooth(64, 64)), "BMP")[:-500], "damaged or cut short"),
        (encoded(Image.fromarray(RGB), "ICO"), "is no image in PNG"),
        (png_with_text(2**21), "damaged or cut short (Decompressed"),
        (png_with_header(12_000, 10_000), "12000 x 10000 pixels, more than 100,000,000"),
        (png_with_header(50_000, 50_000), "2500000000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_give_one_clear_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path):
        assert words in refusal(InputError, source)


@pytest.mark.parametrize("format", images.FORMATS)
def test_random_damage_never_shows_an_error_of_the_decoder(format: str) -> None:
    whole = encoded(Image.fromarray(smooth(24, 40)), format)
    random = np.random.default_rng(1)
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, min(len(data), 300), 3)
        data[places] = random.integers(0, 256, 3)
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
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    url = loopback.add("/picture.png", PNG)
    for source in (path, url, PNG):
        load_image(source, max_bytes=len(PNG), max_pixels=35, allow_private=True)
        assert "max_bytes" in refusal(
            InputError, source, max_bytes=len(PNG) - 1, allow_private=True
        )
    for picture in (PNG, RGB, Image.fromarray(RGB)):
        load_image(picture, max_pixels=35)
        assert "max_pixels" in refusal(InputError, picture, max_pixels=34)


@pytest.mark.parametrize("limit", ["max_pixels", "max_bytes", "timeout"])
def test_a_limit_of_nothing_is_refused(limit: str) -> None:
    with pytest.raises(InputError, match=f"{limit} must be above 0, got 0"):
        load_image(PNG, **{limit: 0})  # type: ignore[arg-type]


def test_a_picture_above_pillows_warning_is_read_without_one(
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


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        *[
            (address, False)
            for address in (
                *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
                *("100.64.0.1", "0.0.0.0", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
                *("255.255.255.255", "::1", "::", "fe80::1", "fe80::1%lo", "fc00::1", "fec0::1"),
                *("ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
                *("::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::"),
            )
        ],
    ],
)
def test_only_public_addresses_count_as_public(address: str, public: bool) -> None:
    assert images._is_public(address) is public


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses connected to; every connection is refused."""
    addresses: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        addresses.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return addresses


Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Sets what successive look-ups of any name give; there must be no more of them."""

    def set_answers(*answers: list[str]) -> None:
        left = iter(answers)

        def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
            families = {False: socket.AF_INET, True: socket.AF_INET6}
            return [
                (families[":" in address], socket.SOCK_STREAM, 6, "", (address, port))
                for address in next(left)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return set_answers


@pytest.mark.parametrize(
    "url",
    [
        "{url}/picture.png",
        "http://localhost:{port}/picture.png",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "HTTP://127.1:{port}/",
    ],
)
def test_this_machine_is_refused_unless_allowed(
    url: str, loopback: LoopbackServer, dialled: list[Any]
) -> None:
    port = loopback.url.rpartition(":")[2]
    assert "allow_private=True" in refusal(
        InputError, url.format(url=loopback.url, port=port), timeout=2
    )
    assert not dialled and not loopback.requests


def test_one_private_address_among_public_ones_is_enough_to_refuse(
    resolve: Resolve, dialled: list[Any]
) -> None:
    resolve(["93.184.216.34", "10.0.0.8"])
    assert "10.0.0.8" in refusal(InputError, "http://rebind.test/cat.png")
    assert not dialled


def test_a_name_is_looked_up_once_and_only_checked_addresses_are_dialled(
    resolve: Resolve, dialled: list[Any]
) -> None:
    resolve(["93.184.216.34", "93.184.216.35"], ["127.0.0.1"])
    assert "refused" in refusal(SourceError, "http://rebind.test/cat.png")
    assert dialled == ["93.184.216.34", "93.184.216.35"]


def test_proxies_of_the_environment_are_not_used(
    loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    load_image(loopback.add("/a.png", PNG), allow_private=True)


def test_a_second_address_is_tried_when_the_first_does_not_answer(
    resolve: Resolve, loopback: LoopbackServer
) -> None:
    resolve(["127.0.0.9", "127.0.0.1"])
    port = loopback.url.rpartition(":")[2]
    loopback.add("/a.png", PNG)
    load_image(f"http://labkit.test:{port}/a.png", allow_private=True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://example.org/cat.png", "must lead to http:// or https://"),
        ("http://me:secret@example.org/cat.png", "credentials"),
        ("http://me@example.org/cat.png", "credentials"),
        ("http:///cat.png", "no usable URL"),
        ("http://me:secret@/cat.png", "no usable URL"),
        ("http://me:secret@host:99999/cat.png", "no usable URL"),
        ("http://[::1/cat.png", "no usable URL"),
    ],
)
def test_unusable_addresses_are_refused_without_a_look_up(
    url: str, words: str, resolve: Resolve
) -> None:
    resolve()
    text = refusal(InputError, url)
    assert words in text and "secret" not in text


def test_redirects_are_followed_to_relative_addresses_too(loopback: LoopbackServer) -> None:
    loopback.add("/there/cat 1.png", PNG)
    loopback.add("/there/hop", b"", redirect="cat 1.png")
    url = loopback.add("/start", b"", redirect=f"{loopback.url}/there/hop")
    np.testing.assert_array_equal(load_image(url, allow_private=True), RGB)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("file:///etc/passwd", "http:// or https://"),
        ("ftp://example.org/", "http:// or https://"),
        ("http://me:secret@127.0.0.1/", "credentials"),
        ("http://127.0.0.2/", "127.0.0.2 is not public"),
        ("http://169.254.169.254/latest/", "169.254.169.254 is not public"),
        ("//[::1]/", "::1 is not public"),
    ],
)
def test_redirects_are_held_to_the_same_rules(
    target: str, words: str, loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = images._is_public
    monkeypatch.setattr(images, "_is_public", lambda a: a == "127.0.0.1" or really(a))
    text = refusal(InputError, loopback.add("/start", b"", redirect=target))
    assert words in text and "secret" not in text
    assert len(loopback.requests) == 1


@pytest.mark.parametrize(("hops", "fails"), [(5, False), (6, True)])
def test_five_redirects_are_followed_and_no_more(
    hops: int, fails: bool, loopback: LoopbackServer
) -> None:
    loopback.add("/0", PNG)
    for hop in range(hops):
        loopback.add(f"/{hop + 1}", b"", redirect=f"/{hop}")
    url = f"{loopback.url}/{hops}"
    if fails:
        assert "more than 5 times" in refusal(SourceError, url, allow_private=True)
    else:
        load_image(url, allow_private=True)
    assert len(loopback.requests) == 6


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.STALL, "no answer within 0.2 s"),
        (Fault.STALL_HALFWAY, "no answer within 0.2 s"),
        (Fault.SHORT_BODY, f"after {len(PNG) // 2} of {len(PNG)} bytes"),
        (Fault.HTML_PAGE, "HTML page"),
        (Fault.UNAVAILABLE, "answered 503"),
    ],
)
def test_failing_servers_give_one_clear_line(
    fault: Fault, words: str, loopback: LoopbackServer
) -> None:
    url = loopback.add("/a.png", PNG)
    loopback.fail("/a.png", fault)
    assert words in refusal(SourceError, url, timeout=0.2, allow_private=True)


def test_absent_pages_servers_and_hosts_give_one_clear_line(
    loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "answered 404" in refusal(SourceError, f"{loopback.url}/a.png", allow_private=True)
    assert "refused" in refusal(SourceError, "http://127.0.0.1:9/a.png", allow_private=True)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "'nowhere.test' was not found" in refusal(SourceError, "https://nowhere.test/a.png")


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that plays `answer` to its one client."""

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as client:
            answer(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips_is_left_at_the_overall_deadline(part: str) -> None:
    def drip(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if part == "body" else b"X: "))
        while True:
            client.sendall(b"x")
            time.sleep(0.02)

    start = time.monotonic()
    with raw_server(drip) as address:
        text = refusal(SourceError, f"http://{address}/a.png", timeout=0.1, allow_private=True)
    assert "no end within 0.4 s" in text
    assert time.monotonic() - start < 2


def test_a_body_of_unknown_length_is_cut_off_at_the_limit() -> None:
    sent = 0

    def flood(client: socket.socket) -> None:
        nonlocal sent
        client.recv(1000)
        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            client.sendall(b"4000\r\n" + bytes(0x4000) + b"\r\n")
            sent += 0x4000

    with raw_server(flood) as address:
        text = refusal(InputError, f"http://{address}/a.png", max_bytes=100_000, allow_private=True)
    assert "max_bytes" in text and sent < 20_000_000


def test_an_announced_length_above_the_limit_is_refused_before_the_body() -> None:
    def announce(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n")
        client.recv(1000)  # returns when the client leaves

    with raw_server(announce) as address:
        url = f"http://{address}/a.png"
        assert "max_bytes" in refusal(InputError, url, max_bytes=100_000, allow_private=True)


@pytest.mark.parametrize("answer", [b"", b"\x00\xff nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX"])
def test_what_is_not_http_gives_one_clear_line(answer: bytes) -> None:
    def play(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(answer)

    with raw_server(play) as address:
        refusal(LabkitError, f"http://{address}/a.png", allow_private=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@pytest.mark.parametrize(("host", "trusted"), [("labkit.test", True), ("other.test", False)])
def test_certificates_are_checked_for_the_name_asked_for(
    host: str, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolve: Resolve
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    making = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    making += f" -subj /CN=labkit.test -addext subjectAltName=DNS:labkit.test -keyout {key}"
    subprocess.run([*making.split(), "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setattr("requests.certs.where", lambda: certificate)

    def play(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as wire:
            wire.recv(1000)
            wire.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + PNG)

    with raw_server(play) as address:
        resolve(["127.0.0.1"])
        url = f"https://{host}:{address.rpartition(':')[2]}/a.png"
        if trusted:
            np.testing.assert_array_equal(load_image(url, allow_private=True), RGB)
        else:
            assert "certificate" in refusal(SourceError, url, allow_private=True)
