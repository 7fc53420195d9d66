"""Write the tables of README.md and of the notebooks from the files in benchmarks/results.

python scripts/make_tables.py           # write them
python scripts/make_tables.py --check   # only say which differ

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. What no file holds is "not
measured".
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from labkit.classify.bench import TARGETS
from labkit.classify.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- table: ([a-z0-9-]+) -->\n.*?<!-- /table -->", re.DOTALL)
NOT_MEASURED = "not measured"
NETWORKS = {
    "seed-resnet18": "ResNet18, ImageNet stem",
    "resnet18": "ResNet18, 3×3 stem",
    "vit-classic": "textbook ViT, 64 tokens",
    "vit": "ViT, 64 tokens from a convolutional stem",
    "vit-long": "ViT, 256 tokens after a convolution",
    "vit-nano": "ViT, 64 tokens, 0.9 M parameters",
    "vit-finetune": "ViT-S/16, pretrained, 224 px",
    "speed": "network of the airbench family",
    "speed-narrow": "the same with half of the channels",
}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of a table: what was measured, how, and where the figure comes from.

    Attributes:
        what: the first cell.
        file: name of the file in benchmarks/results.
        figure: text of the figure, from the content of the file; several cells have a bar between
            them.
        command: the command that writes the file.
    """

    what: str
    file: str
    figure: Callable[[Result], str]
    command: str = ""


def percent(value: float) -> str:
    """A share as a percentage: `81.90 %`."""
    return f"{100 * value:.2f} %"


def span(low: float, high: float, digits: int = 2, factor: float = 1) -> str:
    """Two numbers with a dash between them."""
    return f"{factor * low:.{digits}f}–{factor * high:.{digits}f}"


def extremes(spread: Result, digits: int = 2) -> str:
    """The smallest and the largest value of a spread."""
    return span(spread["min"], spread["max"], digits)


def interval(result: Result, key: str, digits: int = 3) -> str:
    """The figure called `key` and its interval, as two cells."""
    return f"{result[key]:.{digits}f} | {span(*result[f'{key}_ci'], digits)}"


def rounds(seconds: Result) -> str:
    """The extremes of a spread, and of how many rounds."""
    return f"{extremes(seconds)}, {seconds['n']} rounds"


def accuracy(result: Result) -> str:
    """Test accuracy with its interval."""
    bounds = span(*result["test_accuracy_interval"], factor=100)
    return f"{percent(result['test_accuracy'])}, 95 % interval {bounds} % (one run)"


TRAIN_SEED = (
    "`labkit train --preset seed-resnet18 --data FOLDER --out runs/seed`, then "
    "`python benchmarks/training.py runs/seed`"
)
TRAIN_NANO = (
    "`labkit train --preset vit-nano --data FOLDER --out runs/nano`, then "
    "`python benchmarks/training.py runs/nano`"
)
TRAIN_STEP = "`python benchmarks/train_step.py --data FOLDER --steps 20 --rounds 7`"
TIME_TO_SEED = "`python benchmarks/time_to_seed.py --data FOLDER`"
SEED, STEP, NANO = "seed-resnet18.json", "train-step.json", "vit-nano.json"
TIME, RACE = "time-to-seed.json", "vit-race.json"

