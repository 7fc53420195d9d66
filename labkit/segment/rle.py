"""Masks as COCO's run lengths, which take a thousandth of the room.

Source of the format: Lin et al., Microsoft COCO, 2014, as pycocotools implements it.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError


class Rle(TypedDict):
    """COCO's compressed run lengths of a mask: `size` is [H, W], `counts` is text."""

    size: list[int]
    counts: str


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """The run lengths of a mask (H, W) bool.

    Raises:
        InputError: `mask` is no such array.
    """
    from pycocotools import mask as coco

    if mask.dtype != bool or mask.ndim != 2:
        raise InputError(f"mask must be bool (H, W), got {mask.dtype} {mask.shape}")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """The mask (H, W) bool of run lengths."""
    from pycocotools import mask as coco

    mask: NDArray[np.bool_] = coco.decode(_in_bytes(rle)).astype(bool)
    return mask


def area_of(rle: Rle) -> int:
    """Pixels of the mask."""
    from pycocotools import mask as coco

    return int(coco.area(_in_bytes(rle)))


def _in_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode()}
