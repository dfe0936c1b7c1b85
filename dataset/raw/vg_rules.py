"""What can be chosen when Visual Genome becomes training data. The authors' rules are not published: these are ours.

Imports nothing, so that the command line can show the defaults at once.
"""

from typing import NamedTuple

OUTPUTS = {
    "descriptions": "vg_descriptions.json",
    "attributes": "vg_attributes.json",
    "attributes_spatial": "vg_attributes_spatial.json",
}
GROUPINGS = ("cleaned", "exact", "none")
POSITIONS = ("left", "right", "top", "bottom", "middle")


class Rules(NamedTuple):
    """The rules of all three files; the defaults keep everything that the trainer can use.

    Args:
        group: which phrases of an image are one entry with all their boxes. "cleaned": those that are equal after the
            trainer's own cleaning (case, punctuation); "exact": equal but for white space; "none": an entry a phrase.
        min_area, max_area: smallest and largest area of a box, as a fraction of its image's.
        max_boxes: an entry of more boxes than this is left out, as it tells nothing apart; None: no limit.
        min_words, max_words: words that a cleaned caption has; None: no limit (the trainer cuts at its max_words).
        positions: the positions that attributes_spatial may name.
        margin: how far apart two centres must be, as a fraction of the image's width (left, right) or height.
        spatial_form: how a caption is made of {position} and {phrase}.
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
