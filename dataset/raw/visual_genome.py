"""Visual Genome (Krishna et al., IJCV 2017) to the three training files of AMC, by the rules of `vg_phrases`.

Annotations are read as streams, in whatever order of images; entries wait in temporary files until they are written in
the order of image ids. In memory are image_data.json, one image's annotations, and where each image's entries wait.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem
from dataset.raw.evaluation_images import EvaluationImages, read_evaluation_images
from dataset.raw.vg_fields import Image, VGObject, read_each, read_image_id, read_image_row, read_object, read_region
from dataset.raw.vg_files import Draft, RawFile, Row, find_sources, stream_items
from dataset.raw.vg_phrases import DROPPED, Rules, describe_attributes, describe_positions, describe_regions
from dataset.reading import DataError
from terminal import aligned
from utils import atomic_path

T = TypeVar("T")

OUTPUTS = {
    "descriptions": "vg_descriptions.json",
    "attributes": "vg_attributes.json",
    "attributes_spatial": "vg_attributes_spatial.json",
}
SOURCES = {"descriptions": "region_descriptions", "attributes": "attributes", "attributes_spatial": "attributes"}
# Of each file: the key of the list that an image's entry holds, what is in it, and how that is read.
LISTS: dict[str, tuple[str, str, Callable[[Image, Row], Any]]] = {
    "region_descriptions": ("regions", "region", read_region),
    "attributes": ("attributes", "object", read_object),
    "objects": ("objects", "object", read_object),
}


class Images(NamedTuple):
    """The images of image_data.json by id, all and those to use; and the ids of the others.

    Args:
        evaluation: left out because they are in a val or test split of --exclude-eval.
        missing: left out because they are not on disk.
        unknown: images that other files have and image_data has not, gathered while those are read.
        found: for each evaluation file, how many of image_data's images are in it.
    """

    all: dict[int, Image]
    used: dict[int, Image]
    evaluation: set[int]
    missing: set[int]
    unknown: set[int]
    found: list[int]


class Prepared(NamedTuple):
    """The images, the files of evaluation splits in the order of `images.found`, and the outputs."""

    images: Images
    evaluation: list[EvaluationImages]
    drafts: dict[str, Draft]


def prepare(
    raw: Sequence[Path],
    out: Path,
    rules: Rules,
    outputs: Sequence[str] = tuple(OUTPUTS),
    exclude: Sequence[Path] = (),
    image_root: Path | None = None,
) -> Prepared:
    """Write `outputs`, keys of `OUTPUTS`, to the folder `out`: all of them or, when something is wrong, none.

    Args:
        raw: folders and files that hold image_data, region_descriptions, attributes and perhaps objects.
        exclude: files of evaluation splits, whose images are left out.
        image_root: leave out images that are not under this folder; None: do not look.

    Raises:
        DataError: a file is missing or cannot be used, or `out` not written; the message names file, entry and key.
    """
    sources = find_sources(raw)
    for kind in ("image_data", *(SOURCES[name] for name in outputs)):
        if kind not in sources:
            where = ", ".join(map(str, raw))
            raise DataError(f"{where}: neither {kind}.json nor {kind}.json.zip is there; download it, or see --only")
    evaluation = [read_evaluation_images(path) for path in exclude]
    images = read_images(sources["image_data"], evaluation, image_root)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            names = [*(name for name in OUTPUTS if name in outputs), "objects"]
            drafts = {name: Draft(stack.enter_context(TemporaryFile(dir=out))) for name in names}
            _fill(drafts, sources, images, rules)
            del drafts["objects"]
            for name, draft in drafts.items():
                draft.write(stack.enter_context(atomic_path(out / OUTPUTS[name])))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); is there room, and are you allowed to?") from error
    return Prepared(images, evaluation, drafts)


def _fill(drafts: Mapping[str, Draft], sources: dict[str, RawFile], images: Images, rules: Rules) -> None:
    """Read the annotations into the drafts of the outputs; those of objects.json wait in the draft "objects"."""
    descriptions, attributes, spatial = (drafts.get(name) for name in OUTPUTS)
    objects = drafts["objects"]
    if descriptions:
        for image_id, image, regions in read_per_image(sources, "region_descriptions", images):
            descriptions.add(image_id, describe_regions(regions, image_id, image, rules, descriptions.dropped))
    if spatial and "objects" in sources:
        for image_id, _, things in read_per_image(sources, "objects", images):
            objects.add(image_id, [thing._asdict() for thing in things])
    for image_id, image, things in read_per_image(sources, "attributes", images) if attributes or spatial else ():
        if attributes:
            attributes.add(image_id, describe_attributes(things, image, rules, attributes.dropped))
        if spatial:
            rows = json.loads(f"[{objects.get(image_id)}]")
            others = [VGObject(**{**row, "box": row["box"] and tuple(row["box"])}) for row in rows]
            spatial.add(image_id, describe_positions(things, others, image, rules, spatial.dropped))


def read_images(source: RawFile, evaluation: Sequence[EvaluationImages], image_root: Path | None) -> Images:
    """Read image_data.json; leave out the evaluation's images and, given image_root, those that are not under it."""
    if image_root is not None and not image_root.is_dir():
        raise DataError(f"--image-root {image_root}: no such folder; it must hold VG_100K and VG_100K_2")
    table = dict(_read_all(source, read_image_row))
    if not table:
        raise DataError(f"{source}: holds no images")
    held = [{i for i, image in table.items() if file.holds(image.coco_id, image.flickr_id)} for file in evaluation]
    leaking = set().union(*held)
    missing = {i for i, image in table.items() if image_root is not None and not (image_root / image.name).is_file()}
    used = {i: image for i, image in table.items() if i not in leaking and i not in missing}
    return Images(table, used, leaking, missing - leaking, set(), [len(ids) for ids in held])


