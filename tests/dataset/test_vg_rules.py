"""From Visual Genome's annotations to entries: fields of every release, grouping, limits, positions."""

import functools
from collections import Counter
from typing import Any

import pytest

from dataset.expressions import EntryProblem
from dataset.raw import vg_phrases
from dataset.raw.vg_fields import (
    DescribedRegion,
    Image,
    VGObject,
    read_box,
    read_each,
    read_image_id,
    read_object,
    read_region,
    read_texts,
)
from dataset.raw.vg_phrases import Rules

IMAGE = Image("VG_100K/1.jpg", 100, 100, None, None)

# ---- rules


def group(phrases: list[tuple[str, Any]], **rules: Any) -> tuple[list[tuple[str, list[list[int]]]], Counter[str]]:
    counts: Counter[str] = Counter()
    rows = vg_phrases.group_phrases(phrases, IMAGE, Rules(**rules), counts)
    assert all(row["image"] == IMAGE.name for row in rows)
    return [(row["caption"], row["bbox"]) for row in rows], +counts


A, B, C = (0, 0, 10, 10), (20, 0, 40, 10), (0, 50, 50, 100)  # 1%, 2% and 25% of the image


@pytest.mark.parametrize(
    ("how", "grouped"),
    [
        ("cleaned", [("A dog", [[*A], [*B], [*C]])]),
        ("exact", [("A dog", [[*A], [*C]]), ("a dog.", [[*B]])]),
        ("none", [("A dog", [[*A]]), ("a dog.", [[*B]]), ("A dog", [[*C]])]),
    ],
)
def test_grouping(how: str, grouped: list[Any]) -> None:
    assert group([("A dog", A), ("a dog.", B), (" A\tdog ", C)], group=how) == (grouped, {})


@pytest.mark.parametrize(
    ("limits", "kept", "dropped"),
    [
        ({}, ["a", "b", "c"], {}),
        ({"min_area": 0.02}, ["b", "c"], {vg_phrases.SMALL_BOX: 1}),
        ({"min_area": 0.03, "max_area": 0.25}, ["c"], {vg_phrases.SMALL_BOX: 2}),
        ({"max_area": 0.24}, ["a", "b"], {vg_phrases.LARGE_BOX: 1}),
        ({"max_area": 0.01}, ["a"], {vg_phrases.LARGE_BOX: 2}),
    ],
)
def test_area_limits(limits: dict[str, float], kept: list[str], dropped: dict[str, int]) -> None:
    rows, counts = group([("a", A), ("b", B), ("c", C)], **limits)
    assert ([caption for caption, _ in rows], counts) == (kept, dropped)


@pytest.mark.parametrize(
    ("limits", "kept", "dropped"),
    [
        ({}, ["x", "x-y", "x y, z !"], {}),
        ({"min_words": 2}, ["x-y", "x y, z !"], {vg_phrases.FEW_WORDS: 1}),  # a hyphen parts words
        ({"max_words": 2}, ["x", "x-y"], {vg_phrases.MANY_WORDS: 1}),  # punctuation is no word
        ({"min_words": 3, "max_words": 3}, ["x y, z !"], {vg_phrases.FEW_WORDS: 2}),
    ],
)
def test_word_limits(limits: dict[str, int], kept: list[str], dropped: dict[str, int]) -> None:
    rows, counts = group([("x", A), ("x-y", A), ("x y, z !", A)], **limits)
    assert ([caption for caption, _ in rows], counts) == (kept, dropped)


@pytest.mark.parametrize("text", ["", "?!", "\u200b", "\u00ad.", "\u0301", "\ue000"])
def test_phrases_without_content_are_dropped(text: str) -> None:
    assert group([("a", A), (text, A)]) == ([("a", [[*A]])], {vg_phrases.NO_TEXT: 1})


@pytest.mark.parametrize(("limit", "kept"), [(None, 2), (3, 2), (2, 1)])
def test_boxes_per_phrase(limit: int | None, kept: int) -> None:
    rows, counts = group([("a", A), ("b", A), ("a", B), ("a", C), ("a", A)], max_boxes=limit)
    assert rows == [("a", [[*A], [*B], [*C]]), ("b", [[*A]])][2 - kept :]
    assert counts == {vg_phrases.REPEATED: 1, **({} if kept == 2 else {vg_phrases.MANY_BOXES: 3})}


def test_regions_of_another_image() -> None:
    counts: Counter[str] = Counter()
    regions = [DescribedRegion(1, "mine", A), DescribedRegion(2, "yours", B), DescribedRegion(None, "mine too", C)]
    rows = vg_phrases.describe_regions(regions, 1, IMAGE, Rules(), counts)
    assert [row["caption"] for row in rows] == ["mine", "mine too"]
    assert counts[vg_phrases.OTHER_IMAGE] == 1


# ---- positions


