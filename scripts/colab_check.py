"""Run each notebook as Colab would: alone in an empty folder, with Colab's library versions.

The script builds a Python 3.13 environment with the libraries that Colab has preinstalled, at the
versions of constraints.txt. There it runs each notebook in the `demo` profile; the set-up cell
installs labkit from the last commit of this repository. The script fails if the set-up cell
changes a preinstalled version or takes 60 seconds, or if a cell fails or warns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREINSTALLED = [
    *("torch", "torchvision", "timm", "transformers", "numpy", "opencv-python", "pillow"),
    *("huggingface_hub", "safetensors", "pyarrow", "matplotlib", "pycocotools", "scikit-image"),
    *("ipykernel", "ipywidgets", "nbclient", "nbformat", "pooch", "setuptools", "wheel"),
]
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


def build_environment(folder: Path, interpreter: str) -> Path:
    """Return the Python of the environment in `folder`; build it first if it is missing."""
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ROOT / "constraints.txt"
        subprocess.run([*pip, "--constraint", constraints, *PREINSTALLED], check=True)
        ready.touch()
    return python


def list_packages(python: Path) -> dict[str, str]:
    """Return the versions of all packages of `python` by their names."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(output)}


def find_warnings(notebook: Path) -> list[str]:
    """Return the lines of the executed `notebook` that warn.

    pip's warnings about package indexes come from the settings of this machine; they do not count.
    """
    warnings = []
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", []))
            lines = [line for line in text.splitlines() if re.search("warning", line, re.I)]
            warnings += [line for line in lines if not line.startswith("WARNING: Location ")]
    return warnings


def check(notebook: Path, python: Path) -> list[str]:
    """Run `notebook` as Colab would, and return a line for each problem."""
    before = list_packages(python)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(notebook, folder))
        run = subprocess.run(
            [python, "-c", RUNNER, copy],
            cwd=folder,
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                "LABKIT_PROFILE": "demo",
                "LABKIT_CACHE": str(Path(folder) / "cache"),
                "LABKIT_REPOSITORY": f"file://{ROOT}",
            },
            capture_output=True,
            text=True,
        )
        problems = [f"warning: {line}" for line in find_warnings(copy)]
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
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-colab")
    arguments = parser.parse_args()
    python = build_environment(arguments.venv, arguments.python or find_interpreter())
    base = list_packages(python)
    failed = False
    for notebook in sorted(ROOT.glob("*.ipynb")):
        problems = check(notebook, python)
        failed = failed or bool(problems)
        print("\n".join(problems) or f"{notebook.name}: fine")
        added = sorted(list_packages(python).keys() - base.keys())
        if added:
            command = [python, "-m", "pip", "uninstall", "--yes", "--quiet", *added]
            subprocess.run(command, check=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
