"""Train a vision classifier well, and segment in an image what a sentence names."""

from labkit.classify.augment import TrainingImages
from labkit.classify.config import PRESETS, AugmentConfig, TrainConfig, get_preset, notebook_config
from labkit.classify.data import ImageData, Split, hold_out, load_data
from labkit.classify.fit import fit
from labkit.classify.metrics import Metrics
from labkit.classify.models import build_model, model_for
from labkit.classify.run import Run, evaluate, load_run
from labkit.files import mount_drive
from labkit.images import load_image
from labkit.object_scenes import make_object_scene
from labkit.runtime import LabkitError, gpu_advice, pick_device
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.results import Segmentation

__all__ = [
    "PRESETS",
    "AugmentConfig",
    "ImageData",
    "LabkitError",
    "Metrics",
    "Run",
    "Segmentation",
    "Split",
    "TextSegmenter",
    "TrainConfig",
    "TrainingImages",
    "build_model",
    "evaluate",
    "fit",
    "get_preset",
    "gpu_advice",
    "hold_out",
    "load_data",
    "load_image",
    "load_run",
    "make_object_scene",
    "model_for",
    "mount_drive",
    "notebook_config",
    "pick_device",
]
