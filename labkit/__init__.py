"""Train a vision classifier well, and segment in an image what a sentence names."""

from labkit.classify.augment import TrainingImages
from labkit.classify.data import ImageData, Split, hold_out, load_data
from labkit.classify.engine import fit
from labkit.classify.metrics import Metrics
from labkit.classify.models import attention_rollout, build_model, model_for
from labkit.classify.presets import PRESETS, AugmentConfig, TrainConfig, get_preset, notebook_config
from labkit.classify.run import Run, evaluate, load_run
from labkit.files import drive_folder
from labkit.runtime import LabkitError, gpu_advice, pick_device
from labkit.scenes import SCENE_CLASSES, classification_scenes

__all__ = [
    "PRESETS",
    "SCENE_CLASSES",
    "AugmentConfig",
    "ImageData",
    "LabkitError",
    "Metrics",
    "Run",
    "Split",
    "TrainConfig",
    "TrainingImages",
    "attention_rollout",
    "build_model",
    "classification_scenes",
    "drive_folder",
    "evaluate",
    "fit",
    "get_preset",
    "gpu_advice",
    "hold_out",
    "load_data",
    "load_run",
    "model_for",
    "notebook_config",
    "pick_device",
]
