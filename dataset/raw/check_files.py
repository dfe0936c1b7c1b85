"""Reading every data file that a config names, for `prepare.py check`: a table row a file, going on after problems."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dataset import flickr, matching, own, refer, vg
from dataset.expressions import EntryProblem, first_of
from dataset.raw.check_images import Placed
from dataset.raw.check_report import Report, Row
from dataset.reading import load_json

T = TypeVar("T")
NOT_VISUAL = "0"  # the phrase id that Flickr30k Entities gives to all phrases that nothing in the image stands for


class Stated(NamedTuple):
    """The size (height, width) that an annotation states for an image."""

    row: Row
    where: str
    image: Path
    size: tuple[int, int]


class Gathered:
    """What reading leaves: rows of the report, and the images and boxes to be looked at afterwards.

    Args:
        report: gets the rows.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.images: dict[str, dict[Path, str]] = {}  # image_root -> image -> the first entry that names it
        self.placed: list[Placed] = []
        self.stated: list[Stated] = []
        self.done: dict[Hashable, Any] = {}

    def once(self, read: Callable[..., T], *what: Hashable, config: str) -> T:
        """`read(self, *what, config)`, or what it returned for an earlier config that names the same."""
        key = (read, *what)
        if key not in self.done:
            self.done[key] = read(self, *what, config)
        return self.done[key]

    def name_images(self, image_root: str, named: Iterable[tuple[Path, str]]) -> None:
        """Keep each image with the first entry that names it."""
        first = self.images.setdefault(image_root, {})
        for image, where in named:
            first.setdefault(image, where)

    def json(self, file: str, checked: str, named_by: str) -> tuple[Row, dict[str, Any] | None]:
        """The row of a JSON object and its content, None if it cannot be read."""
        row = self.report.row(file, checked, named_by)
        with row.attempt():
            return row, load_json(file, dict)
        return row, None


def note_repeated(row: Row, entries: Iterable[tuple[Hashable, str]]) -> None:
    """Note entries with the image and the text of an earlier one of the file."""
    first: dict[Hashable, str] = {}
    for key, where in entries:
        earlier = first.setdefault(key, where)
        if earlier is not where:
            kind = "image and text are those of an earlier entry"
            row.warnings.add(where, EntryProblem(kind, f"as {earlier.rpartition(': ')[2]}"))


# ---- training


def training_file(
    gathered: Gathered, file: str, image_root: str, max_words: int, empty_captions: str, config: str
) -> int | None:
    """Read one training file; returns the number of its boxes, None if it cannot be read."""
    row = gathered.report.row(file, "training entries", f"train_file of {config}")
    with row.attempt():
        entries = vg.read_entries(file, image_root, max_words, row.errors, empty_captions)
        row.count = len(entries)
        gathered.name_images(image_root, ((entry.image, entry.source) for entry in entries))
        note_repeated(row, (((entry.image, *entry.captions), entry.source) for entry in entries))
        boxed = [entry for entry in entries if entry.boxes]
        gathered.placed += [Placed(row, entry.source, entry.image, entry.boxes, None, False) for entry in boxed]
        return sum(len(entry.boxes) for entry in boxed)
    return None


# ---- RefCOCO+ and RefCLEF


class ReferFiles(NamedTuple):
    """What the entries of test files refer to; as in `refer.load_expressions`, `folder` being that of the data set."""

    folder: Path
    split_by: str
    image_root: str
    det_file: str | None
    entry_split: bool


def refer_tables(gathered: Gathered, folder: Path, split_by: str, config: str) -> refer.Refer | None:
    """Read refs(SPLIT_BY).p and instances.json, each of them even if the other cannot be read."""
    refs_file, instances_file = refer.refer_files(folder, split_by)
    named_by = f"refcoco_data of {config}"
    refs, tables = None, None
    row = gathered.report.row(str(refs_file), "refs", named_by)
    with row.attempt():
        refs = refer.read_refs(refs_file, row.errors)
        row.count = len(refs)
    row = gathered.report.row(str(instances_file), "annotations", named_by)
    with row.attempt():
        tables = refer.read_instances(instances_file, row.errors)
        row.count = len(tables[0])
    if refs is None or tables is None:
        return None
    return refer.Refer({ref["ref_id"]: ref for ref in refs}, *tables, refs_file, instances_file)


def detections(gathered: Gathered, file: str, config: str) -> dict[str, Any] | None:
    """Read a detector's boxes by image id; None if the file cannot be read."""
    row, found = gathered.json(file, "images with detections", f"det_file of {config}")
    row.count = None if found is None else len(found)
    return found


