"""Web addresses: what is fetched, and one clear line for each that is refused or fails."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit import images
from labkit.runtime import InputError, LabkitError, SourceError
from tests.loopback import Fault, LoopbackServer

BODY = bytes(range(256)) * 3


def fetch(
    url: str, *, max_bytes: int = 2**20, timeout: float = 30.0, allow_private: bool = False
) -> bytes:
    """The body at `url`, which messages call "address"."""
    return images.fetch(
        url, "address", max_bytes=max_bytes, timeout=timeout, allow_private=allow_private
    )


def refusal(kind: type[LabkitError], url: str, **options: Any) -> str:
    """The message with which `url` is refused: one line that begins with what it is called."""
    with pytest.raises(kind) as caught:
        fetch(url, **options)
    text = str(caught.value)
    assert text.isprintable() and text.startswith("address ")
    return text


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
                # Special by IANA's registries, whatever the `ipaddress` of this Python says.
                *("192.0.0.9", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1"),
                *("198.18.0.1", "203.0.113.7", "64:ff9b:1::1", "100::1", "100:0:0:1::1"),
                *("2001::1", "2001:2::1", "2001:20::1", "2001:30::1", "2620:4f:8000::1"),
                *("3ffe::1", "3fff::1", "5f00::1", "4000::1", "::5db8:d822"),
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
        "{url}/image.png",
        "http://localhost:{port}/image.png",
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
    assert fetch(loopback.add("/a.png", BODY), allow_private=True) == BODY


def test_a_second_address_is_tried_when_the_first_does_not_answer(
    resolve: Resolve, loopback: LoopbackServer
) -> None:
    resolve(["127.0.0.9", "127.0.0.1"])
    port = loopback.url.rpartition(":")[2]
    loopback.add("/a.png", BODY)
    assert fetch(f"http://labkit.test:{port}/a.png", allow_private=True) == BODY


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://example.org/cat.png", "must lead to http:// or https://"),
        ("ftp://me:secret@host.org:21/a.png?secret#secret", "got 'ftp://host.org:21/a.png'"),
        pytest.param("ftp://example.org/" + "x" * 500, "x" * 99 + "...'", id="long"),
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
    loopback.add("/there/cat 1.png", BODY)
    loopback.add("/there/hop", b"", redirect="cat 1.png")
    url = loopback.add("/start", b"", redirect=f"{loopback.url}/there/hop")
    assert fetch(url, allow_private=True) == BODY


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
    loopback.add("/0", BODY)
    for hop in range(hops):
        loopback.add(f"/{hop + 1}", b"", redirect=f"/{hop}")
    url = f"{loopback.url}/{hops}"
    if fails:
        assert "more than 5 times" in refusal(SourceError, url, allow_private=True)
    else:
        assert fetch(url, allow_private=True) == BODY
    assert len(loopback.requests) == 6


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.STALL, "no answer within 0.2 s"),
        (Fault.STALL_HALFWAY, "no answer within 0.2 s"),
        (Fault.SHORT_BODY, f"after {len(BODY) // 2} of {len(BODY)} bytes"),
        (Fault.HTML_PAGE, "HTML page"),
        (Fault.UNAVAILABLE, "answered 503"),
    ],
)
def test_failing_servers_give_one_clear_line(
    fault: Fault, words: str, loopback: LoopbackServer
) -> None:
    url = loopback.add("/a.png", BODY)
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


def test_the_limit_holds_at_its_exact_value(loopback: LoopbackServer) -> None:
    url = loopback.add("/a.png", BODY)
    assert fetch(url, max_bytes=len(BODY), allow_private=True) == BODY
    assert "max_bytes" in refusal(InputError, url, max_bytes=len(BODY) - 1, allow_private=True)


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


@pytest.mark.parametrize(
    "headers", [b"Content-Length: 0\r\n\r\n", b"Content-Length: 5\r\n\r\n", b"X"]
)
def test_where_nothing_comes_the_body_is_empty(headers: bytes) -> None:
    def play(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(b"HTTP/1.1 200 OK\r\n" + headers)

    with raw_server(play) as address:
        assert fetch(f"http://{address}/a.png", allow_private=True) == b""


@pytest.mark.parametrize("answer", [b"", b"\x00\xff nonsense\r\n\r\n"])
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
            wire.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)

    with raw_server(play) as address:
        resolve(["127.0.0.1"])
        url = f"https://{host}:{address.rpartition(':')[2]}/a.png"
        if trusted:
            assert fetch(url, allow_private=True) == BODY
        else:
            assert "certificate" in refusal(SourceError, url, allow_private=True)
