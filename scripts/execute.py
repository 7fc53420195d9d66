"""Execute notebooks in the `demo` profile and keep the executed copies, also after an error."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def execute(source: Path, folder: Path) -> bool:
    """Run the notebook `source` in `folder` and write the executed copy there.

    Returns:
        Whether every cell ran without an error.
    """
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=lambda cell, cell_index: print(
            f"{source.name}: cell {cell_index}", flush=True
        ),
    )
    started = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return False
    finally:
        nbformat.write(notebook, folder / source.name)
    print(f"{folder / source.name}: {time.perf_counter() - started:.0f} s")
    return True


def main() -> None:
    """Execute the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the executed copies")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LABKIT_PROFILE", "demo")
    succeeded = [execute(notebook, arguments.out) for notebook in arguments.notebooks]
    raise SystemExit(0 if all(succeeded) else 1)


if __name__ == "__main__":
    main()