def at(x: int, y: int) -> tuple[int, int, int, int]:
    """A box whose centre is there."""
    return (x - 2, y - 2, x + 2, y + 2)


@pytest.mark.parametrize(
    ("centres", "positions"),
    [
        ([(20, 50), (30, 50)], {0: ["left"], 1: ["right"]}),  # the margin exactly
        ([(20, 50), (29, 50)], {}),
        ([(50, 20), (50, 30)], {0: ["top"], 1: ["bottom"]}),
        ([(50, 20), (50, 29)], {}),
        ([(20, 20), (60, 60)], {0: ["left", "top"], 1: ["right", "bottom"]}),
        ([(80, 20), (20, 60)], {0: ["right", "top"], 1: ["left", "bottom"]}),
        ([(20, 50), (50, 50), (80, 50)], {0: ["left"], 1: ["middle"], 2: ["right"]}),
        ([(80, 50), (20, 50), (50, 50)], {0: ["right"], 1: ["left"], 2: ["middle"]}),
        ([(50, 80), (50, 20), (50, 50)], {0: ["bottom"], 1: ["top"], 2: ["middle"]}),
        ([(20, 50), (22, 50), (80, 50)], {2: ["right"]}),  # two at the left, as one annotated twice
        ([(20, 50), (22, 50), (50, 50), (80, 50), (82, 50)], {2: ["middle"]}),
        ([(20, 50), (40, 50), (60, 50), (80, 50)], {0: ["left"], 3: ["right"]}),  # two are between others
        ([(20, 50), (29, 50), (80, 50)], {2: ["right"]}),  # too near to the left one to be between
        ([(20, 50), (71, 50), (80, 50)], {0: ["left"]}),
        # One is between left and right, another between top and bottom.
        ([(20, 50), (50, 20), (80, 80)], {0: ["left"], 1: ["top"], 2: ["right", "bottom"]}),
        # The same one is.
        ([(20, 20), (50, 50), (80, 80)], {0: ["left", "top"], 1: ["middle"], 2: ["right", "bottom"]}),
    ],
)
def test_positions(centres: list[tuple[int, int]], positions: dict[int, list[str]]) -> None:
    boxes = [at(x, y) for x, y in centres]
    assert vg_phrases.positions_of(boxes, IMAGE, Rules()) == {boxes[i]: found for i, found in positions.items()}


def test_the_margin_is_of_the_axis() -> None:
    wide = IMAGE._replace(width=300, height=100)
    boxes = [at(20, 20), at(45, 31)]  # 25 of 300 is not enough, 11 of 100 is
    assert vg_phrases.positions_of(boxes, wide, Rules()) == {boxes[0]: ["top"], boxes[1]: ["bottom"]}
    assert len(vg_phrases.positions_of(boxes, wide, Rules(margin=0.08))[boxes[0]]) == 2
    assert vg_phrases.positions_of(boxes, wide, Rules(margin=0.12)) == {}


def test_without_a_margin_one_must_still_be_further() -> None:
    equal = [(0, 40, 20, 60), (5, 40, 15, 60)]  # two boxes around one centre
    assert vg_phrases.positions_of(equal, IMAGE, Rules(margin=0)) == {}
    three = [*equal, (80, 40, 90, 60)]
    assert vg_phrases.positions_of(three, IMAGE, Rules(margin=0)) == {three[2]: ["right"]}


CARS = [VGObject(i, ["car"], ["red"], at(x, 50)) for i, x in enumerate((20, 50, 80))]
NAMELESS = [thing._replace(object_id=None) for thing in CARS]
ALL = ["left red car", "middle red car", "right red car"]
LARGE = VGObject(9, ["car"], ["blue"], (0, 0, 100, 100))
AGAIN = VGObject(11, ["Car"], ["old", "red"], CARS[0].box)  # the first car, annotated twice


@pytest.mark.parametrize(
    ("things", "others", "rules", "words", "dropped"),
    [
        (CARS, [], {}, ALL, {}),
        (CARS, [], {"positions": ("right", "middle")}, ALL[1:], {vg_phrases.NO_POSITION: 1}),
        (CARS, [], {"positions": ("top",)}, [], {vg_phrases.NO_POSITION: 3}),
        (
            CARS[:2],
            [],
            {"spatial_form": "{phrase} on the {position}", "positions": ("left",)},
            ["red car on the left"],
            None,
        ),
        # A large car is no entry under --max-area, but the small ones are still not alone.
        ([CARS[0], CARS[2], LARGE], [], {"max_area": 0.5}, [ALL[0], ALL[2]], {vg_phrases.LARGE_BOX: 1}),
        ([*CARS[:2], AGAIN], [], {}, [ALL[0], ALL[2], "left old Car"], {vg_phrases.REPEATED: 1}),
        # Without ids, others count by their boxes, and are not one another.
        (CARS, NAMELESS, {}, ALL, {}),
        (CARS, [*NAMELESS, VGObject(None, ["car"], [], at(5, 50))], {}, ALL[2:], None),
        (NAMELESS[:2], NAMELESS[2:], {}, ALL[:2], None),
    ],
)
def test_spatial_captions(
    things: list[VGObject], others: list[VGObject], rules: dict[str, Any], words: list[str], dropped: Any
) -> None:
    counts: Counter[str] = Counter()
    rows = vg_phrases.describe_positions(things, others, IMAGE, Rules(**rules), counts)
    assert [row["caption"] for row in rows] == words
    if dropped is not None:
        assert +counts == dropped


