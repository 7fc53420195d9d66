from __future__ import annotations

import numpy as np
import pytest

from labkit.runtime import InputError
from labkit.segment.results import Segmentation
from tests.segment.conftest import SHAPE, rectangle


def test_masks_and_boxes_are_arrays_of_all_objects(
    segmentation: Segmentation, empty_segmentation: Segmentation
) -> None:
    assert segmentation.masks.shape == (3, *SHAPE) and segmentation.masks.dtype == bool
    assert segmentation.boxes.tolist() == [[2, 3, 12, 9], [40, 20, 50, 30], [0, 0, 1, 1]]
    masks, boxes = empty_segmentation.masks, empty_segmentation.boxes
    assert masks.shape == (0, *SHAPE) and masks.dtype == bool
    assert boxes.shape == (0, 4) and boxes.dtype == np.int64


def test_mask_of_a_sentence_is_all_that_it_names(segmentation: Segmentation) -> None:
    both = rectangle(2, 3, 12, 9) | rectangle(40, 20, 50, 30)
    assert np.array_equal(segmentation["cat"].mask, both)
    assert np.array_equal(segmentation["  cat "].mask, both)
    assert segmentation["Cat."] is segmentation["CAT"] is segmentation["cat"]
    assert not segmentation["horse"].mask.any()
    assert segmentation["dog"].present and not segmentation["horse"].present
    with pytest.raises(InputError, match=r"'cow' was not asked for; .*: 'cat', 'horse', 'dog'"):
        segmentation["cow"]


def test_segmentation_is_a_sequence_of_its_objects(
    segmentation: Segmentation, empty_segmentation: Segmentation
) -> None:
    assert (
        len(segmentation) == 3 and len(empty_segmentation) == 0 and list(empty_segmentation) == []
    )
    assert [segmented.sentence for segmented in segmentation] == ["cat", "cat", "dog"]
    assert segmentation[0] is segmentation.objects[0] and segmentation[-1].sentence == "dog"
    assert segmentation["cat"].objects == segmentation.objects[:2]
    with pytest.raises(IndexError):
        segmentation[3]


def test_masks_are_decoded_once(segmentation: Segmentation) -> None:
    assert segmentation.masks is segmentation.masks
