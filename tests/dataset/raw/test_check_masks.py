"""`prepare.py check`: segmentations, of training entries and of REFER's annotations."""

from pathlib import Path
from typing import Any

from tests.dataset.raw.check_damage import Check, edit

CORNER = {"size": [4, 6], "counts": [0, 2, 22]}


def test_check_names_regions_that_do_not_fit(small: Path, check: Check) -> None:
    """Of images of 20 x 10 pixels."""
    regions = [[[[0, 0, 5, 0, 5, 5]]], [CORNER], [[[30, 0, 35, 0, 35, 5]], [[0, 0, 5, 0, 5, 5]]]]

    def add(rows: list[dict[str, Any]]) -> None:
        rows += [{"image": "a.png", "caption": f"{k}", "segmentation": one} for k, one in enumerate(regions)]

    edit("train.json", add)
    status, out = check("some.yaml")
    assert status == 1
    assert "an RLE is not that of its image - 1 found:\n    train.json: entry 4 (a.png) (RLE 6x4," in out
    assert (
        "a segmentation covers no pixel of its image; training passes over it - 1 found:\n    train.json: entry 5"
        in out
    )
    assert "\n\n1 error and 1 warning in 4 files" in out
