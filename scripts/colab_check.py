"""Stand in for Colab: each notebook alone in an empty folder, in an environment of its versions.

Builds a Python 3.13 environment with the libraries that Colab has preinstalled, at the versions of
constraints.txt; then runs each notebook there in the `demo` profile, its set-up cell fetching
labkit from this repository's last commit. Fails if the set-up cell changed a preinstalled version,
brought a second torch or took 60 seconds, or if anything in the notebook failed or warned.
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
    *("ipykernel", "ipywidgets", "nbclient", "nbformat", "setuptools", "wheel"),
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
whole = sum(s for s in seconds.values() if s > 0)  # text cells start, but are not executed
print(json.dumps({"setup": seconds[setup], "whole": whole}))
"""


def find_interpreter() -> str:
    """A Python 3.13 of this machine: on the path, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = ["python3.13", "python3", *pyenv.glob("versions/3.13*/bin/python")]
    for candidate in candidates:
        command = [candidate, "-c", "import sys; print(*sys.version_info[:2])"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True, text=True).stdout.split() == [
                "3",
                "13",
            ]:
                return str(candidate)
    raise SystemExit("colab-check needs Python 3.13, which Colab has; name one with --python")


def environment(folder: Path, interpreter: str) -> Path:
    """The Python of the environment in `folder`, built where it is missing."""
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


def installed(python: Path) -> dict[str, str]:
    """Versions of all packages of `python`."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(listed)}


def warnings_in(notebook: Path) -> list[str]:
    """Lines of the executed `notebook` that warn.

    What pip says of index locations that this machine's own settings name is not the notebook's.
    """
    found = []
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", []))
            lines = [line for line in text.splitlines() if re.search("warning", line, re.I)]
            found += [line for line in lines if not line.startswith("WARNING: Location ")]
    return found


def check(notebook: Path, python: Path) -> list[str]:
    """Run `notebook` as Colab would; what is wrong with it."""
    before = installed(python)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(notebook, folder))
        run = subprocess.run(
            [python, "-c", RUNNER, copy],
            cwd=folder,
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                "LABKIT_PROFILE": "demo",
                "LABKIT_CACHE": str(Path(folder) / "cache"),
                "LABKIT_SOURCE": f"git+file://{ROOT}",
            },
            capture_output=True,
            text=True,
        )
        problems = [f"warning: {line}" for line in warnings_in(copy)]
    if run.returncode:
        return [*problems, run.stderr[-3000:]]
    seconds = json.loads(run.stdout.splitlines()[-1])
    print(f"{notebook.name}: set-up {seconds['setup']:.0f} s, whole {seconds['whole']:.0f} s")
    if seconds["setup"] >= SETUP_SECONDS:
        problems.append(f"the set-up cell took {seconds['setup']:.0f} s")
    after = installed(python)
    problems += [
        f"{name} changed from {version} to {after.get(name)}"
        for name, version in before.items()
        if after.get(name) != version
    ]
    print(f"{notebook.name}: added {', '.join(sorted(after.keys() - before.keys())) or 'nothing'}")
    return problems


def main() -> None:
    """Check every notebook, each in the environment as Colab has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="a Python 3.13 interpreter [default: found]")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-colab")
    arguments = parser.parse_args()
    python = environment(arguments.venv, arguments.python or find_interpreter())
    base = installed(python)
    failed = False
    for notebook in sorted(ROOT.glob("*.ipynb")):
        problems = check(notebook, python)
        failed = failed or bool(problems)
        print("\n".join(problems) or f"{notebook.name}: fine")
        added = sorted(installed(python).keys() - base.keys())
        if added:
            command = [python, "-m", "pip", "uninstall", "--yes", "--quiet", *added]
            subprocess.run(command, check=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