def test_file(gathered: Gathered, file: str, of: ReferFiles, config: str) -> Counter[str]:
    """Read one test file, and before it what its entries refer to.

    Returns its number of expressions by split; of RefCLEF, whose splits are known by them, its number of images.
    """
    tables = gathered.once(refer_tables, of.folder, of.split_by, config=config)
    found = gathered.once(detections, of.det_file, config=config) if of.det_file else None
    reading = refer.Reading(
        image_root=of.image_root,
        refer=tables,
        det_file=None if found is None else of.det_file,
        detections=found or {},
        entry_split=of.entry_split,
    )
    row = gathered.report.row(file, "expressions", f"test_file of {config}")
    items: list[refer.Item] = []
    with row.attempt():
        items = refer.read_items(file, reading, row.errors)
        row.count = len(items)
        if not items and not row.errors.kinds:
            row.fail("holds no entries")
    gathered.name_images(of.image_root, ((item.entry.image, item.where) for item in items))
    note_repeated(row, (((item.entry.image, item.entry.text), item.where) for item in items))
    usable = [(item.where, item.expression) for item in items if item.expression]
    for where, expression in first_of((item[1].ref_id, item) for item in usable).values():
        gathered.placed.append(Placed(row, where, expression.image, _corners(expression.boxes), None, True))
    for item in first_of((item.entry.image, item) for item in items if item.expression).values():
        if item.stated_size:
            gathered.stated.append(Stated(row, item.where, item.entry.image, item.stated_size))
    if of.entry_split:
        images = {(str(item.entry.split), item.entry.image) for item in items if item.expression}
        return Counter(split for split, _ in images)
    return Counter(expression.split for _, expression in usable)


def _corners(boxes: np.ndarray) -> list[list[float]]:
    """[x, y, w, h] -> [x1, y1, x2, y2]."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]).tolist()


# ---- Flickr30k Entities


def flickr_split(
    gathered: Gathered, ids_file: str, box_file: str, sentences_file: str, image_root: str, config: str
) -> Counter[str]:
    """Read the three files of a split; returns its number of images, by the split's name."""
    name, ids = image_ids(gathered, ids_file, image_root, config)
    box_row, boxes = gathered.json(box_file, "images with boxes", f"phrase_box_file of {config}")
    sentence_row, sentences = gathered.json(sentences_file, "phrases with boxes", f"sentences_file of {config}")
    split = flickr.Split(name, ids, boxes or {}, sentences or {}, box_file, sentences_file)
    found = {}
    if boxes is not None:
        found = flickr.read_boxes(split, box_row.errors)
        box_row.count = len(found)
    for image_id, of in found.items():
        where, image = f"{box_file}: image {image_id}", flickr.image_path(image_root, image_id)
        gathered.stated.append(Stated(box_row, where, image, of.size))
        for phrase_id, of_phrase in of.by_id.items():
            place = f"{where}, phrase id {phrase_id}"
            gathered.placed.append(Placed(box_row, place, image, _corners(of_phrase), of.size, True))
    if sentences is not None:
        phrases = list(flickr.read_phrases(split, found, image_root, 0, sentence_row.errors))
        sentence_row.count = sum(phrase.expression is not None for phrase in phrases)
        note_phrases_without_boxes(sentence_row, phrases, found)
        if found and not sentence_row.count:
            sentence_row.fail("no phrase has boxes; do the files match?")
    return Counter({name: len(ids)} if ids else {})


def image_ids(gathered: Gathered, file: str, image_root: str, config: str) -> tuple[str, list[str]]:
    """Read the ids of a split, each once; returns its name and them, or nothing if the file cannot be read."""
    row = gathered.report.row(file, "image ids", f"image_ids_file of {config}")
    with row.attempt():
        ids = flickr.read_ids(file, row.errors, image_root)
        images = ((flickr.image_path(image_root, image_id), f"{file}: image {image_id}") for image_id in ids)
        gathered.name_images(image_root, images)
        name = flickr.split_of(file, row.notes.append)
        row.checked, row.count = f"image ids ({name})", len(ids)
        return name, ids
    return "", []


def note_phrases_without_boxes(row: Row, phrases: list[flickr.Phrase], boxes: dict[str, flickr.ImageBoxes]) -> None:
    """Note phrases that the box file of their image is silent about."""
    for phrase in phrases:
        of = boxes.get(phrase.image_id)
        if of and phrase.expression is None and phrase.phrase_id not in {*of.boxless, NOT_VISUAL}:
            kind = "the phrase's id has no boxes and is not under 'scene' or 'nobox'; evaluation leaves the phrase out"
            row.warnings.add(phrase.where, EntryProblem(kind, f"phrase_id {phrase.phrase_id}"))


# ---- one's own data


def own_file(gathered: Gathered, file: str, image_root: str, config: str) -> None:
    """Read a file of the benchmark `own`."""
    row = gathered.report.row(file, "expressions", f"test_file of {config}")
    with row.attempt():
        found = own.read_expressions(file, image_root, 0, row.errors)
        row.count = len(found)
        gathered.name_images(image_root, ((one.image, where) for where, one in found))
        note_repeated(row, (((one.image, one.text), where) for where, one in found))
        for where, one in first_of(found).items():
            gathered.placed.append(Placed(row, where, one.image, _corners(one.boxes), None, True))
        if not found and not row.errors.kinds:
            row.fail("holds no entries")


# ---- matching


def pairs(gathered: Gathered, file: str, image_root: str, config: str) -> None:
    """Read a file of image-text pairs."""
    row = gathered.report.row(file, "image-text pairs", f"matching_file of {config}")
    with row.attempt():
        found = matching.read_pairs(file, image_root, row.errors)
        row.count = len(found)
        gathered.name_images(image_root, ((pair.image, where) for pair, where in found))
        note_repeated(row, (((pair.image, pair.text), where) for pair, where in found))
        if not found and not row.errors.kinds:
            row.fail("holds no pairs")