CLASSIFIER = (
    Row(
        "`seed-resnet18`, 40 epochs, CIFAR-10 (JPEG copy): test accuracy",
        SEED,
        accuracy,
        TRAIN_SEED,
    ),
    Row("the same with flip TTA", SEED, lambda r: percent(r["test_accuracy_tta"]), "as above"),
    Row("the same, last training epoch", SEED, lambda r: percent(r["train_accuracy"]), "as above"),
    Row("`vit-nano`, CIFAR-10 (JPEG copy): test accuracy", NANO, accuracy, TRAIN_NANO),
    Row(
        "training time of `speed-narrow` against 40 epochs of the seed recipe, and its accuracy",
        TIME,
        lambda r: (
            f"{r['ratio']:.3f} times "
            f"({r['speed_seconds'] / r['seed_seconds_mixed']:.3f} of the seed in bf16), "
            f"{percent(r['speed_accuracy'])}"
        ),
        TIME_TO_SEED,
    ),
    Row(
        "`speed` in the time of the seed recipe: test accuracy",
        TIME,
        lambda r: (
            f"{percent(r['accuracy_in_seed_time'])}, "
            f"in {r['long_seconds'] / r['seed_seconds']:.2f} of it"
            if "long_seconds" in r
            else NOT_MEASURED
        ),
        "as above",
    ),
    Row(
        "`vit-nano` at equal time against the ways of ViT-CIFAR and CCT: lead over the better",
        RACE,
        lambda r: f"{100 * r['lead']:.1f} points ({span(*r['lead_ci'], 1, 100)})",
        "`python benchmarks/vit_race.py --data FOLDER`",
    ),
    Row(
        "augmented batches on a CPU, against torchvision's pipeline with 2 workers",
        "loader.json",
        lambda r: (
            f"{r['ratio']:.1f} ({extremes(r['ratio_spread'], 1)}) times the images per second"
        ),
        "`python benchmarks/loader.py`",
    ),
    Row(
        "training loop, share of a bare loop over ready tensors",
        STEP,
        lambda r: f"{r['share_of_bare_loop']:.3f} ({extremes(r['share_spread'], 3)})",
        TRAIN_STEP,
    ),
    Row(
        "training loop, against the seed's DataLoader loop",
        STEP,
        lambda r: (
            f"{r['ratio_to_seed_loop']:.2f} ({extremes(r['ratio_spread'])}) "
            "times the images per second"
        ),
        "as above",
    ),
    Row(
        "peak memory of a `seed-resnet18` run on a CPU",
        STEP,
        lambda r: f"{r['peak_gib']:.2f} GiB",
        "as above",
    ),
)

SCENES = (
    Row(
        "mean IoU of true sentences, those found absent counting 0",
        "",
        lambda r: interval(r, "miou"),
    ),
    Row(
        "CLIPSeg's map alone, at the single threshold ({clipseg_only_threshold}) that is best for "
        "it on these scenes",
        "",
        lambda r: interval(r, "miou_clipseg_only"),
    ),
    Row("gain over that", "", lambda r: interval(r, "miou_gain")),
    Row("mean IoU, presence assumed", "", lambda r: interval(r, "miou_assumed")),
    Row(
        "the same from maps scaled to a peak of 0.013", "", lambda r: interval(r, "miou_peak_0013")
    ),
    Row("presence: AUROC", "", lambda r: interval(r, "presence_auroc", 4)),
    Row("presence: MCC at the default threshold", "", lambda r: interval(r, "presence_mcc")),
    Row(
        "presence: MCC from maps scaled to a peak of 0.013 (all are found absent)",
        "",
        lambda r: f"{r['presence_mcc_peak_0013']} | –",
    ),
    Row(
        "recall of objects at IoU 0.5, sentences that name several",
        "",
        lambda r: interval(r, "instance_recall"),
    ),
)

SPEED = (
    Row(
        "heat maps: 8 sentences against 1, time",
        "",
        lambda r: f"{r['ratio_8_to_1']:.2f} times | {rounds(r['ratio_spread'])}",
    ),
    Row(
        "the same with transformers' own forward pass",
        "",
        lambda r: f"{r['ratio_8_to_1_naive']:.2f} times | {rounds(r['ratio_naive_spread'])}",
    ),
    Row(
        "heat map of one sentence",
        "",
        lambda r: f"{r['seconds_1']:.2f} s | {extremes(r['seconds_spread']['1'])} s",
    ),
    Row(
        "one sentence and {objects_end_to_end} objects in an image of {image}, end to end, "
        "SAM-2 {sam2}",
        "",
        lambda r: (
            f"{r['seconds_end_to_end']:.2f} s | {extremes(r['seconds_spread']['end_to_end'])} s"
        ),
    ),
    Row(
        "runs of SAM-2's encoder for 8 sentences and {objects_for_encoder_calls} objects",
        "",
        lambda r: f"{r['encoder_calls']} | –",
    ),
    Row(
        "peak memory above the weights, 100 objects in 12 megapixels, SAM-2 {sam2}",
        "",
        lambda r: f"{r['peak_gib_100_objects']:.2f} GiB | one run",
    ),
)


