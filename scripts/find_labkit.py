"""Find labkit from a notebook, and install it where it is missing.

A notebook that was opened alone has no other file beside it. So its set-up cell carries this text;
`make notebooks` copies it there, and a test holds both equal. Only the standard library is used.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

COLAB_SESSIONS = "http://172.28.0.12:9000/api/sessions"
# The only file of it on the package index: pip refuses any other.
SAM2 = "sam2==1.1.0 --hash=sha256:7e0ea252d43c10d853e3acfce0b5770ac683c30481bd6de311300e9d44f45b74"
SECONDS = 2.0  # that a list of sessions may take to answer
NAME = r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}"
REF = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|[./](?![./])){0,100}"
OPENED_FROM = re.compile(rf"fileId=https://github\.com/({NAME})/blob/({REF})/q[12]\.ipynb")
NOT_FOUND = (
    "labkit was not found: write the repository that you took this notebook from into the field "
    "`repository`, as owner/name, or upload the folder of labkit beside the notebook"
)


def install_labkit(repository="", extras=(), needs=()):
    """Make labkit importable, and say where it came from.

    Args:
        repository: "owner/name" on GitHub, or an address; either may end in "@" and a ref.
        extras: extras of labkit to install with it, such as "segment".
        needs: modules without which an installed labkit is not enough.

    Raises:
        SystemExit: labkit was not found, or `repository` names no repository.
    """
    options = f"[{','.join(extras)}]" if extras else ""
    checkout = find_checkout(Path.cwd())
    spec = importlib.util.find_spec("labkit")
    if spec and spec.origin:  # a mere folder of that name, such as a checkout, has no origin
        print(f"labkit is installed, in {Path(spec.origin).parent}")
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        sources = list_requirements(extras) if missing else []
    elif checkout:
        print(f"labkit comes from the checkout {checkout}")
        sources = [f"{checkout}{options}"]
    else:
        address, ref = (
            parse_repository(repository)
            if repository.strip()
            else find_opened_from(list_sessions())
        )
        print(f"labkit comes from {address}" + (f" at {ref}" if ref else ""))
        sources = [f"labkit{options} @ git+{address}" + (f"@{ref}" if ref else "")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore"]
    if sources:
        subprocess.run([*pip, *sources], check=True)
    if "sam2" in needs and importlib.util.find_spec("sam2") is None:
        # Built against the torch that is here, without CUDA kernels, which labkit does not need.
        environment = {**os.environ, "SAM2_BUILD_CUDA": "0"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "requirements.txt")  # pip takes hashes from a file alone
            path.write_text(SAM2)
            options = ["--no-build-isolation", "--no-deps", "--require-hashes", "-r", str(path)]
            subprocess.run([*pip, *options], check=True, env=environment)
    importlib.invalidate_caches()


def find_checkout(folder):
    """The nearest folder, from `folder` upwards, that holds labkit's code, or one named labkit."""
    for parent in (folder, *folder.parents):
        for candidate in (parent, parent / "labkit"):
            code = candidate / "labkit" / "__init__.py"
            if code.is_file() and (candidate / "pyproject.toml").is_file():
                return candidate
    return None


def parse_repository(text):
    """Split "owner/name@ref", or an address with "@ref", into an address and a ref, "" for none."""
    address, _, ref = text.strip().partition("@")
    name = address.removeprefix("https://github.com/").removesuffix("/").removesuffix(".git")
    if re.fullmatch(NAME, name):
        address = f"https://github.com/{name}"
    elif not re.fullmatch(r"(https://[A-Za-z0-9.-]+|file://)(/[A-Za-z0-9._-]+)+", address):
        raise SystemExit(f"repository must be owner/name or an https address, got {text!r}")
    if ref and not re.fullmatch(REF, ref):
        raise SystemExit(f"the ref after @ must be a branch, tag or commit, got {ref!r}")
    return address, ref


def list_sessions():
    """Addresses that may list the sessions of this runtime: Jupyter's servers, then Colab's own."""
    addresses = []
    with contextlib.suppress(Exception):  # jupyter_server may be missing
        from jupyter_server.serverapp import list_running_servers

        for server in list_running_servers():
            query = urllib.parse.urlencode({"token": server.get("token", "")})
            addresses.append(f"{server['url']}api/sessions?{query}")
    return [*addresses, COLAB_SESSIONS]


def find_opened_from(sessions):
    """The address and ref of the GitHub repository that this notebook was opened from.

    Args:
        sessions: addresses that list sessions as Jupyter does; the first that names one repository
            counts. Colab gives a session the path "fileId=" and the quoted address of its notebook.

    Raises:
        SystemExit: none of them does.
    """
    for address in sessions:
        found = set()
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(address, timeout=SECONDS) as response:
                listed = json.loads(response.read(1_000_000))
            for session in listed if isinstance(listed, list) else []:
                path = session.get("path") if isinstance(session, dict) else None
                match = OPENED_FROM.fullmatch(urllib.parse.unquote(str(path)))
                if match:
                    found.add((f"https://github.com/{match[1]}", match[2]))
        if len(found) == 1:
            return found.pop()
    raise SystemExit(NOT_FOUND)


def list_requirements(extras):
    """What the installed labkit needs for its `extras`."""
    requirements = importlib.metadata.requires("labkit") or []
    return [
        requirement.partition(";")[0].strip()
        for requirement in requirements
        if any(f"extra == '{extra}'" in requirement.replace('"', "'") for extra in extras)
    ]
