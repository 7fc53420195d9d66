"""The command line: `labkit train | eval | predict | ablate | segment | bench | doctor`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from labkit.segment.pipeline import TextSegmenter
    from labkit.segment.results import Segmentation

T = TypeVar("T")

_logger = logging.getLogger(__name__)

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
TOP, DRAWN = 3, 50  # classes that `predict` shows of an image, and images that it draws

ClipsegOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Your own CLIPSeg: a folder or owner/name of the hub, with @REVISION and "
        "#sha256:DIGEST if you like [default: the profile's].",
    ),
]
Sam2Option = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|SOURCE",
        help="tiny, small, base-plus, large, or your own: a folder, a file or owner/name of the "
        "hub [default: the profile's].",
    ),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help='Into which each sentence is filled, such as "a photo of a {}"; may be repeated '
        "[default: the profile's].",
    ),
]
PresenceOption = Annotated[
    float | None,
    typer.Option(
        help="Presence, 0 to 1, from which a sentence counts as true [default: the profile's]."
    ),
]
BoxOption = Annotated[
    float | None,
    typer.Option(help="Share of its peak, above 0, below 1, at which an object is outlined."),
]
MaskOption = Annotated[
    float | None,
    typer.Option(help="Logit, -10 to 10, above which a pixel is in a mask; higher is smaller."),
]
OverlapOption = Annotated[
    float | None, typer.Option(help="IoU, 0 to 1, from which two masks are of one object.")
]
AreaOption = Annotated[
    float | None, typer.Option(help="Share of the image, 0 to 1, that an object must cover.")
]
ObjectsOption = Annotated[
    int | None, typer.Option(help="Objects of a sentence to keep, the best first.")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a CIFAR-10 classifier well, and segment in an image what a sentence names.",
)

bench = typer.Typer(no_args_is_help=True, help="Measure quality and speed.")
app.add_typer(bench, name="bench")


@app.callback()
def _setup() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command()
def train(
    preset: Annotated[str, typer.Option(help="Name of the recipe.")] = "seed-resnet18",
    data: Annotated[
        str | None,
        typer.Option(help="hub, toronto, cifar100, scenes, or a folder [default: the preset's]."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder [default: runs/PRESET].")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where it stopped; a finished run with more epochs goes on too."
        ),
    ] = False,
    val_size: Annotated[
        int | None,
        typer.Option(
            help="Training images for validation, to choose the best epoch [default: the preset's]."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width in pixels to which images are brought."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay of the weights.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of TrainConfig, such as label_smoothing=0.1, augment.cutmix=1.0"
            " or model_options.depth=6; may be repeated.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    compile_model: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a preset, evaluate it once on the test split, and write a report."""
    from labkit.classify.config import change_settings, get_preset
    from labkit.classify.fit import fit
    from labkit.runtime import World

    options: dict[str, Any] = {
        "data": data,
        "epochs": epochs,
        "val_size": val_size,
        "image_size": image_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    config = get_preset(preset, seed=seed, precision=precision, compile=compile_model, **changes)
    config = change_settings(config, settings or ())
    folder = Path("runs") / preset if out is None else out
    run = fit(config, out=folder, resume=resume, device=device)
    if World.from_environment().is_main_process:
        _print_metrics(run)


def _print_metrics(run: Any) -> None:
    metrics = run.metrics
    low, high = metrics.accuracy_interval
    print(f"data            {run.data.name}" + (f"  [{run.note}]" if run.note else ""))
    print(f"test accuracy   {metrics.accuracy:.2%}  (95 % interval {low:.2%} to {high:.2%})")
    print(f"with TTA        {metrics.accuracy_tta:.2%}")
    if not run.is_on_other_data:
        print(f"report          {run.folder / 'report.html'}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="Other images than it was trained on.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure a finished run again, and write its report anew.

    On other images than it was trained on, nothing is written.
    """
    from labkit.classify.run import load_run

    loaded = load_run(run, data=data, device=device)
    if not loaded.is_on_other_data:
        loaded.report()
    _print_metrics(loaded)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, addresses.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the figure [default: RUN].")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Name what images show: print the three most probable classes of each, and draw them.

    OUT/predictions.png shows what the network saw of the first 50 images. Of several images, one
    that cannot be read does not stop the others.
    """
    import numpy as np

    from labkit import viz
    from labkit.classify.run import load_classifier
    from labkit.files import open_atomic
    from labkit.images import describe
    from labkit.runtime import LabkitError

    sources = _expand_folders(images)
    classifier = load_classifier(run, device=device)
    note = f"  [{classifier.note}]" if classifier.note else ""
    drawn: list[tuple[str, Any, Any]] = []
    failed = 0
    for source in sources:
        name, square = describe(source), _attempt(classifier.load_squares, source, sources)
        if square is None:
            failed += 1
            continue
        (shares,) = classifier.predict_proba(square)
        if len(drawn) < DRAWN:
            drawn.append((name, square[0], shares))
        best = [f"{classifier.classes[i]} {shares[i]:.1%}" for i in (-shares).argsort()[:TOP]]
        print(f"{name}  {'  '.join(best)}{note}")
    if drawn:
        names, squares, probabilities = zip(*drawn, strict=True)
        figure = viz.plot_predictions(
            np.stack(squares),
            probabilities,
            classifier.classes,
            names,
            top=TOP,
            note=classifier.note,
        )
        path = (run if out is None else out) / "predictions.png"
        with open_atomic(path) as file:
            figure.savefig(file, format="png")
        print(path)
    if failed:
        raise LabkitError(f"{failed} of {len(sources)} images failed; see above for why")


@app.command()
def segment(
    context: typer.Context,
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, addresses.")],
    prompt: Annotated[list[str], typer.Option(help="What to look for; may be repeated.")],
    not_: Annotated[
        list[str] | None, typer.Option("--not", help="What is not meant; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for masks, overlays, reports.")] = Path("out"),
    profile: Annotated[str, typer.Option(help="full: published weights; demo: ours.")] = "full",
    clipseg: ClipsegOption = None,
    sam2: Sam2Option = None,
    detector: Annotated[
        str, typer.Option(help="Boxes to join with the heat: none, mm-grounding-dino or owlv2.")
    ] = "none",
    template: TemplateOption = None,
    presence_threshold: PresenceOption = None,
    box_threshold: BoxOption = None,
    mask_threshold: MaskOption = None,
    overlap_threshold: OverlapOption = None,
    minimum_area: AreaOption = None,
    maximum_objects: ObjectsOption = None,
    exclusive: Annotated[
        bool,
        typer.Option("--exclusive", help="No two sentences are true of one place."),
    ] = False,
    assume_present: Annotated[
        bool, typer.Option("--assume-present", help="Do not ask whether it is there at all.")
    ] = False,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="coco, coco-polygons, coco-results, labelme, yolo, geojson, labels, cutouts, "
            "overlay or report; may be repeated [default: coco, and of one image overlay, report].",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Draw overlay.png and report.html of several, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Segment in images what sentences name, or say that it is not there.

    For one image OUT holds masks.json, overlay.png and report.html. For several it holds a folder
    for each, and a masks.json of all of them. Of several, one that cannot be read does not stop the
    others, and the same command goes on after an interruption; torchrun shares them out.
    """
    from labkit.segment.export import check_formats
    from labkit.segment.pipeline import check_sentences
    from labkit.segment.results import DEFAULT_FORMATS

    check_sentences(prompt, not_ or ())
    check_formats(formats or ())
    options = {**_collect_limits(context), "exclusive": exclusive, "assume_present": assume_present}
    sources = _expand_folders(images)
    segmenter = _load_segmenter(profile, clipseg, sam2, template, _pick_own_gpu(device), detector)
    if len(sources) > 1:
        chosen = [*dict.fromkeys(["coco", *(formats or ()), *(REPORT if report else ())])]
        _segment_many(segmenter, sources, (prompt, not_ or ()), options, out=out, formats=chosen)
        return
    found = segmenter(sources[0], prompt, not_ or (), **options)
    chosen = [*formats, *(REPORT if report else ())] if formats else [*DEFAULT_FORMATS]
    found.save(out, formats=chosen)
    _print_found(found, sources[0], print)
    print(f"{_describe(sources[0])}  {out / 'report.html' if 'report' in chosen else out}")


REPORT = ("overlay", "report")
"""The formats that `segment --report` adds; drawing them takes longer than the masks."""


def _describe(source: str) -> str:
    from labkit.images import describe

    return describe(source)


def _pick_own_gpu(device: str) -> str:
    """The device of this process: one of several that torchrun started has a GPU of its own."""
    from labkit.runtime import World, pick_device

    world = World.from_environment()
    if world.size > 1 and pick_device(device).type == "cuda":
        return f"cuda:{world.local_rank}"
    return device


def _print_found(found: Segmentation, source: str, show: Callable[[str], None]) -> None:
    """Show a line for each sentence."""
    note = f"  [{found.note}]" if found.note else ""
    for result in found.sentences:
        count = len(result.objects)
        verdict = f"{count} found" if count else f"not found: {result.reason}"
        hint = f"; rather ask for {result.list_suggestions()}" if result.suggestions else ""
        score = f"(presence {result.presence:.2f})"
        show(f"{_describe(source)}  {result.sentence!r}  {verdict} {score}{hint}{note}")


def _segment_many(
    segmenter: TextSegmenter,
    sources: list[str],
    sentences: tuple[Sequence[str], Sequence[str]],
    options: dict[str, Any],
    *,
    out: Path,
    formats: list[str],
) -> None:
    """Segment several images, those that are not finished, and write a COCO document of all.

    Args:
        segmenter: the models.
        sources: the images; each process of torchrun takes its share.
        sentences: what is wanted, and what is not meant.
        options: further arguments of the segmenter.
        out: for a folder of each image, and masks.json.
        formats: what is written of each image.

    Raises:
        LabkitError: images failed; the others are finished.
    """
    from collections import deque

    from tqdm.auto import tqdm

    from labkit.files import write_json
    from labkit.images import ImageSource
    from labkit.runtime import LabkitError, World, is_interactive
    from labkit.segment.export import (
        get_file_name,
        make_folder_name,
        make_info,
        merge_coco,
        read_saved,
    )
    from labkit.segment.pipeline import Question

    question = Question.check(*sentences, **options)
    info = make_info(segmenter.note, segmenter.models, segmenter.describe_settings(question))
    names = [get_file_name(source) for source in sources]
    folders = [out / make_folder_name(number, name) for number, name in enumerate(names, 1)]

    def read(index: int) -> dict[str, Any] | None:
        if _is_newer(sources[index], folders[index] / "masks.json"):
            return None
        return read_saved(folders[index], names[index], question.sentences, info, formats)

    world = World.from_environment()
    share = range(world.rank, len(sources), world.size)
    queue = deque(index for index in share if read(index) is None)
    if len(queue) < len(share):
        print(f"{len(share) - len(queue)} of {len(share)} images are finished already")
    hidden = not (world.is_main_process and is_interactive())
    failed = 0
    with (
        world.join(segmenter.clipseg.device),
        tqdm(total=len(queue), desc="segmenting", unit="image", disable=hidden) as progress,
    ):

        def skip(_: ImageSource, error: LabkitError) -> None:
            nonlocal failed
            failed += 1
            queue.popleft()
            progress.update()
            progress.write(f"labkit: {error}", file=sys.stderr)

        todo = [sources[index] for index in queue]
        for found in segmenter.stream(todo, *sentences, on_error=skip, **options):
            index = queue.popleft()
            found.save(folders[index], formats=formats)
            _print_found(found, sources[index], progress.write)
            progress.update()
        world.wait()
        if world.is_main_process:
            documents = (read(index) for index in range(len(sources)))
            write_json(out / "masks.json", merge_coco(filter(None, documents)))
            progress.write(str(out / "masks.json"))
    if failed:
        raise LabkitError(f"{failed} of {len(sources)} images failed; see above for why")


def _is_newer(source: str, saved: Path) -> bool:
    """Whether an image file was changed after its masks were saved; an address never is."""
    try:
        return os.stat(source).st_mtime > saved.stat().st_mtime
    except (OSError, ValueError):
        return False


def _attempt(work: Callable[[str], T], source: str, sources: list[str]) -> T | None:
    """What `work` makes of a source; of several, one that fails is a line on stderr, and None."""
    from labkit.runtime import LabkitError

    try:
        return work(source)
    except LabkitError as error:
        if len(sources) == 1:
            raise
        print(f"labkit: {error}", file=sys.stderr)
        return None


LIMITS = (
    *("presence_threshold", "box_threshold", "mask_threshold", "overlap_threshold"),
    *("minimum_area", "maximum_objects"),
)
"""Options of `segment` and `bench segment` that are parameters of `TextSegmenter` too."""


def _collect_limits(context: typer.Context) -> dict[str, Any]:
    """The thresholds and limits that were given to a command; all of them are in their range.

    Raises:
        InputError: one is not.
    """
    from labkit.segment.generate import Thresholds

    values = {name: context.params[name] for name in LIMITS}
    given = {name: value for name, value in values.items() if value is not None}
    Thresholds(**_name_fields(given))
    return given


def _name_fields(limits: dict[str, Any]) -> dict[str, Any]:
    """The limits by the names that the fields of `Thresholds` have."""
    return {name.removesuffix("_threshold"): value for name, value in limits.items()}


def _load_segmenter(
    profile: str,
    clipseg: str | None,
    sam2: str | None,
    templates: list[str] | None,
    device: str,
    detector: str = "none",
) -> TextSegmenter:
    from labkit.segment.clipseg import check_templates
    from labkit.segment.pipeline import TextSegmenter

    if templates:
        check_templates(templates)
    segmenter = TextSegmenter.from_profile(
        profile, clipseg=clipseg, sam2=sam2, detector=detector, device=device
    )
    if templates:
        segmenter.templates = tuple(templates)
    return segmenter


def _expand_folders(sources: list[str]) -> list[str]:
    """Replace each folder among `sources` by the images in it, sorted, and say what is skipped.

    Hidden files are no images, such as the `._` files of macOS.
    """
    from labkit.images import SUFFIXES, describe, list_images
    from labkit.runtime import InputError

    expanded: list[str] = []
    for source in sources:
        if not os.path.isdir(source):  # pathlib's own test raises for a name that is too long
            expanded.append(source)
            continue
        images, others = list_images(Path(source), recursive=False)
        if not images:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{describe(source)} holds no image ({suffixes})")
        if others:
            names = ", ".join(map(describe, others[:5])) + (", ..." if len(others) > 5 else "")
            where = describe(source)
            _logger.warning("%s: skipped %d that are no images: %s", where, len(others), names)
        expanded += map(str, images)
    return expanded


@app.command()
def ablate(
    data: Annotated[str, typer.Option(help="hub, toronto, cifar100, scenes, or a folder.")] = "hub",
    epochs: Annotated[
        int | None, typer.Option(help="Of each run [default: 3 on a CPU, 40 on a GPU].")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many random seeds, from 0.")] = 3,
    claims: Annotated[
        str, typer.Option(help="Names with commas between them [default: all].")
    ] = "",
    width: Annotated[float, typer.Option(help="Factor on the channels; less is faster.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/ablate"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Put the claims of the lab to the test: a row with interval and verdict for each.

    OUT holds ablate.json, a figure of all rows, one of each claim, and the runs. The same command
    goes on after an interruption, and repeats no finished run.
    """
    from labkit.classify.ablate import RESULT, list_claims, make_base, run_ablation
    from labkit.classify.data import load_data
    from labkit.runtime import InputError

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    loaded = load_data(data)
    base = make_base(loaded, epochs=epochs, width=width, device=device)
    known = {claim.name: claim for claim in list_claims(base, device=device)}
    names = [name.strip() for name in claims.split(",")] if claims else list(known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"claims must be of {', '.join(known)}, got {', '.join(unknown)}")
    ablation = run_ablation(
        base,
        [known[name] for name in names],
        seeds=range(seeds),
        data=loaded,
        out=out,
        device=device,
    )
    note = f"  [{loaded.note}]" if loaded.note else ""
    print(f"{loaded.name}, {base.epochs} epochs, {seeds} random seeds{note}")
    for effect in ablation.effects:
        print(effect.describe())
    print(f"table  {out / RESULT}")


@bench.command("segment")
def bench_segment(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="full: published weights; demo: ours.")] = "demo",
    scenes: Annotated[int, typer.Option(help="How many, unless there is --data.")] = 500,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Annotated photographs: a folder of label images, or the JSON of COCO, RefCOCO or "
            "PhraseCut [default: procedural scenes]."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images [default: beside the JSON].")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of RefCOCO, such as val.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many photographs.")] = None,
    crops: Annotated[
        bool, typer.Option("--crops", help="Measure on fixed crops of the photographs as well.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
    clipseg: ClipsegOption = None,
    sam2: Sam2Option = None,
    template: TemplateOption = None,
    presence_threshold: PresenceOption = None,
    box_threshold: BoxOption = None,
    mask_threshold: MaskOption = None,
    overlap_threshold: OverlapOption = None,
    minimum_area: AreaOption = None,
    maximum_objects: ObjectsOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure a segmenter on procedural scenes, or on annotated photographs.

    The scenes were never trained or tuned on.
    """
    import json
    import time

    from labkit.files import write_json
    from labkit.runtime import InputError, describe_device, get_versions
    from labkit.segment.annotations import load_annotations
    from labkit.segment.bench import measure_photos, measure_scenes
    from labkit.segment.generate import Thresholds

    given = _name_fields(_collect_limits(context))
    if data is None and (images or split or limit or crops):
        raise InputError("--images, --split, --limit and --crops need --data")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    photographs = None
    if data is not None:
        photographs = load_annotations(data, images=images, split=split)[:limit]
    segmenter = _load_segmenter(profile, clipseg, sam2, template, device)
    thresholds = Thresholds(**given)
    started = time.perf_counter()
    figures: dict[str, Any] = {"profile": profile}
    if photographs is None:
        figures |= measure_scenes(segmenter, scenes, thresholds=thresholds)
    else:
        figures |= {"data": photographs.name, "weights": segmenter.models, "note": segmenter.note}
        figures["frames"] = measure_photos(segmenter, photographs, thresholds=thresholds)
        if crops:
            figures["crops"] = measure_photos(
                segmenter, photographs, crops=True, thresholds=thresholds
            )
    figures |= {
        "templates": segmenter.templates,
        "thresholds": given,
        "seconds": round(time.perf_counter() - started, 1),
        "device": describe_device(segmenter.clipseg.device),
        "versions": get_versions(),
    }
    print(json.dumps(figures, indent=2))
    if out is not None:
        write_json(out, figures)


@bench.command("train")
def bench_train(
    presets: Annotated[
        str, typer.Option(help="Names with commas between them [default: those with a target].")
    ] = "",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step [default: the preset's; 64 on a CPU].")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps in a stretch.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure what share of this machine's peak the training of each preset reaches.

    The peaks of matrix products and convolutions are measured in the same run.
    """
    from labkit.classify.bench import TARGETS, measure_shares
    from labkit.files import write_json
    from labkit.runtime import pick_device

    if batch_size is None and pick_device(device).type == "cpu":
        batch_size = 64
    names = [name.strip() for name in presets.split(",")] if presets else list(TARGETS)
    result = measure_shares(
        names,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        steps=steps,
        rounds=rounds,
    )
    print(f"matrix products: {result['gemm_flops_per_second'] / 1e9:,.1f} GFLOP/s")
    for name, row in result["presets"].items():
        aim = "" if row["target"] is None else f" (aim {row['target']:.0%})"
        print(
            f"{name}: {row['share']:.0%}{aim} of {row['peak_flops_per_second'] / 1e9:,.1f} GFLOP/s "
            f"({row['peak']}), {row['images_per_second']:,.1f} images/s"
        )
        top = row["profile"][:5]
        print("  " + ", ".join(f"{item['operator']} {item['percent']:.0f} %" for item in top))
    if out is not None:
        write_json(out, result)


@app.command()
def doctor(
    models: Annotated[
        bool, typer.Option("--models", help="Download CLIPSeg and SAM-2 tiny (0.8 GB), and check.")
    ] = False,
) -> None:
    """Show what this machine offers: versions, device, precision, disk and cache.

    With --models, compare the published models with figures that others published of them.
    """
    import shutil

    from labkit.files import get_cache_dir
    from labkit.runtime import describe_device, get_versions, pick_device, resolve_precision

    device = pick_device()
    cache = get_cache_dir()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    for name, version in get_versions().items():
        print(f"{name:<14}{version}")
    print(f"{'device':<14}{describe_device(device)}")
    print(f"{'precision':<14}{resolve_precision('auto', device).name}")
    print(f"{'disk':<14}{shutil.disk_usage(existing).free / 2**30:.1f} GiB free at {existing}")
    print(f"{'cache':<14}{size / 2**20:.0f} MiB in {cache}")
    if models:
        _check_models()


def _check_models() -> None:
    """Print the figures of the published models beside those of others.

    Raises:
        LabkitError: they differ.
    """
    from labkit.images import load_image
    from labkit.runtime import LabkitError
    from labkit.segment.examples import CATS, TRUCK, compare_published
    from labkit.segment.pipeline import TextSegmenter

    segmenter = TextSegmenter.from_profile("full", sam2="tiny")
    comparisons = compare_published(segmenter, load_image(CATS), load_image(TRUCK))
    for comparison in comparisons:
        print(f"{comparison.name}: {'agrees' if comparison.agrees else 'DIFFERS'}")
        print(f"  published {', '.join(map(str, comparison.published))}")
        print(f"  measured  {', '.join(map(str, comparison.measured))}")
    if not all(comparison.agrees for comparison in comparisons):
        raise LabkitError("the published models do not give the published figures here")


@contextlib.contextmanager
def _escape_unencodable() -> Iterator[None]:
    """Let stdout and stderr write an escape for each character that their encoding lacks."""
    streams: list[Any] = [s for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    errors = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, handler in zip(streams, errors, strict=True):
            stream.reconfigure(errors=handler)


def main() -> None:
    """Run the command line; what a user can mend ends in one line, not in a traceback."""
    with _escape_unencodable():
        try:
            app()
        except Exception as error:
            from labkit.runtime import LabkitError  # loads torch, which --help does not need

            if isinstance(error, BrokenPipeError):  # nobody reads what is printed any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(1) from None
            if not isinstance(error, LabkitError | OSError | MemoryError):
                raise
            text = str(error) or "there is not enough memory"
            print(f"labkit: {text}", file=sys.stderr)
            raise SystemExit(1) from None
        except SystemExit as stop:
            if stop.code == INTERRUPTED:  # what typer makes of Ctrl-C
                again = "; the same command goes on"
                hints = {"train": "; add --resume to go on", "ablate": again, "segment": again}
                hint = hints.get(next(iter(sys.argv[1:]), ""), "")
                print(f"labkit: interrupted{hint}", file=sys.stderr)
            raise