class Results:
    """The files in a folder of results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> Result | None:
        """The content of the file `name`; None where it is missing."""
        path = self._folder / name
        if not path.exists():
            return None
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        return result


def draw(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    rows.insert(1, "|" + "---|" * len(head))
    return "\n".join(rows)


def make_classifier(results: Results) -> str:
    """What was measured of the classifier on a CPU."""
    lines = []
    for row in CLASSIFIER:
        result = results.read(row.file)
        figure = NOT_MEASURED if result is None else row.figure(result)
        lines.append((row.what, figure, row.command, f"`{row.file}`"))
    return draw(("what", "figure", "command", "file"), lines)


def make_segment(results: Results, file: str, rows: Sequence[Row], head: Sequence[str]) -> str:
    """What was measured of the segmenter, from one file."""
    result = results.read(file)
    if result is None:
        return draw(head, [(row.what, NOT_MEASURED, "–") for row in rows])
    return draw(head, [(row.what.format(**result), row.figure(result)) for row in rows])


def make_prompt_ablation(results: Results) -> str:
    """What each part of a prompt is worth, on scenes and on photographs."""
    head = ("SAM-2 is told", "scenes: IoU", "recall of objects", "photographs: IoU, by a stand-in")
    result = results.read("prompt-ablation.json")
    if result is None:
        return draw(head, [("the parts of a prompt", NOT_MEASURED, "–", "–")])
    lines = []
    for way, row in result["scenes"].items():
        photographs = interval(result["photographs"][way]["all"], "iou").replace(" | ", " (") + ")"
        scenes = (interval(row, key).replace(" | ", " (") + ")" for key in ("iou", "recall"))
        lines.append((way, *scenes, photographs))
    return draw(head, lines)


def make_presets(results: Results) -> str:
    """The accuracy of every preset, for the notebook."""
    epochs = PRESETS["seed-resnet18"].epochs
    network = NETWORKS["seed-resnet18"]
    source = "the lab's own table"
    lines = [("`seed-resnet18`, by the lab", network, f"{epochs}", "83.87 %", source)]
    for name, config in PRESETS.items():
        if config.data == "scenes":
            continue
        result = results.read(f"{name}.json")
        what, figure, source = f"`{name}`", NOT_MEASURED, ""
        if result is not None:
            what += " on a JPEG copy of CIFAR-10" if "jpeg" in result["data_name"] else ""
            figure, source = (
                percent(result["test_accuracy"]),
                f"`benchmarks/results/{name}.json`",
            )
        lines.append((what, NETWORKS.get(name, config.model), f"{config.epochs}", figure, source))
    return draw(
        ("`preset`", "network", "epochs", "test accuracy", "where the figure comes from"), lines
    )


def make_ablate(results: Results) -> str:
    """The claims of the lab and what became of them."""
    head = ("claim", "measured", "95 % interval", "n", "verdict")
    result = results.read("ablate.json")
    if result is None:
        return draw(head, [("the claims of the lab", NOT_MEASURED, "–", "–", "–")])
    lines = []
    for row in result["claims"]:
        bounds = "–" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"])
        measured = f"{row['mean']:.2f} {row['unit']}"
        lines.append((row["claim"], measured, bounds, str(row["n"]), row["verdict"]))
    return f"{draw(head, lines)}\n\n{result['epochs']} epochs on {result['data_name']}."


def make_peak_share(results: Results) -> str:
    """What share of the machine's peak training reaches."""
    head = ("preset", "share of the peak", "spread", "aim", "what takes most of the time")
    result = results.read("peak-share.json")
    rows = {} if result is None else result["presets"]
    lines = []
    for name in dict.fromkeys([*TARGETS, *rows]):
        row, aim = rows.get(name), f"{TARGETS[name]:.1f}" if name in TARGETS else "–"
        if row is None:
            lines.append((f"`{name}`", NOT_MEASURED, "–", aim, "–"))
            continue
        top = ", ".join(f"`{i['operator']}` {i['percent']:.0f} %" for i in row["profile"][:3])
        spread = rounds(row["share_spread"])
        lines.append((f"`{name}`", f"{row['share']:.2f} ({row['peak']})", spread, aim, top))
    return draw(head, lines)


