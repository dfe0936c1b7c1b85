"""Visual Genome's region descriptions, for evaluation on a held-out list of images (the benchmark `vg`).

Three kinds of files are read: lists of Visual Genome's image ids, one a line; image_data.json, which says where an
image lies and how large it is; region_descriptions.json. docs/data/visual_genome.md has their fields by version.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from config import GroundingConfig
from dataset.expressions import DataFile, EntryProblem, Expression, Problems, Reading, locate, require
from dataset.flickr import read_ids, split_of
from dataset.raw.vg_fields import Image, read_id, read_image_id, read_image_row, read_number, read_side
from dataset.reading import read_list

MAX_WORDS = 50  # as in training and for Flickr30k


def read_vg(config: GroundingConfig, reading: Reading) -> list[Expression]:
    """Every region of the listed images, in the order of lists, ids and regions; its ref_id is its index in this order.

    An expression is the phrase of a region, and its one box as the file has it. Equal phrases of an image stay apart.
    A list counts as val or test by its name, as Flickr30k's.
    """
    config.require("image_ids_file", "image_data_file", "region_file")
    files = tuple(config.image_ids_file), config.image_data_file, config.region_file
    return reading.once(_read_files, *files, config.image_root)


def _read_files(
    reading: Reading, ids_files: tuple[str, ...], image_data_file: str, region_file: str, image_root: str
) -> list[Expression]:
    lists: list[tuple[DataFile, list[int]]] = []
    for name in ids_files:
        with reading.file(name, f"image ids ({split_of(name)})", "image_ids_file") as file:
            lists.append((file, read_image_ids(name, file.problems)))
            file.count = len(lists[-1][1])
    wanted = {image_id for _, ids in lists for image_id in ids}
    images: dict[int, Image] = {}
    with reading.file(image_data_file, "images", "image_data_file") as image_data:
        for where, image_id, row in _entries(image_data, wanted):
            with image_data.problems.at(where):
                images[image_id] = read_image_row(image_id, row)
        image_data.count = len(images)
    regions: dict[int, list[Expression]] = {}
    with reading.file(region_file, "region descriptions", "region_file") as file:
        for where, image_id, row in _entries(file, images):
            with file.problems.at(where):
                regions[image_id] = _regions(file, where, image_id, images[image_id], row, image_root)
        file.count = sum(map(len, regions.values()))
        if images and not file.count:
            file.fail("holds no region of the listed images; do the files match?")
        for named_by, ids in [] if image_data.failures else lists:
            for image_id in (one for one in ids if one not in regions):
                kind = f"the image id has no entry in {image_data_file if image_id not in images else region_file}"
                named_by.problems.add(f"{named_by.name}: image {image_id}", f"{kind}, or none that can be used")
    listed = ((split_of(file.name), image_id) for file, ids in lists for image_id in ids)
    found = [(split, one) for split, image_id in listed for one in regions.get(image_id, [])]
    return [
        replace(one, ref_id=index, split=split, record={**one.record, "split": split})
        for index, (split, one) in enumerate(found)
    ]


def read_image_ids(path: str, problems: Problems) -> list[int]:
    """The ids of a list, one a line; notes repeated ones and what is none. Raises `DataError` for the file itself."""
    found = []
    for text in read_ids(path, problems):
        if text.isdecimal() and len(text) < 19:
            found.append(int(text))
        else:
            problems.add(path, "the list must hold Visual Genome's image ids, one a line", repr(text)[:60])
    return found


def _entries(file: DataFile, wanted: Collection[int]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The entries of some images, each with where it stands and the image's id; notes entries that are unusable."""
    seen: set[int] = set()
    for index, row in enumerate(read_list(file.name)):
        where = f"{file.name}: entry {index}"
        with file.problems.at(where):
            if not isinstance(row, dict):
                raise EntryProblem("an entry must be an object {key: value}", f"found a {type(row).__name__}")
            image_id = read_image_id(row)
            if image_id in seen:
                raise EntryProblem("the image has an entry already; take one of them out", f"image {image_id}")
            if image_id in wanted:
                seen.add(image_id)
                yield where, image_id, row


def _regions(
    file: DataFile, where: str, image_id: int, image: Image, row: dict[str, Any], image_root: str
) -> list[Expression]:
    """The regions of an image, of no split yet."""
    path, size = locate(image_root, image.name), (image.height, image.width)
    found = []
    for index, region in enumerate(require(row, "regions", list)):
        place = f"{where}, region {index}"
        with file.problems.at(place):
            text = file.clean(place, require(region, "phrase", str, type(None)) or "", MAX_WORDS)
            if (other := read_id(region, "image_id")) not in (None, image_id):
                kind = "the region says that it is of another image; it is left out"
                file.problems.warnings.add(place, kind, f"image {other}, in the entry of {image_id}")
                continue
            box = read_number(region, "x"), read_number(region, "y")
            boxes = np.array([[*box, read_side(region, "w", "width"), read_side(region, "h", "height")]], np.float64)
            file.says(place, path, text=text, boxes=boxes, size=size)
            found.append(Expression(path, text, 0, "", boxes, {"image_path": image.name}, annotated_size=size))
    if found:
        file.says(where, path, size=size)
    return found
