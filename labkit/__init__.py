"""Train a vision classifier well, and segment in an image what a sentence names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.classify.config import AugmentConfig, TrainConfig, get_preset, list_presets
    from labkit.classify.data import ImageData, Split, load_data, train_val_split
    from labkit.classify.evaluate import evaluate
    from labkit.classify.fit import fit
    from labkit.classify.metrics import Metrics
    from labkit.classify.models import create_model, list_models
    from labkit.classify.run import Run, compare_runs, load_run
    from labkit.classify.trainer import Callback, TensorBoard
    from labkit.images import load_image
    from labkit.object_scenes import make_object_scene
    from labkit.runtime import LabkitError, pick_device
    from labkit.segment.pipeline import TextSegmenter
    from labkit.segment.results import Segmentation

__version__ = "0.1.0"

__all__ = [
    "AugmentConfig",
    "Callback",
    "ImageData",
    "LabkitError",
    "Metrics",
    "Run",
    "Segmentation",
    "Split",
    "TensorBoard",
    "TextSegmenter",
    "TrainConfig",
    "compare_runs",
    "create_model",
    "evaluate",
    "fit",
    "get_preset",
    "list_models",
    "list_presets",
    "load_data",
    "load_image",
    "load_run",
    "make_object_scene",
    "pick_device",
    "train_val_split",
]

_MODULES = {
    "AugmentConfig": "labkit.classify.config",
    "TrainConfig": "labkit.classify.config",
    "get_preset": "labkit.classify.config",
    "list_presets": "labkit.classify.config",
    "ImageData": "labkit.classify.data",
    "Split": "labkit.classify.data",
    "load_data": "labkit.classify.data",
    "train_val_split": "labkit.classify.data",
    "evaluate": "labkit.classify.evaluate",
    "fit": "labkit.classify.fit",
    "Metrics": "labkit.classify.metrics",
    "create_model": "labkit.classify.models",
    "list_models": "labkit.classify.models",
    "Run": "labkit.classify.run",
    "compare_runs": "labkit.classify.run",
    "load_run": "labkit.classify.run",
    "Callback": "labkit.classify.trainer",
    "TensorBoard": "labkit.classify.trainer",
    "load_image": "labkit.images",
    "make_object_scene": "labkit.object_scenes",
    "LabkitError": "labkit.runtime",
    "pick_device": "labkit.runtime",
    "TextSegmenter": "labkit.segment.pipeline",
    "Segmentation": "labkit.segment.results",
}
"""Where each public name is from: it is loaded when it is first used, and torch with it."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
