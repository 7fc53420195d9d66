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
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError, LabkitError, SourceError, as_one_line

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG includes the MPO of telephones
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # EXIF
MAX_REDIRECTS = 5
TOTAL_TIMEOUTS = 4  # a whole download may take so many times the longest silence
USER_AGENT = "labkit"
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


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
    profiles are ignored. 16-bit grey is divided by 257; Pillow's mode "I" counts as 16-bit grey.
    Floats must lie in [0, 1].

    Args:
        source: a path, an http or https URL, the bytes of an image file, a PIL image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of bool, uint8, uint16 or float. `fetch`
            says how a URL is fetched.
        max_pixels: the most pixels, checked before decoding. Pillow's own limit, twice
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
        raise SourceError(
            f"{label} could not be read: {error.strerror or error}; check its permissions and disk"
        ) from error


def _decode(source: Image.Image | bytes, label: str, max_pixels: int) -> NDArray[np.uint8]:
    """Convert an image file or a PIL image, and turn every error of a decoder into one line."""
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
    image: Image.Image, label: str = "image", *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to upright (H, W, 3) uint8 RGB, as `load_image` says.

    Args:
        image: the image; of several frames the present one is taken.
        label: the name of the image at the beginning of messages.
        max_pixels: the most pixels.

    Raises:
        InputError: the image is empty or too large, or its numbers are out of range.

    Example:
        >>> from PIL import Image
        >>> to_rgb(Image.new("CMYK", (2, 1), (0, 255, 255, 0))).tolist()
        [[[255, 0, 0], [255, 0, 0]]]
    """
    _check_pixels(*image.size, label, max_pixels)
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        numbers = np.asarray(image)
        if image.mode == "I":
            if numbers.min() < 0 or numbers.max() > 65535:
                raise InputError(
                    f"{label} holds numbers from {numbers.min()} to {numbers.max()}; "
                    "16 bits (0 to 65535) are understood: scale it, or save it as 8-bit PNG"
                )
            numbers = numbers.astype(np.uint16)
        pixels = _convert_array(numbers, label, max_pixels)
        if "transparency" in image.info:  # of a 16-bit PNG: one value is transparent
            pixels[numbers == image.info["transparency"]] = 255
    elif image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        pixels = _blend_with_white(np.asarray(straight.convert("RGBA")))
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
    pixels = _scale_to_uint8(array, label).reshape(*shape[:2], -1)  # (H, W, channels)
    if pixels.shape[2] == 4:
        return _blend_with_white(pixels)
    return np.array(np.broadcast_to(pixels, (*shape[:2], 3)), order="C")


def _scale_to_uint8(array: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """Scale `array` from the full range of its type to 0..255."""
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
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded:
            return _is_public(str(embedded))
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


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