def read_per_image(sources: dict[str, RawFile], kind: str, images: Images) -> Iterator[tuple[int, Image, list[Any]]]:
    """(image id, image, its regions or objects) of each image to use, in the order of the file."""
    key, what, read = LISTS[kind]

    def read_list(image_id: int, entry: Row) -> list[Any] | None:
        if image_id not in images.all:
            images.unknown.add(image_id)
        if image_id not in images.used:
            return None
        image, rows = images.used[image_id], entry.get(key, [] if key == "attributes" else None)
        if not isinstance(rows, list):
            raise EntryProblem(f"key '{key}' must be a list", f"image {image_id}")
        return list(read_each(rows, f"{image.name}, {what}", functools.partial(read, image)))

    for image_id, found in _read_all(sources[kind], read_list):
        if found is not None:
            yield image_id, images.used[image_id], found


def _read_all(source: RawFile, read: Callable[[int, Row], T]) -> Iterator[tuple[int, T]]:
    """(image id, `read` of it and the entry) for every entry of a file; a problem becomes a `DataError`."""
    seen: set[int] = set()

    def read_entry(entry: Row) -> tuple[int, T]:
        image_id = read_image_id(entry)
        item = read(image_id, entry)
        if image_id in seen:
            raise EntryProblem("the image has an entry already", f"image {image_id}")
        seen.add(image_id)
        return image_id, item

    try:
        yield from read_each(stream_items(source), "entry", read_entry)
    except EntryProblem as problem:
        raise DataError(f"{source}: {problem.kind} ({problem.detail}); correct the entry or take it out") from None


# ---- what is said at the end


def summary(report: Prepared) -> str:
    """Images, then each output with its entries and boxes, and the candidates that each rule dropped."""
    images, evaluation = report.images, report.evaluation
    files = [(f"  {file.path}: of {len(file):,} images", n) for file, n in zip(evaluation, images.found, strict=True)]
    rows = [
        ("images in image_data", len(images.all)),
        *([("left out: in a val or test split", len(images.evaluation)), *files] if evaluation else []),
        *([("left out: not on disk", len(images.missing))] if images.missing else []),
        *([("left out: not in image_data", len(images.unknown))] if images.unknown else []),
        ("images used", len(images.used)),
    ]
    unseen = ["\n".join(_unseen_by_exclude_eval(report))] if evaluation else []
    return "\n\n".join([table(rows), *unseen, _outputs(report.drafts)])


def _unseen_by_exclude_eval(report: Prepared) -> list[str]:
    ids = [(image.coco_id, image.flickr_id) for image in report.images.all.values()]
    no_coco, no_flickr = (sum(pair[i] is None for pair in ids) for i in (0, 1))
    lines = [
        f"Without coco_id: {no_coco:,} images of image_data; without flickr_id: {no_flickr:,}; with "
        f"neither, so that no file can tell them: {ids.count((None, None)):,}."
    ]
    for file in report.evaluation:
        if not len(file):
            lines.append(f"{file.path}: holds no val or test split, so it left out nothing.")
        if file.unknown:
            lines.append(
                f"{file.path}: images that are not COCO's by name, as RefCLEF's: {file.unknown:,}; Visual Genome has "
                "no ids of theirs, so none could be looked for."
            )
    return lines


def _outputs(drafts: dict[str, Draft]) -> str:
    """A column per output: its images, entries and boxes, and what each rule dropped."""
    found = drafts.values()
    dropped = [(f"  {rule}", *(draft.dropped[rule] for draft in found)) for rule in DROPPED]
    rows = [
        ("", *drafts),
        ("images", *(len(draft.places) for draft in found)),
        ("entries", *(draft.entries for draft in found)),
        ("boxes", *(draft.boxes for draft in found)),
        ("dropped, by rule:",),
        *(row for row in dropped if any(row[1:])),
    ]
    empty = [
        f"\nwarning: {name} holds no entries; training refuses such a file, so leave it out of train_file"
        for name, draft in drafts.items()
        if not draft.entries
    ]
    return "".join([table(rows), *empty])


def table(rows: Sequence[Sequence[object]]) -> str:
    """`aligned`, with thousands separators in numbers."""
    return aligned([[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows])
