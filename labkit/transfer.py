"""One resumable HTTP transfer to disk; `labkit.files.download` adds retries and the checksum."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from labkit.runtime import InputError, SourceError

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 16


class TransferInterrupted(Exception):
    """A transfer that broke off and is worth another try; its text is the cause."""


def size(path: Path) -> int:
    """Bytes in the file at `path`; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def open_session(url: str) -> requests.Session:
    """A session that speaks https only (redirects too), or also http to a loopback `url`.

    Raises:
        InputError: `url` is neither https nor a loopback address.
    """
    import requests
    from requests.adapters import HTTPAdapter

    parts = urlsplit(url)
    try:
        loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        loopback = parts.hostname == "localhost"
    if parts.scheme != "https" and not (loopback and parts.scheme == "http"):
        raise InputError(f"url must start with https://, got {url!r}")
    session = requests.Session()
    session.adapters.clear()
    session.mount("https://", HTTPAdapter())
    if parts.scheme == "http":
        session.mount(f"http://{parts.netloc}/", HTTPAdapter())
    session.trust_env = not loopback
    return session


def transfer(session: requests.Session, url: str, part: Path, *, timeout: float) -> None:
    """Append to `part` what it lacks of `url`, or all of it if the server cannot resume.

    Args:
        session: From `open_session`.
        url: What to get.
        part: Holds the first bytes of the body, or does not exist.
        timeout: Longest silence of the server in seconds.

    Raises:
        TransferInterrupted: the transfer broke off; `part` holds what came.
        SourceError: another try would end in the same way.
        OSError: `part` could not be written.
    """
    import requests
    import urllib3

    held = size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if not (held and _refuses_to_resume(response, held)):
                _check_answer(response, url)
                _write_body(response, part, held if response.status_code == 206 else 0)
                return
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise TransferInterrupted(f"no answer within {timeout:g} s") from error
    except (requests.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise TransferInterrupted(f"no connection, or it broke off ({_reason(error)})") from error
    except requests.RequestException as error:
        raise SourceError(f"could not download {url}: {error}") from error
    part.unlink()
    transfer(session, url, part, timeout=timeout)


def _reason(error: Exception) -> str:
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))


def _refuses_to_resume(response: requests.Response, held: int) -> bool:
    """Whether a request for the bytes from `held` on was answered by an error or other bytes."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return bool(response.status_code == 416 or (response.status_code == 206 and start != str(held)))


def _check_answer(response: requests.Response, url: str) -> None:
    """Refuse an answer whose body is not the file."""
    status = response.status_code
    if status >= 500 or status in (408, 429):
        raise TransferInterrupted(f"the server answered {status} {response.reason}")
    if status not in (200, 206):
        raise SourceError(f"could not download {url}: the server answered {status}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise SourceError(
            f"could not download {url}: an HTML page came instead of data. "
            "Is there a sign-in page or a proxy between this machine and the network?"
        )


def _write_body(response: requests.Response, part: Path, held: int) -> None:
    """Write the body of `response` to `part` from byte `held` on, and check its length."""
    from tqdm.auto import tqdm

    length = response.raw.length_remaining
    total = None if length is None else held + length
    name = part.name.removesuffix(".part")
    with (
        part.open("ab" if held else "wb") as file,
        tqdm(total=total, initial=held, unit="B", unit_scale=True, desc=name) as progress,
    ):
        try:
            for block in response.raw.stream(CHUNK, decode_content=False):
                file.write(block)
                progress.update(len(block))
        finally:
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size(part) != total:
        raise TransferInterrupted(f"only {size(part):,} of {total:,} bytes came")
