from __future__ import annotations

import pytest

from labkit.images import load_image
from labkit.segment.checkpoints import Profile
from labkit.segment.examples import CATS, TRUCK, compare_published
from labkit.segment.pipeline import TextSegmenter
from tests.segment.conftest import noise


def test_models_of_other_weights_differ_from_the_published_figures(tiny_profile: Profile) -> None:
    segmenter = TextSegmenter.from_profile(tiny_profile, device="cpu")
    comparisons = compare_published(segmenter, noise(48, 64), noise(40, 50))
    assert [len(comparison.published) for comparison in comparisons] == [9, 3]
    assert [len(comparison.measured) for comparison in comparisons] == [9, 3]
    assert not any(comparison.agrees for comparison in comparisons)


@pytest.mark.network
def test_published_models_give_the_published_figures() -> None:
    segmenter = TextSegmenter.from_profile("full", sam2="tiny", device="cpu")
    for comparison in compare_published(segmenter, load_image(CATS), load_image(TRUCK)):
        assert comparison.agrees, comparison
