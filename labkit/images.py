"""Convert any image source to (H, W, 3) uint8 RGB, and fetch images from the web safely.

Every failure is one line that names the cause and the remedy. A web address is not trusted, nor is
its host or its server; see `fetch`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from labkit.files import describe_unreadable
from labkit.runtime import InputError, LabkitError, SourceError, as_one_line

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

SUFFIXES = {
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # JPEG includes telephones' MPO
BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIC": {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx", b"mif1"},
}
REMEDIES = {
    "AVIF": "update Pillow to 11.3 or later (pip install -U pillow), or convert it to PNG or JPEG",
    "HEIC": "pip install pillow-heif, or convert it to PNG or JPEG",
}
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
HEAD = 64  # bytes of a file that tell its format
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
MAX_PIXELS = 100_000_000
BAND_PIXELS = 2**21  # converted at a time; what lies between is several times as large
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10
MAX_SCANNED = 1_500_000_000  # pixels that the scans of a JPEG may pass over, all together
SCAN = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # a marker between or behind scans
START_OF_SCAN, END_OF_IMAGE, NO_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
COLOUR_PROFILE = b"iCCP"  # a chunk of a PNG
DECODED_TWICE = ("WEBP", "AVIF", "HEIF")  # decoders of these hold the image a second time
MAX_OPENED = 2**28  # bytes of a file that `open_image` reads into memory
ORIENTATION = 0x0112  # EXIF
MAX_REDIRECTS = 5
TOTAL_TIMEOUTS = 4  # a whole download may take so many times the longest silence
USER_AGENT = "labkit"
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all else of IPv6 is special or not assigned
# IANA's registries of special-purpose addresses, of 2025; `ipaddress` knows those of its own year.
SPECIAL_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24"),
            *("192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
SPECIAL_IPV6 = tuple(
    map(
        ipaddress.IPv6Network,
        ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3ffe::/16", "3fff::/20"),
    )
)


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = 64 * 2**20,
    timeout: float = 30.0,
    allow_private: bool = False,
) -> NDArray[np.uint8]:
    """Load `source` upright as (H, W, 3) uint8 RGB, in a new C-contiguous array.

    Transparent pixels are blended with white. Of several frames the first is taken. Colour
    profiles are ignored. `scale_to_uint8` says what becomes of numbers of more than 8 bits. AVIF
    needs Pillow 11.3, HEIC the package pillow-heif.

    Args:
        source: a path, an http or https URL, the bytes of an image file, a PIL image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of numbers that `scale_to_uint8` takes.
            `fetch` says how a URL is fetched.
        max_pixels: the most pixels, checked before decoding; half as many of WebP, AVIF, HEIC
            and progressive JPEG, whose decoders hold an image twice. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.
        max_bytes: the largest file, checked before reading and while it arrives.
        timeout: the longest silence of a server in seconds.
        allow_private: fetch from this machine and from private networks too.

    Raises:
        InputError: `source` is none of these, is no image, is damaged, too large, or refused.
        SourceError: the disk, the network or the server failed.

    Example:
        >>> load_image(np.zeros((4, 6), dtype=np.uint8)).shape
        (4, 6, 3)
        >>> load_image(np.array([[[255, 0, 0, 51]]], dtype=np.uint8)).tolist()  # 20 % red
        [[[255, 204, 204]]]
    """
    from PIL import Image

    label = f"source {describe(source)}"
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "timeout": timeout}
    for name, limit in limits.items():
        if not limit > 0:
            raise InputError(f"{name} must be above 0, got {limit!r}")
    if isinstance(source, np.ndarray):
        return _convert_array(source, label, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, label, max_pixels)
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and _is_url(source):
        data = fetch(
            source, label, max_bytes=max_bytes, timeout=timeout, allow_private=allow_private
        )
    elif isinstance(source, str | os.PathLike):
        data = _read_file(os.fsdecode(source), label, max_bytes)
    else:
        raise InputError(
            "source must be a path, a URL, bytes, a PIL image or a NumPy array, "
            f"got {type(source).__name__}"
        )
    _check_bytes(len(data), label, max_bytes)
    return _decode(data, label, max_pixels)


def describe(source: ImageSource) -> str:
    """Return a short name of `source` for messages and reports.

    It is the file name, or the URL without credentials, query and fragment, or "bytes", "array" or
    "image".

    Example:
        >>> describe("photos/cat.png")
        'cat.png'
        >>> describe("https://me:secret@host.org/cat.png?token=secret")
        'https://host.org/cat.png'
    """
    if isinstance(source, bytes | np.ndarray):
        return "bytes" if isinstance(source, bytes) else "array"
    if not isinstance(source, str | os.PathLike):
        return "image"
    name = os.fsdecode(source)
    if _is_url(name):
        name = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", name)[0])
    else:
        name = os.path.basename(os.path.normpath(name))
    return as_one_line(name)


def _is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def _check_bytes(count: int, label: str, max_bytes: int) -> None:
    if count == 0:
        raise InputError(f"{label} is empty; was it saved or downloaded completely?")
    if count > max_bytes:
        raise InputError(
            f"{label} has more than {max_bytes:,} bytes; make it smaller or raise max_bytes"
        )


def _check_pixels(width: int, height: int, label: str, max_pixels: int) -> None:
    if width * height == 0:
        raise InputError(f"{label} is empty: {width} x {height} pixels; give at least one pixel")
    if width * height > max_pixels:
        raise InputError(
            f"{label} has {width} x {height} pixels, more than {max_pixels:,}; "
            "make it smaller or raise max_pixels"
        )


def _read_file(path: str, label: str, max_bytes: int) -> bytes:
    """Return the bytes of the file at `path`; at most `max_bytes` + 1 if it grows meanwhile."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{label} is a folder; give one image file in it")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{label} is a device or a pipe; give an image file")
        _check_bytes(status.st_size, label, max_bytes)
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except LabkitError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # or a zero byte in it
        raise InputError(f"{label} does not exist; check the path {path[:500]!r}") from error
    except OSError as error:
        raise describe_unreadable(label, error) from error


