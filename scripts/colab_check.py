"""Run each notebook as Colab would: alone in an empty folder, with Colab's library versions.

The script builds a Python 3.13 environment with the libraries that Colab has preinstalled, at the
versions of constraints.txt, or with the newest torch that installs beside them. There it runs each
notebook in the `demo` profile, opened "from" a fork on GitHub: a stand-in of Colab's session list
names the fork, and git takes the last commit of this repository in the place of the fork's. The
script fails if the set-up cell finds labkit elsewhere, changes a preinstalled version or takes 60
seconds, or if a cell fails or warns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREINSTALLED = [
    *("torch", "torchvision", "timm", "transformers", "numpy", "opencv-python", "pillow"),
    *("huggingface_hub", "safetensors", "pyarrow", "matplotlib", "pycocotools", "scikit-image"),
    *("ipykernel", "ipywidgets", "jupyter_server", "nbclient", "nbformat", "pooch"),
    *("setuptools", "wheel"),
]
FORK = "https://github.com/owner/name"
SETUP_SECONDS = 60

RUNNER = """
import json, sys, time
import nbformat
from nbclient import NotebookClient

path, seconds = sys.argv[1], {}
notebook = nbformat.read(path, as_version=4)
client = NotebookClient(
    notebook,
    timeout=1800,
    kernel_name="python3",
    on_cell_start=lambda cell, cell_index: seconds.update({cell_index: -time.perf_counter()}),
    on_cell_executed=lambda cell, cell_index, execute_reply: seconds.update(
        {cell_index: seconds[cell_index] + time.perf_counter()}
    ),
)
try:
    client.execute()
finally:
    nbformat.write(notebook, path)
setup = next(
    i for i, cell in enumerate(notebook.cells) if "setup" in cell.metadata.get("tags", [])
)
total = sum(s for s in seconds.values() if s > 0)  # text cells start, but are not executed
print(json.dumps({"setup": seconds[setup], "total": total}))
"""


def find_interpreter() -> str:
    """Find a Python 3.13 on the path or among pyenv's.

    Raises:
        SystemExit: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = ["python3.13", "python3", *pyenv.glob("versions/3.13*/bin/python")]
    for candidate in candidates:
        command = [candidate, "-c", "import sys; print(*sys.version_info[:2])"]
        with contextlib.suppress(OSError):
            version = subprocess.run(command, capture_output=True, text=True).stdout
            if version.strip() == "3 13":
                return str(candidate)
    raise SystemExit("colab-check needs Python 3.13, which Colab has; name one with --python")


def build_environment(folder: Path, interpreter: str, newest_torch: bool) -> Path:
    """Return the Python of the environment in `folder`, built or brought up to date.

    Args:
        folder: where the environment is, or will be.
        interpreter: a Python 3.13, with which a missing environment is built.
        newest_torch: leave torch and torchvision out of the versions of constraints.txt.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if newest_torch:
        constraints = re.sub(r"(?m)^torch(vision)?==.*$", "", constraints)
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(constraints)
        file.flush()
        subprocess.run([*pip, "--constraint", file.name, *PREINSTALLED], check=True)
    return python


def list_packages(python: Path) -> dict[str, str]:
    """Return the versions of all packages of `python` by their names."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(output)}


class SessionsHandler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, and keeps quiet about it."""

    def log_message(self, format: str, *args: object) -> None:
        """Write no line per request."""


@contextlib.contextmanager
def serve_sessions(folder: Path, opened_from: str) -> Iterator[None]:
    """Play Colab's session list for a notebook that was opened from the address `opened_from`.

    The list is a file in `folder`. Beside it lies a file such as Jupyter's servers leave in
    JUPYTER_RUNTIME_DIR; with `folder` as that, a kernel finds the list as it does in Colab.
    """
    path = f"fileId={urllib.parse.quote(opened_from, safe='')}"
    (folder / "api").mkdir()
    (folder / "api" / "sessions").write_text(json.dumps([{"path": path, "type": "notebook"}]))
    handler = functools.partial(SessionsHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        entry = {"pid": os.getpid(), "url": url, "token": ""}
        (folder / f"jpserver-{os.getpid()}.json").write_text(json.dumps(entry))
        try:
            yield
        finally:
            server.shutdown()


def make_git_settings() -> dict[str, str]:
    """Return variables with which git takes this repository for the fork, and asks no other."""
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": FORK,
        "GIT_ALLOW_PROTOCOL": "file",
    }


def read_outputs(notebook: Path) -> list[str]:
    """Return the lines that the cells of the executed `notebook` printed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [line for output in outputs for line in "".join(output.get("text", [])).splitlines()]


