"""Segmentations: what pycocotools makes of them, and what is refused before it sees it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from config import PretrainConfig
from dataset.expressions import EntryProblem
from dataset.loader.entries import ENCODER, PackedEntries
from dataset.reading import DataError
from dataset.segmentation import LONGEST_OUTLINE, area, check_segmentation, from_mask, to_mask, to_rle
from dataset.vg import TrainingData, load_entries, packed_entries
from utils import UserError

SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]  # columns 1 to 3, rows 1 and 2, of an image of 6 x 4 pixels (width x height)
SQUARE_MASK = [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
CORNER = {"size": [4, 6], "counts": [0, 2, 22]}  # the first two pixels of the first column
CORNER_TEXT = {"size": [4, 6], "counts": "02f0"}  # 22 = 0b10110: "f" holds 0b10110 and says that more follow


def masks_of(segmentation: Any, height: int = 4, width: int = 6) -> list[list[int]]:
    found = to_mask(to_rle(segmentation, height, width))
    assert found.dtype == bool
    return found.astype(int).tolist()


def test_polygons_run_lengths_and_their_text_by_hand() -> None:
    assert masks_of(SQUARE) == SQUARE_MASK
    corner = [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6, [0] * 6]
    assert masks_of(CORNER) == masks_of(CORNER_TEXT) == masks_of([CORNER_TEXT]) == corner
    both = np.add(SQUARE_MASK, np.array([[0] * 6] * 2 + [[0] * 5 + [1]] * 2)).tolist()
    assert masks_of([*SQUARE, [5, 2, 6, 2, 6, 4, 5, 4]]) == both  # two polygons are one region
    assert masks_of([CORNER, {"size": [4, 6], "counts": [22, 2]}]) == np.add(corner, np.flip(corner)).tolist()
    assert masks_of({**CORNER_TEXT, "id": 1, "iscrowd": 1}) == corner  # of four keys, which pycocotools takes for a box
    assert masks_of([[-3, 1, 4, 1, 4, 3, -3, 3]])[1] == [1, 1, 1, 1, 0, 0]  # what lies outside is cut off
    assert area(to_rle(SQUARE, 4, 6)) == 6
    for more in ({"area": 2, "id": 7}, {"area": 2, "id": 7, "bbox": [0, 0, 1, 2]}):  # keys of one's own are passed over
        assert masks_of(CORNER | more) == masks_of([CORNER | more, CORNER_TEXT | more]) == corner
    assert area(to_rle([[7, 1, 9, 1, 9, 3]], 4, 6)) == 0


def test_it_agrees_with_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = np.kron(rng.random((height, width)) < rng.random(), np.ones((int(rng.integers(1, 4)), 2), bool))
        height, width = mask.shape
        rle = from_mask(mask)
        assert json.loads(json.dumps(rle)) == rle
        columns = np.concatenate([[False], mask.T.ravel(), [False]])
        ends = [0, *np.flatnonzero(columns[1:] != columns[:-1]).tolist(), height * width]
        counts = {"size": [height, width], "counts": np.diff(ends).tolist()}
        polygon = (rng.uniform(-5, 95, 2 * int(rng.integers(3, 9)))).round(2).tolist()
        (expected,) = coco.frPyObjects([polygon], height, width)
        assert (to_mask(to_rle([polygon], height, width)) == coco.decode(expected)).all()
        if mask.any():
            for one in (rle, counts):
                found = to_rle(one, height, width)
                assert (to_mask(found) == mask).all()
                assert area(found) == mask.sum() == coco.area(rle)


NAN, FAR = float("nan"), float(LONGEST_OUTLINE)
POLYGON = "it: a polygon must be finite numbers [x1, y1, x2, y2, ...], of 3 points or more"
REFUSED = [
    ([], "it must be a list of polygons, or an RLE {size, counts}"),
    ("02f0", "it must be a list of polygons"),
    ([1, 2, 3, 4, 5, 6], "it must be a list of polygons"),  # a polygon, not a list of them
    ([*SQUARE, CORNER], "it must be a list of polygons"),
    ([[1, 1, 4, 1, 4, NAN]], POLYGON),
    ([[1, 1, 4, 1, 4, "3"]], POLYGON),
    ([[1, 1, 4, 1, 4, True]], POLYGON),
    ([*SQUARE, [1, 1, 4, 1, 4, 3, 1]], POLYGON),
    ([[1, 1, 4, 1]], POLYGON),  # which pycocotools takes for a box
    ([[]], POLYGON),
    ([[0, 0, FAR, 0, 0, 1]], "it: the polygons lie or reach too far"),
    ([[FAR, FAR + 1] * 3], "it: the polygons lie or reach too far"),
    ([[0, 0, 0.6 * FAR, 0, 0.6 * FAR, 1]], "it: the polygons lie or reach too far"),  # and back to the first point
    ([[0, 0, FAR / 4, 0, 0, 1]] * 3, "it: the polygons lie or reach too far"),
    ({"counts": [0, 2, 22]}, "it: 'size' of an RLE must be"),
    *(({**CORNER, "size": size}, "it: 'size' of an RLE must be") for size in ([24], [4, -6], [4.0, 6], [True, 24], 4)),
    ({**CORNER, "size": [1 << 15, 1 << 15]}, "it: the counts of an RLE do not add up"),
    *(
        ({**CORNER, "counts": counts}, "it: 'counts' of an RLE must be")
        for counts in (None, [0, 2.0, 22], [0, -2, 26], [True, 23], 24, {})
    ),
    *(
        ({**CORNER, "counts": text}, "it: 'counts' of an RLE must be")
        # Not its letters, one that says that more follow, too many letters, a negative run.
        for text in ("0 2", "02f\u00e9", "\ud800", "02f", "02PPPPPP0", "0O2f0", "02f0\0")
    ),
    ({**CORNER, "counts": [0, 2, 21]}, "it: the counts of an RLE do not add up"),
    ({**CORNER, "counts": [2**70]}, "it: the counts of an RLE do not add up"),
    ({**CORNER, "counts": []}, "it: the counts of an RLE do not add up"),
    ({**CORNER, "counts": "1"}, "it: the counts of an RLE do not add up"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_pycocotools_would_not_survive_is_refused(value: Any, message: str) -> None:
    for read in (check_segmentation, lambda value, what: to_rle(value, 4, 6, what)):
        with pytest.raises(EntryProblem) as refused:
            read(value, "it")
        assert refused.value.kind.startswith(message)


def test_an_rle_of_another_size_is_refused() -> None:
    for one in (CORNER, [CORNER_TEXT]):
        with pytest.raises(EntryProblem, match=r"the size of an RLE is not that of its image.*6x4, image 4x6"):
            to_rle(one, 6, 4)
    with pytest.raises(EntryProblem, match="too many pixels"):
        to_rle(SQUARE, 1 << 15, 1 << 15)


# ---- training


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (6, 4)).save("images/a.png")
    return tmp_path


def data_of(*rows: dict[str, Any], **keys: Any) -> TrainingData:
    Path("train.json").write_text(json.dumps([{"image": "a.png", "caption": "a dog", **row} for row in rows]))
    augment = {"flip_prob": 0, "grayscale_prob": 0, "jitter_prob": 0}
    config = {"train_file": ["train.json"], "image_root": "images", "image_res": 12, "mask_size": 12}
    return TrainingData(PretrainConfig(**{**config, "augment": augment, **keys}), seed=0)


def drawn(data: TrainingData, index: int = 0) -> list[list[list[int]]]:
    """The masks that are drawn in 20 epochs, each once, at the image's own size."""
    found = []
    for data.epoch in range(20):
        sample = data[index]
        assert sample.has_box
        mask = sample.mask[::3, ::2].tolist()
        assert torch.equal(sample.mask, torch.tensor(mask).repeat_interleave(3, 0).repeat_interleave(2, 1))
        if mask not in found:
            found.append(mask)
    return found


