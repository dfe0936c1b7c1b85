"""Pretrain.py on the scenes' exact masks, in place of their boxes."""

import math
from pathlib import Path

import pytest

from tests.training_runs import step_rows, train

pytestmark = pytest.mark.usefixtures("one_thread")
MAPS = {"loss_cam1", "loss_cam2"}


def test_masks_change_the_losses_on_the_map_and_nothing_else(place: Path, tmp_path: Path) -> None:
    """The entries are the same, in the same order, and so are all draws; packed or not."""
    masks = f"train_file=[{place / 'data' / 'masks' / 'train_phrases.json'}]"
    short = "--max_steps", "2"
    train(place, tmp_path / "boxes", *short)
    train(place, tmp_path / "masks", masks, *short)
    train(place, tmp_path / "packed", masks, *short, "--cache_dir", str(tmp_path / "cache"))
    boxes, found, packed = (step_rows(tmp_path / name) for name in ("boxes", "masks", "packed"))
    assert packed == found
    assert list((tmp_path / "cache").glob("train_phrases.json.*.packed"))
    assert len(found) == 2
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert {key for key in found[0] if found[0][key] != boxes[0][key]} == MAPS
