"""From one image's annotations in Visual Genome to its entries {"image", "caption", "bbox"}: pure functions.

Every candidate, a phrase with its box, ends as a box of an entry or in `counts`, under the rule that dropped it.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dataset.raw.vg_fields import Corners, DescribedRegion, Image, VGObject, clean, one_line
from dataset.raw.vg_files import Row
from dataset.text import has_content

GROUPINGS = ("cleaned", "exact", "none")
POSITIONS = ("left", "right", "top", "bottom", "middle")

# The rules that drop a candidate, as the table at the end names them.
DROPPED = (
    OTHER_IMAGE := "region of another image",
    NO_NAME := "object without a name",
    NO_ATTRIBUTE := "object without an attribute",
    EMPTY_BOX := "box empty or outside the image",
    SAYS_WHERE := "phrase names a position already",
    ALONE := "the only object of its name",
    NO_POSITION := "no position tells it apart",
    NO_TEXT := "no text",
    FEW_WORDS := "fewer words than --min-words",
    MANY_WORDS := "more words than --max-words",
    SMALL_BOX := "box smaller than --min-area",
    LARGE_BOX := "box larger than --max-area",
    REPEATED := "the same phrase and box again",
    MANY_BOXES := "more boxes than --max-boxes",
)


class Rules(NamedTuple):
    """What can be chosen for all three files, as `prepare.py vg --help` says; the defaults keep all that can be used.

    Areas are fractions of the image's, the margin one of its width or height; None sets no limit. The authors' rules
    are not published: these are ours.
    """

    group: str = "cleaned"
    min_area: float = 0.0
    max_area: float = 1.0
    max_boxes: int | None = None
    min_words: int = 1
    max_words: int | None = None
    positions: tuple[str, ...] = POSITIONS
    margin: float = 0.1
    spatial_form: str = "{position} {phrase}"


def describe_regions(
    regions: list[DescribedRegion], image_id: int, image: Image, rules: Rules, counts: Counter[str]
) -> list[Row]:
    own = [(region.phrase, region.box) for region in regions if region.image_id in (None, image_id)]
    counts[OTHER_IMAGE] += len(regions) - len(own)
    return group_phrases(own, image, rules, counts)


def describe_attributes(things: list[VGObject], image: Image, rules: Rules, counts: Counter[str]) -> list[Row]:
    """Entries of "attribute name", each with the boxes of all objects that share both."""
    phrases = ((text, thing.box) for thing, _, text in _attribute_phrases(things, counts))
    return group_phrases(phrases, image, rules, counts)


def describe_positions(
    things: list[VGObject], others: list[VGObject], image: Image, rules: Rules, counts: Counter[str]
) -> list[Row]:
    """Entries of "position attribute name", for objects whose position tells them from all others of their name.

    Args:
        others: objects of objects.json, which count as others of their name; those that `things` holds are skipped.
    """
    known = {thing.object_id for thing in things} - {None}
    by_name: dict[str, dict[Corners, None]] = {}  # distinct boxes: an object annotated twice is one
    for thing in (*things, *(other for other in others if other.object_id not in known)):
        if thing.box is not None:
            for name in thing.names:
                by_name.setdefault(clean(name), {})[thing.box] = None
    places = {name: positions_of(list(boxes), image, rules) for name, boxes in by_name.items() if len(boxes) > 1}
    phrases = []
    for thing, name, text in _attribute_phrases(things, counts):
        key = clean(name)
        if thing.box is None:
            counts[EMPTY_BOX] += 1
        elif not set(POSITIONS).isdisjoint(clean(text).split()):
            counts[SAYS_WHERE] += 1
        elif key not in places:
            counts[ALONE] += 1
        elif thing.box not in places[key]:
            counts[NO_POSITION] += 1
        else:
            for position in places[key][thing.box]:
                caption = rules.spatial_form.replace("{phrase}", text).replace("{position}", position)
                phrases.append((caption, thing.box))
    return group_phrases(phrases, image, rules, counts)


def _attribute_phrases(things: Iterable[VGObject], counts: Counter[str]) -> Iterator[tuple[VGObject, str, str]]:
    """Every (object, name, "attribute name")."""
    for thing in things:
        if not thing.names:
            counts[NO_NAME] += 1
        elif not thing.attributes:
            counts[NO_ATTRIBUTE] += 1
        for attribute, name in itertools.product(thing.attributes, thing.names):
            yield thing, name, f"{attribute} {name}"


def positions_of(boxes: Sequence[Corners], image: Image, rules: Rules) -> dict[Corners, list[str]]:
    """The positions, in the order of `POSITIONS`, that each box alone has among these distinct boxes, two or more.

    A box is "left" if its centre is at least `margin` left of all other centres; right, top and bottom alike. It is
    "middle" if others are at least `margin` away on both sides of it, along one axis, and this is true of no other box.
    """
    found: dict[str, Corners] = {}
    between: set[Corners] = set()
    for axis, side, low, high in ((0, image.width, "left", "right"), (1, image.height, "top", "bottom")):
        centres = {box: box[axis] + box[axis + 2] for box in boxes}  # doubled, which keeps them integers
        gap = max(2 * rules.margin * side, 1)
        first, second, *_ = order = sorted(boxes, key=lambda box: centres[box])
        *_, before, last = order
        if centres[second] - centres[first] >= gap:
            found[low] = first
        if centres[last] - centres[before] >= gap:
            found[high] = last
        between |= {box for box in boxes if centres[first] + gap <= centres[box] <= centres[last] - gap}
    if len(between) == 1:
        (found["middle"],) = between
    named = [position for position in POSITIONS if position in found and position in rules.positions]
    return {found[one]: [position for position in named if found[position] == found[one]] for one in named}


def group_phrases(
    phrases: Iterable[tuple[str, Corners | None]], image: Image, rules: Rules, counts: Counter[str]
) -> list[Row]:
    """Entries of an image's phrases, in the order of their first phrase, whose spelling is the caption."""
    grouped: dict[str | int, tuple[str, dict[Corners, None]]] = {}
    for text, box in phrases:
        cleaned, caption = clean(text), one_line(text)
        if box is None or (objection := _objection(cleaned, box, image, rules)):
            counts[EMPTY_BOX if box is None else objection] += 1
            continue
        keys: dict[str, str | int] = {"cleaned": cleaned, "exact": caption, "none": len(grouped)}
        _, boxes = grouped.setdefault(keys[rules.group], (caption, {}))
        counts[REPEATED] += box in boxes
        boxes[box] = None
    rows = []
    for caption, found in grouped.values():
        if rules.max_boxes is not None and len(found) > rules.max_boxes:
            counts[MANY_BOXES] += len(found)
        else:
            rows.append({"image": image.name, "caption": caption, "bbox": [list(box) for box in found]})
    return rows


def _objection(cleaned: str, box: Corners, image: Image, rules: Rules) -> str:
    """The rule that drops a phrase with its box; empty if none does."""
    words, (x1, y1, x2, y2), whole = len(cleaned.split()), box, image.width * image.height
    area = (x2 - x1) * (y2 - y1)
    broken = {
        NO_TEXT: not has_content(cleaned),
        FEW_WORDS: words < rules.min_words,
        MANY_WORDS: rules.max_words is not None and words > rules.max_words,
        SMALL_BOX: area < rules.min_area * whole,
        LARGE_BOX: area > rules.max_area * whole,
    }
    return next((rule for rule, is_broken in broken.items() if is_broken), "")