@pytest.mark.usefixtures("place")
def test_the_mask_is_a_drawn_region_or_all_of_them() -> None:
    regions = [SQUARE, CORNER_TEXT, [[7, 1, 9, 1, 9, 3]]]  # the third one lies outside of the image
    separate = [masks_of(SQUARE), masks_of(CORNER)]
    data = data_of({"segmentation": regions}, {"bbox": [[1, 1, 4, 3]]}, {"caption": "none"})
    assert sorted(drawn(data)) == sorted(separate)
    assert drawn(data, 1) == [SQUARE_MASK]  # a box still is what it was
    assert not data[2].has_box
    assert data.boxed.tolist() == [True, True, False]
    assert drawn(data_of({"segmentation": regions}, mask_all=True)) == [np.add(*separate).tolist()]
    for empty_box, has_box in (("zero_mask", True), ("no_box", False)):
        data = data_of({"segmentation": regions[2:]}, amc={"empty_box": empty_box})
        with pytest.warns(UserWarning, match=r"entry 0 \(a.png\): no segmentation covers a pixel of the 6x4 image"):
            sample = data[0]
        assert (sample.has_box, int(sample.mask.sum())) == (has_box, 0)


@pytest.mark.usefixtures("place")
def test_an_rle_that_does_not_fit_stops_training() -> None:
    data = data_of({"segmentation": [{"size": [6, 4], "counts": [0, 2, 22]}]}, {"bbox": []})
    data.skip_broken = True  # its image is not what is broken
    with pytest.raises(
        UserError, match=r"^train.json: entry 0 \(a.png\): segmentation: the size of an RLE .*RLE 4x6, image 6x4"
    ):
        data[0]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"segmentation": SQUARE}, "each region of 'segmentation' must be a list of polygons"),  # COCO's one region
        ({"segmentation": CORNER}, "key 'segmentation' must be a list, with a list of polygons or an RLE"),
        ({"segmentation": [SQUARE, [[1, 1, NAN, 2, 3, 3]]]}, "a polygon must be finite numbers"),
        ({"segmentation": [SQUARE], "bbox": [[1, 1, 4, 3]]}, "may have 'bbox' or 'segmentation', not both"),
        ({"segmentations": [SQUARE]}, "unknown key 'segmentations'; did you mean 'segmentation'?"),
        ({"Segmentation": [SQUARE], "bbox": []}, "did you mean 'segmentation'?"),
    ],
)
def test_entries_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^[^\n]*{message}.*train.json: entry 1 \(a.png\)"):
        data_of({"bbox": []}, row)
    data_of({"bbox": [[1, 1, 4, 3]], "segmentations": 1, "segment": 2})  # keys of their own, beside boxes


@pytest.mark.usefixtures("place")
def test_packed_entries_keep_them_and_others_cost_what_they_did() -> None:
    regions = [SQUARE, CORNER, CORNER_TEXT, [[1.5, 1, 4, 1, 4, 2.25]]]
    data = data_of({"segmentation": regions}, {"bbox": [[1, 1, 4, 3]]})
    packed = packed_entries("train.json", data.config, "cache")
    assert list(packed) == list(data.entries) == list(load_entries("train.json", data.config))
    assert packed[0].segmentations == regions
    assert isinstance(packed, PackedEntries)
    assert packed._text(1).decode() == ENCODER.encode(["a.png", ["a dog"], [[1, 1, 4, 3]]])