def find_warnings(lines: list[str]) -> list[str]:
    """Return those of the printed `lines` that warn.

    pip's warnings about package indexes come from the settings of this machine; they do not count.
    """
    warnings = [line for line in lines if re.search("warning", line, re.I)]
    return [line for line in warnings if not line.startswith("WARNING: Location ")]


def check(notebook: Path, python: Path) -> list[str]:
    """Run `notebook` as Colab would, and return a line for each problem."""
    before = list_packages(python)
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    opened_from = f"{FORK}/blob/{commit}/{notebook.name}"
    ours = ("PYTHONPATH", "LABKIT_REPOSITORY")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as runtime:
        copy = Path(shutil.copy(notebook, folder))
        with serve_sessions(Path(runtime), opened_from):
            run = subprocess.run(
                [python, "-c", RUNNER, copy],
                cwd=folder,
                env={
                    **{k: v for k, v in os.environ.items() if k not in ours},
                    **make_git_settings(),
                    "JUPYTER_RUNTIME_DIR": runtime,
                    "PIP_NO_CACHE_DIR": "1",  # a new runtime has built nothing before
                    "LABKIT_PROFILE": "demo",
                    "LABKIT_CACHE": str(Path(folder) / "cache"),
                },
                capture_output=True,
                text=True,
            )
        lines = read_outputs(copy)
    problems = [f"warning: {line}" for line in find_warnings(lines)]
    origin = f"labkit comes from {FORK} at {commit}"
    if origin in lines:
        print(f"{notebook.name}: {origin}")
    else:
        found = [line for line in lines if line.startswith("labkit ")]
        problems.append(f"the set-up cell printed {found}, not {origin!r}")
    if run.returncode:
        return [*problems, run.stderr[-3000:]]
    seconds = json.loads(run.stdout.splitlines()[-1])
    print(f"{notebook.name}: set-up {seconds['setup']:.0f} s, total {seconds['total']:.0f} s")
    if seconds["setup"] >= SETUP_SECONDS:
        problems.append(f"the set-up cell took {seconds['setup']:.0f} s")
    after = list_packages(python)
    problems += [
        f"{name} changed from {version} to {after.get(name)}"
        for name, version in before.items()
        if after.get(name) != version
    ]
    print(f"{notebook.name}: added {', '.join(sorted(after.keys() - before.keys())) or 'nothing'}")
    return problems


def main() -> None:
    """Check every notebook, each in an environment with no other packages than Colab's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="a Python 3.13 interpreter [default: search for one]")
    parser.add_argument("--newest-torch", action="store_true", help="not Colab's torch")
    parser.add_argument("--venv", type=Path, help="folder of the environment")
    arguments = parser.parse_args()
    newest = arguments.newest_torch
    venv = arguments.venv or ROOT / (".venv-colab-newest" if newest else ".venv-colab")
    python = build_environment(venv, arguments.python or find_interpreter(), newest)
    left = ["labkit", "sam2"]  # by a check that was killed
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", *left], check=True)
    base = list_packages(python)
    print(f"torch {base['torch']}, torchvision {base['torchvision']}")
    failed = False
    for notebook in sorted(ROOT.glob("*.ipynb")):
        try:
            problems = check(notebook, python)
        finally:  # an interrupted check, too, leaves nothing to the next one
            added = sorted(list_packages(python).keys() - base.keys())
            if added:
                command = [python, "-m", "pip", "uninstall", "--yes", "--quiet", *added]
                subprocess.run(command, check=True)
        failed = failed or bool(problems)
        print("\n".join(problems) or f"{notebook.name}: fine")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
