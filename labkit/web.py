"""What is at a web address, fetched without trusting the address, its host or the server."""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from labkit.runtime import InputError, LabkitError, SourceError, as_one_line

MAX_REDIRECTS = 5
OVERALL = 4  # times the longest silence, for a whole download
AGENT = "labkit (+https://github.com/labkit/labkit)"
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def fetch(url: str, label: str, *, max_bytes: int, timeout: float, allow_private: bool) -> bytes:
    """The body at `url`; it may be empty.

    No proxies, cookies or credentials are used. Each name, also of a redirect, is looked up once;
    if any of its addresses is not public it is refused, else one of exactly these addresses is
    connected to, and over https its certificate must be for the name.

    Args:
        url: http or https.
        label: what messages call it, without credentials; they begin with it.
        max_bytes: Largest body, checked before and while it arrives.
        timeout: Longest silence in seconds; all of it may take four times as long, not counting
            the time in which the system looks up names.
        allow_private: Also fetch from this machine and from private networks.

    Raises:
        InputError: an address that cannot be used or is refused, or a body too large.
        SourceError: the network or the server failed, or what came is a web page.
    """
    deadline = time.monotonic() + OVERALL * timeout

    def left() -> float:
        """Seconds that the next wait may last."""
        remaining = min(timeout, deadline - time.monotonic())
        if remaining <= 0:
            raise TimeoutError
        return remaining

    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _answer(url, label, left, allow_private) as answer:
                target = answer.getheader("Location")
                if not (target and answer.status in (301, 302, 303, 307, 308)):
                    return _body(answer, label, max_bytes)
                url = urljoin(url, target)
    except LabkitError:
        raise
    except TimeoutError as error:
        raise SourceError(
            f"{label} could not be had: no answer within {timeout:g} s, or no end within "
            f"{OVERALL * timeout:g} s; try again or raise timeout"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SourceError(
            f"{label} could not be had ({as_one_line(error)}); check the address and the network"
        ) from error
    raise SourceError(
        f"{label} was redirected more than {MAX_REDIRECTS} times; give the final address"
    )


@contextlib.contextmanager
def _answer(
    url: str, label: str, left: Callable[[], float], allow_private: bool
) -> Iterator[http.client.HTTPResponse]:
    """The answer of the server to one request, not following redirects."""
    import requests

    parts = _checked_parts(url, label)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(_connect(host, port, label, left, allow_private))
        if secure:
            context = ssl.create_default_context(cafile=requests.certs.where())
            wire.settimeout(left())
            wire = stack.enter_context(context.wrap_socket(wire, server_hostname=host))
        connection = http.client.HTTPConnection(host, port)
        patient: Any = _Patient(wire, left)
        connection.sock = patient
        connection.auto_open = 0  # never connects by itself to an unchecked address
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        headers = {"Host": parts.netloc, "User-Agent": AGENT, "Accept-Encoding": "identity"}
        connection.request("GET", path, headers=headers)
        yield stack.enter_context(connection.getresponse())


def _checked_parts(url: str, label: str) -> SplitResult:
    """The parts of `url`, quoted and with an ASCII host, if it may be asked for."""
    import requests

    try:
        parts = urlsplit(requests.Request("GET", url).prepare().url or "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # requests raises it too; its text could show credentials
        raise InputError(f"{label} leads to no usable URL; check its host and port") from None
    if not usable:
        raise InputError(f"{label} must lead to http:// or https://, got {_shown(parts)!r}")
    if "@" in parts.netloc:
        raise InputError(f"{label} leads to a URL with credentials; leave out what is before the @")
    return parts


def _connect(
    host: str, port: int, label: str, left: Callable[[], float], allow_private: bool
) -> socket.socket:
    """A connection to one of the addresses of `host`, all of which are checked before."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(
            f"{label} could not be had: host {host!r} was not found; check the address and network"
        ) from error
    for *_, address in found:
        if not (allow_private or _is_public(str(address[0]))):
            raise InputError(
                f"{label} leads to {host!r}, whose address {address[0]} is not public; "
                "if you trust it, use allow_private=True"
            )
    failure = OSError("no address")
    for family, kind, protocol, _, address in found:
        wire = socket.socket(family, kind, protocol)
        try:
            wire.settimeout(left())
            wire.connect(address)
            return wire
        except OSError as error:
            wire.close()
            failure = error
    raise failure


def _is_public(text: str) -> bool:
    """Whether `text` is an address on the public internet, also where it embeds an IPv4 one."""
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


class _Patient(io.RawIOBase):
    """A socket, as `http.client` needs it, that waits only as long as `left` allows."""

    def __init__(self, wire: socket.socket, left: Callable[[], float]) -> None:
        self._wire, self._left = wire, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._wire.settimeout(self._left())
        return self._wire.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._wire.settimeout(self._left())
        self._wire.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Patient(self._wire, self._left))


def _body(answer: http.client.HTTPResponse, label: str, max_bytes: int) -> bytes:
    """The body of `answer`, if it is one, is whole and has at most `max_bytes`."""
    if answer.status != 200:
        raise SourceError(
            f"{label} could not be had: the server answered {answer.status}; check the address"
        )
    if (answer.getheader("Content-Type") or "").lower().startswith("text/html"):
        raise SourceError(
            f"{label} is an HTML page; give the image in it, and check for a sign-in page"
        )
    too_large = f"{label} has more than {max_bytes:,} bytes; make it smaller or raise max_bytes"
    announced = answer.length
    if announced is not None and announced > max_bytes:
        raise InputError(too_large)
    data = answer.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(too_large)
    if data and announced not in (None, len(data)):  # nothing at all is the caller's to judge
        raise SourceError(
            f"{label} broke off after {len(data):,} of {announced:,} bytes; try again"
        )
    return data


def _shown(parts: SplitResult) -> str:
    """A URL for messages: without credentials, query and fragment."""
    host = parts.netloc.rpartition("@")[2]
    return as_one_line(parts._replace(netloc=host, query="", fragment="").geturl())