# ---- fields


@pytest.mark.parametrize(
    ("row", "box"),
    [
        ({"x": 1, "y": 2, "w": 3, "h": 4}, (1, 2, 4, 6)),
        ({"x": 1, "y": 2, "width": 3, "height": 4}, (1, 2, 4, 6)),
        ({"x": 1.9, "y": 2.9, "w": 1.2, "h": 1.0}, (1, 2, 3, 3)),
        ({"x": -3, "y": 90, "w": 10, "h": 50}, (0, 90, 7, 100)),
        ({"x": 0, "y": 0, "w": 100, "h": 100}, (0, 0, 100, 100)),
        ({"x": 1, "y": 2, "w": 0, "h": 4}, None),
        ({"x": 1, "y": 2, "w": 3, "h": 0}, None),
        ({"x": 9, "y": 9, "w": -3, "h": 4}, None),
        ({"x": 1.2, "y": 2, "w": 0.7, "h": 4}, None),
        ({"x": 100, "y": 2, "w": 3, "h": 4}, None),
        ({"x": -3, "y": 2, "w": 3, "h": 4}, None),
    ],
)
def test_boxes(row: dict[str, Any], box: Any) -> None:
    assert read_box(row, IMAGE) == box


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({}, []),
        ({"t": None}, []),
        ({"t": " Big  dog "}, ["Big dog"]),
        ({"t": ["a", None, "", "?", "A.", "b"]}, ["a", "b"]),
    ],
)
def test_texts(row: dict[str, Any], texts: list[str]) -> None:
    assert read_texts(row, "t") == texts


BOX = {"x": 1, "y": 2, "w": 3, "h": 4}


@pytest.mark.parametrize(
    "row",
    [
        {"object_names": ["clock"], "id": 5, "attributes": ["green"]},  # 1.0
        {"names": ["clock"], "object_id": 5, "synsets": ["clock.n.01"], "attributes": ["green"]},  # 1.2
        {"names": ["clock"], "object_id": 5, "merged_object_ids": [6, 7], "attributes": ["green"]},  # 1.4
        {"name": "clock", "object_id": "5", "attributes": "green"},
        {"names": ["clock"], "name": "clock", "object_names": None, "object_id": 5, "id": "5", "attributes": ["green"]},
    ],
)
def test_objects_of_every_version(row: dict[str, Any]) -> None:
    assert read_object(IMAGE, {**row, **BOX}) == VGObject(5, ["clock"], ["green"], (1, 2, 4, 6))


@pytest.mark.parametrize("key", ["region_id", "id"])
def test_regions_of_every_version(key: str) -> None:
    row = {key: 1382, "phrase": "a clock", "x": 1, "y": 2, "width": 3, "height": 4}
    assert read_region(IMAGE, row) == DescribedRegion(None, "a clock", (1, 2, 4, 6))
    assert read_region(IMAGE, {**row, "image_id": 1}) == DescribedRegion(1, "a clock", (1, 2, 4, 6))


@pytest.mark.parametrize("row", [{"image_id": 5}, {"id": 5}, {"id": "5", "image_id": 5}, {"image_id": None, "id": 5}])
def test_image_ids_of_every_version(row: dict[str, Any]) -> None:
    assert read_image_id(row) == 5


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ({"object_id": 5, "id": 6, "names": ["a"]}, "keys 'object_id' and 'id' mean the same but differ", "5 and 6"),
        ({"names": ["a"], "object_names": ["b"]}, "keys 'names' and 'object_names' mean", r"\['a'\] and \['b'\]"),
        ({"names": ["a", "b"], "name": "b"}, "keys 'names' and 'name' mean", ""),
        ({"names": ["a"], "width": 4}, "keys 'w' and 'width' mean the same but differ", "3 and 4"),
        ({"names": ["a"], "width": None}, "key 'width' must be a number", "found None"),
    ],
)
def test_two_keys_for_one_thing_must_agree(row: dict[str, Any], kind: str, detail: str) -> None:
    with pytest.raises(EntryProblem, match=f"object 0, {detail}") as problem:
        list(read_each([{**BOX, **row}], "object", functools.partial(read_object, IMAGE)))
    assert problem.value.kind.startswith(kind)
