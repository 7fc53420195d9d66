from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from labkit.runtime import InputError
from labkit.segment.rle import area_of, decode_mask, encode_mask

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (40, 25), (300, 200)]


def masks(shape: tuple[int, int]) -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(shape[0] + 1000 * shape[1])
    shares = (0.02, 0.5, 0.98)
    noisy = [rng.random(shape) < share for share in shares]
    return [np.zeros(shape, bool), np.ones(shape, bool), *noisy]


@pytest.mark.parametrize("shape", SHAPES)
def test_run_lengths_are_those_of_pycocotools_in_both_directions(shape: tuple[int, int]) -> None:
    for mask in masks(shape):
        rle = encode_mask(mask)
        assert rle["size"] == list(shape)
        in_bytes = {"size": rle["size"], "counts": rle["counts"].encode()}
        assert np.array_equal(coco.decode(in_bytes), mask)
        theirs = coco.encode(np.asfortranarray(mask, np.uint8))
        assert rle["counts"].encode() == theirs["counts"]
        back = decode_mask({"size": list(shape), "counts": theirs["counts"].decode()})
        assert back.dtype == bool and np.array_equal(back, mask)
        assert area_of(rle) == mask.sum() == coco.area(in_bytes)
        assert json.loads(json.dumps(rle)) == rle


@pytest.mark.parametrize("order", ["C", "F"])
def test_layout_in_memory_does_not_matter(order: str) -> None:
    mask = masks((30, 20))[3]
    views = [np.array(mask, order=order), mask[::-1][::-1], np.repeat(mask, 2, axis=1)[:, ::2]]
    assert all(np.array_equal(decode_mask(encode_mask(view)), mask) for view in views)


@pytest.mark.parametrize("mask", [np.ones((3, 3)), np.ones((1, 3, 3), bool), np.ones(3, bool)])
def test_only_a_boolean_mask_of_two_axes_is_encoded(mask: NDArray[np.bool_]) -> None:
    with pytest.raises(InputError, match=r"mask must be bool \(H, W\)"):
        encode_mask(mask)
