"""Any image source as (H, W, 3) uint8 RGB, or one line that says why not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError, LabkitError, SourceError, as_one_line
from labkit.web import fetch

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG includes the MPO of telephones
ORIENTATION = 0x0112  # EXIF


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = 100_000_000,
    max_bytes: int = 64 * 2**20,
    timeout: float = 30.0,
    allow_private: bool = False,
) -> NDArray[np.uint8]:
    """The picture in `source`, upright, as (H, W, 3) uint8 RGB: a C-contiguous copy to write to.

    Transparency is laid on white, the first frame of several is taken, colour profiles are
    ignored. 16-bit grey is divided by 257; Pillow's mode "I" is taken for 16-bit grey. Floats must
    lie in [0, 1].

    A URL is fetched without proxies, cookies or credentials. Each name, also of a redirect, is
    looked up once; if any of its addresses is not public it is refused, else one of exactly these
    addresses is connected to, and over https its certificate must be for the name.

    Args:
        source: A path, an http or https URL, the bytes of an image file, a PIL image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of bool, uint8, uint16 or float.
        max_pixels: Most pixels, checked before decoding. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.
        max_bytes: Largest file, checked before reading and while it arrives.
        timeout: Longest silence of a server in seconds. A URL may take four times as long in all,
            not counting the time in which the system looks up names.
        allow_private: Also fetch from this machine and from private networks.

    Raises:
        InputError: `source` is none of these, is no image, is damaged, too large, or refused.
        SourceError: the disk, the network or the server failed.
    """
    from PIL import Image

    label = f"source {describe(source)}"
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "timeout": timeout}
    for name, limit in limits.items():
        if not limit > 0:
            raise InputError(f"{name} must be above 0, got {limit!r}")
    if isinstance(source, np.ndarray):
        return _from_array(source, label, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, label, max_pixels)
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and _is_url(source):
        data = fetch(
            source, label, max_bytes=max_bytes, timeout=timeout, allow_private=allow_private
        )
    elif isinstance(source, str | os.PathLike):
        data = _read(os.fsdecode(source), label, max_bytes)
    else:
        raise InputError(
            "source must be a path, a URL, bytes, a PIL image or a NumPy array, "
            f"got {type(source).__name__}"
        )
    _check_bytes(len(data), label, max_bytes)
    return _decode(data, label, max_pixels)


def describe(source: ImageSource) -> str:
    """A short name of `source` for messages and reports.

    The file name; the URL without credentials, query and fragment; "bytes", "array" or "picture".
    """
    if isinstance(source, bytes | np.ndarray):
        return "bytes" if isinstance(source, bytes) else "array"
    if not isinstance(source, str | os.PathLike):
        return "picture"
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


def _read(path: str, label: str, max_bytes: int) -> bytes:
    """The bytes of the file at `path`; one more than `max_bytes` if it has grown beyond."""
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
        raise SourceError(
            f"{label} could not be read: {error.strerror or error}; check its permissions and disk"
        ) from error


def _decode(source: Image.Image | bytes, label: str, max_pixels: int) -> NDArray[np.uint8]:
    """The pixels of an image file or of a picture, whatever may be wrong with it."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, bytes) and re.match(rb"\W*(!doctype\s+)?html\b", source[:512], re.I):
        raise InputError(f"{label} is an HTML page; give the image in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here or harmless
            if isinstance(source, Image.Image):
                return to_rgb(source, label, max_pixels=max_pixels)
            with Image.open(io.BytesIO(source), formats=FORMATS) as image:
                return to_rgb(image, label, max_pixels=max_pixels)
    except LabkitError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{label} is no image in {', '.join(FORMATS)}, or its start is damaged; "
            "convert it to PNG or download it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{label} has too many pixels: {error} Make it smaller.") from error
    except Exception as error:  # the decoders' errors have no common base
        raise InputError(
            f"{label} is damaged or cut short ({as_one_line(error)}); save or download it again"
        ) from error


def to_rgb(
    image: Image.Image, label: str = "image", *, max_pixels: int = 100_000_000
) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) uint8 RGB of a Pillow image in any mode, upright."""
    _check_pixels(*image.size, label, max_pixels)
    image.load()
    if image.mode == "I":
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise InputError(
                f"{label} holds numbers from {numbers.min()} to {numbers.max()}; "
                "16 bits (0 to 65535) are understood: scale it, or save it as 8-bit PNG"
            )
        pixels = _from_array(numbers.astype(np.uint16), label, max_pixels)
    elif image.mode == "F" or image.mode.startswith("I;16"):
        pixels = _from_array(np.asarray(image), label, max_pixels)
    elif image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        pixels = _on_white(np.asarray(straight.convert("RGBA")))
    else:
        pixels = np.array(image.convert("RGB"))
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about which side is up
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _from_array(array: NDArray[Any], label: str, max_pixels: int) -> NDArray[np.uint8]:
    """A copy of `array` as (H, W, 3) uint8."""
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        raise InputError(
            f"{label} has shape {shape}, channels first; transpose it: array.transpose(1, 2, 0)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise InputError(f"{label} must be (H, W) or (H, W, 1, 3 or 4), got shape {shape}")
    _check_pixels(shape[1], shape[0], label, max_pixels)
    pixels = _eight_bits(array, label).reshape(*shape[:2], -1)  # (H, W, channels)
    if pixels.shape[2] == 4:
        return _on_white(pixels)
    return np.array(np.broadcast_to(pixels, (*shape[:2], 3)), order="C")


def _eight_bits(array: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """`array` with the full range of its type brought to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        raise InputError(
            f"{label} must hold uint8, uint16, bool or float, got {array.dtype}; "
            "scale it to 0..255 and use array.astype('uint8')"
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


def _on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4) with straight alpha -> (H, W, 3) on white."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8, order="C")
