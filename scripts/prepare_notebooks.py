"""Write into the notebooks what they carry, and the address of the repository into all places.

python scripts/prepare_notebooks.py                     # the text of find_labkit.py
python scripts/prepare_notebooks.py --repo owner/name   # and badges, links and metadata
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("q1.ipynb", "q2.ipynb")
CARRIED = "FIND_LABKIT = "
BADGE = re.compile(r"<!-- colab badge of (q[12]\.ipynb) -->.*")
URLS = re.compile(r"\[project\.urls\]\n(.*\n)*?\n")


def carry_setup(root: Path) -> None:
    """Copy the text of find_labkit.py into the set-up cell of each notebook."""
    text = (ROOT / "scripts" / "find_labkit.py").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        notebook = nbformat.read(root / name, as_version=4)
        for cell in notebook.cells:
            lines = cell.source.split("\n")
            if "setup" in cell.metadata.get("tags", []):
                lines = [
                    f"{CARRIED}{text!r}" if line.startswith(CARRIED) else line for line in lines
                ]
            cell.source = "\n".join(lines)
        nbformat.write(notebook, root / name)


def write_address(root: Path, repository: str) -> None:
    """Write the badges of README and notebooks and the address in pyproject.toml.

    Args:
        root: folder of the repository.
        repository: "owner/name" on GitHub.

    Raises:
        SystemExit: `repository` is not written so.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}", repository):
        raise SystemExit(f"the repository must be owner/name, got {repository!r}")

    def make_badge(match: re.Match[str]) -> str:
        link = f"https://colab.research.google.com/github/{repository}/blob/main/{match[1]}"
        picture = "https://colab.research.google.com/assets/colab-badge.svg"
        return f"<!-- colab badge of {match[1]} -->[![Open in Colab]({picture})]({link})"

    for name in NOTEBOOKS:
        notebook = nbformat.read(root / name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = BADGE.sub(make_badge, cell.source)
        nbformat.write(notebook, root / name)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(BADGE.sub(make_badge, text), encoding="utf-8")
    project = root / "pyproject.toml"
    urls = f'[project.urls]\nRepository = "https://github.com/{repository}"\n\n'
    text = project.read_text(encoding="utf-8")
    project.write_text(URLS.sub(urls, text), encoding="utf-8")


def main() -> None:
    """Prepare the notebooks, and write the address if one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", help="owner/name on GitHub")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the repository")
    arguments = parser.parse_args()
    carry_setup(arguments.root)
    if arguments.repo:
        write_address(arguments.root, arguments.repo)


if __name__ == "__main__":
    main()