def make_trust(results: Results) -> str:
    """What `make torture` tried, and how much of it failed."""
    head = ("line", "what was tried", "cases", "failed", "figures", "seconds")
    result = results.read("trust.json")
    if result is None:
        return draw(head, [("13 to 20", "`make torture`", NOT_MEASURED, "–", "–", "–")])
    lines = []
    for row in result["lines"]:
        number, _, _ = row["line"].partition(" ")
        if "not_run" in row["figures"]:
            lines.append((number, row["what"], NOT_MEASURED, "–", "–", "–"))
            continue
        figures = [
            f"{name.replace('_', ' ')}: {_format_figure(value)}"
            for name, value in row["figures"].items()
        ]
        cells = (f"{row['tried']:,}", str(row["failed"]), "; ".join(figures) or "–")
        lines.append((number, row["what"], *cells, f"{row['seconds']:,.0f}"))
    return draw(head, lines)


def _format_figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return f"{len(value)}" if isinstance(value, list) else f"{value}"


def make_gpu(results: Results) -> str:
    """What `make gpu-check` measured; figures of a CPU do not count."""
    head = ("what", "figure", "training time")
    result = results.read("gpu.json")
    if result is None or result["device"].startswith("cpu"):
        names = (
            "the tests marked `gpu`",
            "one epoch of each preset",
            "`speed` and `vit`: accuracy",
        )
        return draw(head, [(name, NOT_MEASURED, "–") for name in names])
    table = draw(head, [_describe_gpu_row(name, row) for name, row in result["rows"].items()])
    return f"{table}\n\nOn a {result['device']}."


def _describe_gpu_row(name: str, row: Result) -> tuple[str, str, str]:
    if row["status"] != "done":
        return name, f"failed: {row['error']}".replace("|", "\\|"), "–"
    if "passed" in row:
        return name, f"{row['passed']} passed", "–"
    seconds = f"{row['train_seconds']:.0f} s"
    if name.startswith("accuracy"):
        return name, accuracy(row), seconds
    return name, f"{row['images_per_second']:,.0f} images/s", seconds


TABLES: Mapping[str, Callable[[Results], str]] = {
    "classifier": make_classifier,
    "segment-scenes": lambda results: make_segment(
        results, "segment-scenes.json", SCENES, ("what", "figure", "interval")
    ),
    "segment-speed": lambda results: make_segment(
        results, "segment-speed.json", SPEED, ("what", "figure", "spread")
    ),
    "prompt-ablation": make_prompt_ablation,
    "presets": make_presets,
    "ablate": make_ablate,
    "peak-share": make_peak_share,
    "gpu": make_gpu,
    "trust": make_trust,
}


def fill(text: str, results: Results) -> str:
    """`text` with every marked table made anew.

    Raises:
        SystemExit: a table has a name that nothing here makes.
    """

    def make(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"no table is called {name!r}; there are: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name](results)}\n<!-- /table -->"

    return MARKED.sub(make, text)


def update(root: Path, *, write: bool = True) -> list[str]:
    """Make the tables of README.md and the notebooks in `root` anew; return which files changed."""
    results, changed = Results(root / "benchmarks" / "results"), []
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if (new := fill(text, results)) != text:
        changed.append(readme.name)
        if write:
            readme.write_text(new, encoding="utf-8")
    for path in (root / "q1.ipynb", root / "q2.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        sources = [cell.source for cell in notebook.cells]
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = fill(cell.source, results)
        if [cell.source for cell in notebook.cells] != sources:
            changed.append(path.name)
            if write:
                nbformat.write(notebook, path)
    return changed


def main() -> None:
    """Write the tables, or with --check say which files would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the repository")
    arguments = parser.parse_args()
    changed = update(arguments.root, write=not arguments.check)
    for name in changed:
        print(f"{name}: {'differs from the results' if arguments.check else 'written'}")
    if changed and arguments.check:
        raise SystemExit("run: make tables")


if __name__ == "__main__":
    main()
