"""Pretrain.py on the scenes' exact masks, in place of their boxes."""

import math
from pathlib import Path

import pytest

from tests.training_runs import LOSSES, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_masks_change_the_losses_on_the_map_and_nothing_else(place: Path, tmp_path: Path) -> None:
    """The entries are the same, in the same order, and so are all draws; packed or not."""
    masks = f"train_file=[{place / 'data' / 'masks' / 'train_phrases.json'}]"
    (boxes,) = train(place, tmp_path / "boxes", "--max_steps", "1")
    (first,) = train(place, tmp_path / "masks", masks, "--max_steps", "1")
    assert {key for key in LOSSES if boxes[key] != first[key]} == {"train_loss_cam1", "train_loss_cam2"}
    (row,) = train(place, tmp_path / "more", masks, "--max_steps", "4")
    (packed,) = train(place, tmp_path / "packed", masks, "--max_steps", "4", "--cache_dir", str(tmp_path / "cache"))
    assert packed == row
    assert list((tmp_path / "cache").glob("train_phrases.json.*.packed"))
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in LOSSES)
