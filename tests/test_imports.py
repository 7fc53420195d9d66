from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import labkit

PACKAGE = Path(labkit.__file__).parent
ROOT = PACKAGE.parent
CLASSIFY = [
    "config",
    "sources",
    "data",
    "auto_augment",
    "augment",
    "layers",
    "vit",
    "speednet",
    "models",
    "optim",
    "trainer",
    "checkpoint",
    "metrics",
    "evaluate",
    "saliency",
    "run",
    "fit",
    "bench",
    "ablate",
]
SEGMENT = [
    "checkpoints",
    "clipseg",
    "presence",
    "instances",
    "prompts",
    "detectors",
    "sam2",
    "masks",
    "generate",
    "export",
    "figures",
    "results",
    "pipeline",
    "annotations",
    "metrics",
    "bench",
    "examples",
]
ORDER = [
    "labkit.runtime",
    "labkit.rng",
    "labkit.files",
    "labkit.images",
    "labkit.drawing",
    "labkit.scenes",
    "labkit.object_scenes",
    "labkit.viz",
    "labkit.report",
    *(f"labkit.classify.{name}" for name in CLASSIFY),
    *(f"labkit.segment.{name}" for name in SEGMENT),
    "labkit",
    "labkit.notebook",
    "labkit.cli",
    "labkit.__main__",
]
IMPORT_NAMES = {
    "hydra-core": "hydra",
    "jinja2": "jinja2",
    "opencv-python": "cv2",
    "pillow": "PIL",
    "pillow-heif": "pillow_heif",
    "scikit-image": "skimage",
    "tensorboard": "torch.utils.tensorboard",
}
NEEDED_BY_SAM2 = {"iopath"}  # which is installed without its dependencies
DECLARED_APART = {"google"}  # Colab's own: not on the package index


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def walk_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which names types and imports nothing."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from walk_run_time(node)


def imported(path: Path) -> set[str]:
    """Modules that `path` imports, anywhere in it."""
    modules = set()
    for node in walk_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= submodules & set(ORDER) or {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def imported_from_labkit(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] == "labkit"}


def test_there_are_at_most_55_modules() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) <= 55


def test_every_module_has_its_place() -> None:
    modules = {module_name(path) for path in PACKAGE.rglob("*.py")}
    assert modules - {"labkit.classify", "labkit.segment"} == set(ORDER)


def test_classify_and_segment_never_import_each_other() -> None:
    for package, other in (("classify", "segment"), ("segment", "classify")):
        for path in (PACKAGE / package).glob("*.py"):
            assert not [name for name in imported_from_labkit(path) if f".{other}" in name]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    name = module_name(path)
    if name in ("labkit.classify", "labkit.segment"):
        assert not imported_from_labkit(path)
        return
    allowed = ORDER[: ORDER.index(name)]
    assert imported_from_labkit(path) <= set(allowed)


def test_every_dependency_is_imported_and_every_import_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["segment"]]
    declared += [*extras["heic"], *extras["supervision"], *extras["tensorboard"]]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in declared}
    modules = {IMPORT_NAMES.get(name, name) for name in names - NEEDED_BY_SAM2}
    used = set().union(*map(imported, PACKAGE.rglob("*.py")))
    unused = {name for name in modules if not any(f"{m}.".startswith(f"{name}.") for m in used)}
    assert not unused
    third_party = {name.split(".")[0] for name in used} - set(sys.stdlib_module_names) - {"labkit"}
    assert third_party - DECLARED_APART <= {name.split(".")[0] for name in modules}


def test_the_version_is_that_of_the_package() -> None:
    assert labkit.__version__ == importlib.metadata.version("labkit")


def test_the_public_names_are_few_sorted_and_there() -> None:
    names = labkit.__all__
    assert len(names) <= 25
    assert all(hasattr(labkit, name) for name in names)


def test_importing_labkit_loads_no_heavy_library() -> None:
    heavy = ["matplotlib", "timm", "torchvision", "transformers", "sklearn", "pyarrow", "jinja2"]
    heavy += ["PIL", "requests", "huggingface_hub", "scipy", "typer", "sam2", "cv2", "pooch"]
    # Whatever torch itself loads is not labkit's doing.
    code = (
        "import sys, torch; before = set(sys.modules); from labkit import *;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_loaded_when_it_is_used_and_listed_before() -> None:
    names = subprocess.run(
        [sys.executable, "-c", "import labkit, sys; print(dir(labkit), 'torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(repr(name) in names for name in labkit.__all__) and names.endswith("False\n")
    assert set(labkit._MODULES) == set(labkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = labkit.fitt


def test_help_needs_no_torch_and_comes_at_once() -> None:
    code = (
        "import contextlib, sys, time; sys.argv = ['labkit', '--help'];"
        "from labkit.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print('torch' in sys.modules, time.process_time())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    last_lines = [run.stdout.splitlines()[-1].split() for run in runs]
    assert {loaded for loaded, _ in last_lines} == {"False"}
    assert min(float(seconds) for _, seconds in last_lines) < 0.7
    assert all("segment" in run.stdout for run in runs)


def test_importing_labkit_costs_at_most_half_a_second_beyond_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); from labkit import *;"
        "print(time.process_time() - start)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(runs) <= 0.5
