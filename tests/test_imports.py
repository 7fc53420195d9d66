from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import labkit

PACKAGE = Path(labkit.__file__).parent
CLASSIFY = [
    "presets",
    "counter",
    "readers",
    "sources",
    "data",
    "policies",
    "augment",
    "layers",
    "vit",
    "speednet",
    "models",
    "optim",
    "checkpoint",
    "keeper",
    "metrics",
    "inference",
    "run",
    "loop",
    "engine",
]
SEGMENT = [
    "weights",
    "presence",
    "instances",
    "prompts",
    "ground",
    "refine",
    "residue",
    "division",
    "inquiry",
    "metrics",
    "rle",
    "findings",
    "export",
    "figures",
    "segmentation",
    "pipeline",
    "bench",
    "examples",
]
ORDER = [
    "labkit.runtime",
    "labkit.runtime",
    "labkit.files",
    "labkit.images",
    "labkit.drawing",
    "labkit.scenes",
    "labkit.object_scenes",
    "labkit.object_scenes",
    "labkit.viz",
    "labkit.report",
    *(f"labkit.classify.{name}" for name in CLASSIFY),
    *(f"labkit.segment.{name}" for name in SEGMENT),
    "labkit",
    "labkit.cli",
    "labkit.__main__",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Modules of labkit that `path` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] != "labkit":
                continue
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = submodules & set(ORDER)
            found |= known or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("labkit")}
    return found


def test_every_module_has_its_place() -> None:
    modules = {module_name(path) for path in PACKAGE.rglob("*.py")}
    assert modules - {"labkit.classify", "labkit.segment"} == set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    name = module_name(path)
    if name in ("labkit.classify", "labkit.segment"):
        assert not imported(path)
        return
    allowed = ORDER[: ORDER.index(name)]
    assert imported(path) <= set(allowed)


def test_the_public_names_are_few_sorted_and_there() -> None:
    names = labkit.__all__
    assert len(names) <= 25
    assert all(hasattr(labkit, name) for name in names)


def test_importing_labkit_loads_no_heavy_library() -> None:
    heavy = ["matplotlib", "timm", "torchvision", "transformers", "sklearn", "pyarrow", "jinja2"]
    heavy += ["PIL", "requests", "huggingface_hub", "scipy", "typer", "sam2", "cv2"]
    # Whatever torch itself loads is not labkit's doing.
    code = (
        "import sys, torch; before = set(sys.modules); import labkit;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_labkit_costs_at_most_half_a_second_beyond_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); import labkit;"
        "print(time.process_time() - start)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(runs) <= 0.5
