"""The README's own example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard.*")
def test_own_network_and_data_are_trained_and_images_classified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = MARKED.findall(README.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    run = names["run"]
    assert run.metrics.accuracy > 0.9  # type: ignore[attr-defined]
    predicted = run.predict(names["test"][0][:4])  # type: ignore[attr-defined, index]
    assert np.array_equal(predicted, names["labels"][200:204].astype(str))  # type: ignore[index, attr-defined]
    assert any((tmp_path / "runs" / "mine" / "logs").iterdir())
