"""Train a vision classifier well, and segment in an image what a sentence names."""

from labkit.classify.config import AugmentConfig, TrainConfig, get_preset, list_presets
from labkit.classify.data import ImageData, Split, load_data, train_val_split
from labkit.classify.evaluate import evaluate
from labkit.classify.fit import fit
from labkit.classify.metrics import Metrics
from labkit.classify.models import create_model, list_models
from labkit.classify.run import Run, load_run
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