def _decode(source: Image.Image | bytes, label: str, max_pixels: int) -> NDArray[np.uint8]:
    """Convert an image file or a PIL image, and turn every error of a decoder into one line."""
    from PIL import Image

    if isinstance(source, bytes) and re.match(rb"\W*(!doctype\s+)?html\b", source[:512], re.I):
        raise InputError(f"{label} is an HTML page; give the image in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here or harmless
            if isinstance(source, Image.Image):
                return to_rgb(source, label, max_pixels=max_pixels)
            with open_image(source, label) as image:
                return to_rgb(image, label, max_pixels=max_pixels)
    except LabkitError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{label} has too many pixels: {error} Make it smaller.") from error
    except Exception as error:  # the decoders' errors have no common base
        raise InputError(
            f"{label} is damaged or cut short ({as_one_line(error)}); save or download it again"
        ) from error


def open_image(file: bytes | Path, label: str) -> Image.Image:
    """Open an image file in one of the formats that labkit reads, without decoding its pixels.

    Args:
        file: the content of the file, or its path.
        label: the name of the image at the beginning of messages.

    Raises:
        InputError: it is no image, or it is HEIC or AVIF and this machine cannot decode that.

    Example:
        >>> open_image(b"P5 1 1 255 x", "a grey pixel").size
        (1, 1)
    """
    from PIL import Image, UnidentifiedImageError

    formats: tuple[str, ...] = FORMATS
    head = _read_head(file)
    kind = _identify_heif(head)
    if kind:
        if kind == "HEIC":
            with contextlib.suppress(ImportError):
                import pillow_heif

                pillow_heif.register_heif_opener()
        Image.init()
        formats = tuple(name for name in ("AVIF", "HEIF") if name in Image.OPEN)
    if isinstance(file, Path) and head.startswith((PNG, JPEG)):
        file = _read_file(os.fspath(file), label, MAX_OPENED)
    if isinstance(file, bytes) and head.startswith(PNG):
        file = _drop_profile(file)
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
        if isinstance(file, bytes) and head.startswith(JPEG):
            _check_scans(file, image.width * image.height, label)
        return image
    except UnidentifiedImageError as error:
        if kind:
            raise InputError(
                f"{label} is {kind}, which cannot be read here, or damaged; {REMEDIES[kind]}"
            ) from error
        raise InputError(
            f"{label} is no image in {', '.join(FORMATS)}, or its start is damaged; "
            "convert it to PNG or download it again"
        ) from error


def _drop_profile(file: bytes) -> bytes:
    """A PNG without its colour profile, which is not used, and can be too large for Pillow."""
    position = len(PNG)
    while position + 12 <= len(file):
        end = position + 12 + int.from_bytes(file[position : position + 4], "big")
        if file[position + 4 : position + 8] == COLOUR_PROFILE:
            return file[:position] + file[end:]
        position = end
    return file


def _check_scans(file: bytes, pixels: int, label: str) -> None:
    """Raise InputError if a JPEG passes so often over its pixels that it takes very long."""
    scans, position = 0, len(JPEG) - 1
    while match := SCAN.search(file, position):
        marker, position = match[1][0], match.end()
        if marker == END_OF_IMAGE:
            return
        scans += marker == START_OF_SCAN
        if scans > MAX_SCANS or scans * pixels > MAX_SCANNED:
            raise InputError(
                f"{label} is a JPEG of {scans} scans or more, which take too long to decode; "
                "save it anew, or as PNG"
            )
        if marker not in NO_LENGTH:
            position += int.from_bytes(file[position : position + 2], "big")


def _read_head(file: bytes | Path) -> bytes:
    if isinstance(file, bytes):
        return file[:HEAD]
    with file.open("rb") as opened:
        return opened.read(HEAD)


def _identify_heif(head: bytes) -> str:
    """`HEIC` or `AVIF` by the brands at the start of a file; empty for every other format."""
    if head[4:8] != b"ftyp":
        return ""
    end = int.from_bytes(head[:4], "big")
    brands = {head[start : start + 4] for start in (8, *range(16, min(end, len(head)), 4))}
    return next((kind for kind, names in BRANDS.items() if brands & names), "")


def is_image_file(path: Path) -> bool:
    """Return whether a file has the suffix of an image, in any case, or begins as an image does.

    Raises:
        OSError: the file cannot be read.

    Example:
        >>> is_image_file(Path("photos/IMG_0001.JPG"))
        True
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    head = _read_head(path)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(STARTS) or is_webp or is_bmp or bool(_identify_heif(head))


def list_images(folder: Path, *, recursive: bool = True) -> tuple[list[Path], list[Path]]:
    """List the image files in a folder, and what else is in it, both in order of path.

    Hidden files and folders, and what systems leave behind, such as `._photo.jpg` and
    `Thumbs.db`, are no images. Links are followed.

    Args:
        folder: the folder.
        recursive: list the folders in it too; otherwise they are left out of both lists.

    Returns:
        The image files, and every other file and hidden folder.

    Raises:
        SourceError: a folder or file could not be read, or a link leads nowhere or in a circle.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt"):
        ...     (folder / name).touch()
        >>> [[path.name for path in paths] for paths in list_images(folder)]
        [['a.jpg', 'b.PNG'], ['._a.jpg', 'notes.txt']]
    """
    images: list[Path] = []
    others: list[Path] = []
    try:
        for path, is_visible_file in _walk(folder, recursive, ()):
            (images if is_visible_file and is_image_file(path) else others).append(path)
    except OSError as error:
        if isinstance(error, LabkitError):
            raise
        raise describe_unreadable(error.filename or folder, error) from error
    return sorted(images, key=lambda path: path.parts), sorted(others, key=lambda path: path.parts)


def is_system_file(name: str) -> bool:
    """Return whether a file or folder is hidden or one that a system leaves behind.

    Example:
        >>> [is_system_file(name) for name in ("._cat.jpg", "Thumbs.db", "cat.jpg")]
        [True, True, False]
    """
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _walk(
    folder: Path, recursive: bool, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Path, bool]]:
    """What is below `folder`, and whether it is a visible file; hidden folders are not entered."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in above:
        raise SourceError(f"{folder} is a link that leads in a circle; remove it")
    with os.scandir(folder) as listing:
        entries = list(listing)
    for entry in entries:
        path = folder / entry.name
        if is_system_file(entry.name):
            yield path, False
        elif entry.is_dir():
            if recursive:
                yield from _walk(path, recursive, (*above, (status.st_dev, status.st_ino)))
        elif entry.is_symlink() and not path.exists():
            raise SourceError(f"{path} is a link that leads nowhere; mend or remove it")
        else:
            yield path, entry.is_file()


def to_rgb(
    image: Image.Image, label: str = "image", *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to upright (H, W, 3) uint8 RGB, as `load_image` says.

    Args:
        image: the image; of several frames the present one is taken.
        label: the name of the image at the beginning of messages.
        max_pixels: the most pixels, as in `load_image`.

    Raises:
        InputError: the image is empty or too large, or its numbers are out of range.

    Example:
        >>> from PIL import Image
        >>> to_rgb(Image.new("CMYK", (2, 1), (0, 255, 255, 0))).tolist()
        [[[255, 0, 0], [255, 0, 0]]]
    """
    is_twice = image.format in DECODED_TWICE or "progressive" in image.info
    _check_pixels(*image.size, label, max_pixels // 2 if is_twice else max_pixels)
    _match_transparency(image)
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about which side is up
        orientation = image.getexif().get(ORIENTATION, 1)
    width, height = image.size
    upright = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    pixels = np.empty((*upright, 3), np.uint8)
    stored = pixels  # the same memory, turned as the file has it
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    if orientation in (5, 6, 7, 8):
        stored = stored.swapaxes(0, 1)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        stored[top:bottom] = _convert_band(image.crop((0, top, width, bottom)), label)
    return pixels


def _match_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG with colours of 16 bits to the 8 that Pillow keeps.

    It is called before the image is decoded, which forgets how many bits there were.
    """
    tiles = getattr(image, "tile", ())
    colour = image.info.get("transparency")
    if tiles and tiles[0][3] == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _convert_band(image: Image.Image, label: str) -> NDArray[np.uint8]:
    """Convert rows of a Pillow image of any mode, as they are stored: (H, W, 3)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        numbers = np.asarray(image)
        if image.mode == "I":
            numbers = narrow_to_uint16(numbers, label)
        pixels = _convert_array(numbers, label, numbers.size)
        if "transparency" in image.info:  # of a 16-bit PNG: one value is transparent
            pixels[numbers == image.info["transparency"]] = 255
        return pixels
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        return _blend_with_white(np.asarray(straight.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _convert_array(array: NDArray[Any], label: str, max_pixels: int) -> NDArray[np.uint8]:
    """Copy `array` as (H, W, 3) uint8."""
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        raise InputError(
            f"{label} has shape {shape}, channels first; transpose it: array.transpose(1, 2, 0)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise InputError(f"{label} must be (H, W) or (H, W, 1, 3 or 4), got shape {shape}")
    _check_pixels(shape[1], shape[0], label, max_pixels)
    pixels = scale_to_uint8(array, label).reshape(*shape[:2], -1)  # (H, W, channels)
    if pixels.shape[2] == 4:
        return _blend_with_white(pixels)
    return np.array(np.broadcast_to(pixels, (*shape[:2], 3)), order="C")


def scale_to_uint8(array: NDArray[Any], label: str = "image") -> NDArray[np.uint8]:
    """Scale numbers of any depth to 0..255; images from every source follow this one rule.

    `uint8` stays as it is, and `bool` becomes 0 and 255. `uint16` is divided by 257 and rounded,
    so that 65535 becomes 255. 32-bit integers count as 16 bits (see `narrow_to_uint16`). Floats
    must lie in [0, 1] and are multiplied by 255 and rounded. (Of colours of 16 bits in a file,
    Pillow itself keeps the upper 8.)

    Args:
        array: numbers of any shape.
        label: the name of the image at the beginning of messages.

    Raises:
        InputError: the type is another one, or a number is out of range.

    Example:
        >>> scale_to_uint8(np.array([0, 257, 65535], np.uint16)).tolist()
        [0, 1, 255]
        >>> scale_to_uint8(np.array([0, 0.5, 1])).tolist()
        [0, 128, 255]
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if is_32_bit(array.dtype):
        check_above_8_bits(array, label)
        array = narrow_to_uint16(array, label)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        raise InputError(
            f"{label} must hold uint8, uint16, 32-bit integers, bool or float, "
            f"got {array.dtype}; scale it to 0..255 and use array.astype('uint8')"
        )
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():  # a NaN anywhere makes both NaN
        raise InputError(f"{label} holds NaN or infinity; np.nan_to_num can replace them")
    if low < 0 or high > 1:
        raise InputError(
            f"{label} holds floats from {low:g} to {high:g}, they must lie in [0, 1]; "
            "divide by the largest possible value, for example 255"
        )
    return np.asarray(np.rint(array.astype(np.float32) * 255), np.uint8)


def is_32_bit(dtype: np.dtype[Any]) -> bool:
    """Return whether `dtype` is one of integers of 32 bits, with or without a sign.

    Example:
        >>> is_32_bit(np.dtype(np.int32)), is_32_bit(np.dtype(np.float32))
        (True, False)
    """
    return dtype.kind in "iu" and dtype.itemsize == 4


def check_above_8_bits(array: NDArray[Any], label: str) -> None:
    """Raise InputError if an array of 32-bit integers holds nothing above 255, but is not black.

    Its numbers are most likely 8-bit colours, and would become black as 16-bit ones.

    Example:
        >>> check_above_8_bits(np.array([0, 40000], np.int32), "image")
    """
    if array.size and 0 < array.max() <= 255:
        raise InputError(
            f"{label} holds {array.dtype} from {array.min()} to {array.max()}; use "
            "array.astype('uint8') if 255 means white, array.astype('uint16') if 65535 does"
        )


def narrow_to_uint16(array: NDArray[Any], label: str) -> NDArray[np.uint16]:
    """Convert integers that must lie in 0..65535, the range of 16 bits, to uint16.

    Raises:
        InputError: a number is outside that range.

    Example:
        >>> narrow_to_uint16(np.array([0, 65535], np.int32), "image").tolist()
        [0, 65535]
    """
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < 0 or high > 65535:
        raise InputError(
            f"{label} holds numbers from {array.min()} to {array.max()}; "
            "16 bits (0 to 65535) are understood: scale it, or save it as 8-bit PNG"
        )
    return array.astype(np.uint16)


def _blend_with_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend (H, W, 4) RGBA, its alpha not premultiplied, with white: (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8, order="C")


def fetch(url: str, label: str, *, max_bytes: int, timeout: float, allow_private: bool) -> bytes:
    """Return the body at `url`; it may be empty.

    The request uses no proxy, cookie or credential. Each host name, also of a redirect, is looked
    up once. If any of its addresses is not public, the URL is refused; otherwise the connection
    goes to one of exactly these addresses. Over https the certificate must be for the host name.

    Args:
        url: an http or https address.
        label: the name of the image at the beginning of messages; it holds no credentials.
        max_bytes: the largest body, checked before it arrives and while it does.
        timeout: the longest silence in seconds. The whole download may take four times as long,
            without the time in which the system looks up names.
        allow_private: fetch from this machine and from private networks too.

    Raises:
        InputError: the address cannot be used or is refused, or the body is too large.
        SourceError: the network or the server failed, or a web page came.
    """
    deadline = time.monotonic() + TOTAL_TIMEOUTS * timeout

    def get_wait() -> float:
        """Return the seconds that the next wait may last."""
        remaining = min(timeout, deadline - time.monotonic())
        if remaining <= 0:
            raise TimeoutError
        return remaining

    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _request(url, label, get_wait, allow_private) as response:
                target = response.getheader("Location")
                if not (target and response.status in (301, 302, 303, 307, 308)):
                    return _read_body(response, label, max_bytes)
                url = urljoin(url, target)
    except LabkitError:
        raise
    except TimeoutError as error:
        raise SourceError(
            f"{label} could not be had: no answer within {timeout:g} s, or no end within "
            f"{TOTAL_TIMEOUTS * timeout:g} s; try again or raise timeout"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SourceError(
            f"{label} could not be had ({as_one_line(error)}); check the address and the network"
        ) from error
    raise SourceError(
        f"{label} was redirected more than {MAX_REDIRECTS} times; give the final address"
    )


@contextlib.contextmanager
def _request(
    url: str, label: str, get_wait: Callable[[], float], allow_private: bool
) -> Iterator[http.client.HTTPResponse]:
    """Send one request and give the response; a redirect is not followed."""
    import requests

    parts = _parse_url(url, label)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    with contextlib.ExitStack() as stack:
        raw_socket = stack.enter_context(_connect(host, port, label, get_wait, allow_private))
        if secure:
            context = ssl.create_default_context(cafile=requests.certs.where())
            raw_socket.settimeout(get_wait())
            raw_socket = stack.enter_context(context.wrap_socket(raw_socket, server_hostname=host))
        connection = http.client.HTTPConnection(host, port)
        deadline_socket: Any = _DeadlineSocket(raw_socket, get_wait)
        connection.sock = deadline_socket
        connection.auto_open = 0  # so that it never connects by itself to an unchecked address
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        headers = {"Host": parts.netloc, "User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        connection.request("GET", path, headers=headers)
        yield stack.enter_context(connection.getresponse())


def _parse_url(url: str, label: str) -> SplitResult:
    """Split `url`, quoted and with an ASCII host, or refuse it."""
    import requests

    try:
        parts = urlsplit(requests.Request("GET", url).prepare().url or "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # requests raises it too; its text could show credentials
        raise InputError(f"{label} leads to no usable URL; check its host and port") from None
    if not usable:
        raise InputError(f"{label} must lead to http:// or https://, got {_hide_secrets(parts)!r}")
    if "@" in parts.netloc:
        raise InputError(f"{label} leads to a URL with credentials; leave out what is before the @")
    return parts


def _connect(
    host: str, port: int, label: str, get_wait: Callable[[], float], allow_private: bool
) -> socket.socket:
    """Connect to one of the addresses of `host`, after all of them were checked."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(
            f"{label} could not be had: host {host!r} was not found; check the address and network"
        ) from error
    for *_, address in addresses:
        if not (allow_private or _is_public(str(address[0]))):
            raise InputError(
                f"{label} leads to {host!r}, whose address {address[0]} is not public; "
                "if you trust it, use allow_private=True"
            )
    failure = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(get_wait())
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _is_public(text: str) -> bool:
    """Return whether `text` is an address on the public internet, also if it embeds an IPv4 one."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in SPECIAL_IPV4)
    embedded = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if embedded:
        return _is_public(str(embedded))
    is_special = any(address in network for network in SPECIAL_IPV6)
    return address.is_global and address in GLOBAL_UNICAST and not is_special


class _DeadlineSocket(io.RawIOBase):
    """A socket, as `http.client` needs it, that waits only as long as `get_wait` allows."""

    def __init__(self, raw_socket: socket.socket, get_wait: Callable[[], float]) -> None:
        self._socket, self._get_wait = raw_socket, get_wait

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._get_wait())
        return self._socket.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._get_wait())
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineSocket(self._socket, self._get_wait))


def _read_body(response: http.client.HTTPResponse, label: str, max_bytes: int) -> bytes:
    """Return the body of `response` if it is whole, no web page and at most `max_bytes` long."""
    if response.status != 200:
        raise SourceError(
            f"{label} could not be had: the server answered {response.status}; check the address"
        )
    if (response.getheader("Content-Type") or "").lower().startswith("text/html"):
        raise SourceError(
            f"{label} is an HTML page; give the image in it, and check for a sign-in page"
        )
    too_large = f"{label} has more than {max_bytes:,} bytes; make it smaller or raise max_bytes"
    announced = response.length
    if announced is not None and announced > max_bytes:
        raise InputError(too_large)
    data = response.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(too_large)
    if data and announced not in (None, len(data)):  # the caller judges an empty body
        raise SourceError(
            f"{label} broke off after {len(data):,} of {announced:,} bytes; try again"
        )
    return data


def _hide_secrets(parts: SplitResult) -> str:
    """Return a URL for messages: without credentials, query and fragment."""
    host = parts.netloc.rpartition("@")[2]
    return as_one_line(parts._replace(netloc=host, query="", fragment="").geturl())
