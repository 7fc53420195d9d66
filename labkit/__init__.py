"""Train a vision classifier well, and segment in an image what a sentence names."""

from labkit.classify.augment import TrainingImages
from labkit.classify.data import ImageData, Split, hold_out, load_data
from labkit.classify.engine import fit
from labkit.classify.metrics import Metrics
from labkit.classify.models import attention_rollout, build_model
from labkit.classify.presets import PRESETS, AugmentConfig, TrainConfig, get_preset
from labkit.classify.run import Run, evaluate, load_run
from labkit.runtime import InputError, LabkitError, SourceError, TrainingError
from labkit.scenes import SCENE_CLASSES, classification_scenes

__all__ = [
    "PRESETS",
    "SCENE_CLASSES",
    "AugmentConfig",
    "ImageData",
    "InputError",
    "LabkitError",
    "Metrics",
    "Run",
    "SourceError",
    "Split",
    "TrainConfig",
    "TrainingError",
    "TrainingImages",
    "attention_rollout",
    "build_model",
    "classification_scenes",
    "evaluate",
    "fit",
    "get_preset",
    "hold_out",
    "load_data",
    "load_run",
]
