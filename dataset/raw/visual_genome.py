"""Visual Genome (Krishna et al., IJCV 2017) to the three training files of AMC, by the rules of `vg_phrases`.

Annotations are read as streams, in whatever order of images; entries wait in temporary files until they are written in
the order of image ids. In memory are image_data.json, one image's annotations, and where each image's entries wait.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem
from dataset.raw.evaluation_images import EvaluationImages, read_evaluation_images, read_held_out
from dataset.raw.vg_fields import Image, read_each, read_image_id, read_image_row, read_object, read_region
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
        evaluation: each file of evaluation splits, with those of the images that are in its val and test splits.
        missing: left out because they are not on disk.
        unknown: images that other files have and image_data has not, gathered while those are read.
    """

    all: dict[int, Image]
    used: dict[int, Image]
    evaluation: list[tuple[EvaluationImages, set[int]]]
    missing: set[int]
    unknown: set[int]


def prepare(
    raw: Sequence[Path],
    out: Path,
    rules: Rules,
    outputs: Sequence[str] = tuple(OUTPUTS),
    exclude: Sequence[Path] = (),
    image_root: Path | None = None,
    held_out: Sequence[Path] = (),
) -> tuple[Images, dict[str, Draft]]:
    """Write `outputs`, keys of `OUTPUTS`, to the folder `out`: all of them or, when something is wrong, none.

    Args:
        raw: folders and files that hold image_data, region_descriptions, attributes and perhaps objects.
        exclude: files of evaluation splits, whose images are left out.
        image_root: leave out images that are not under this folder; None: do not look.
        held_out: lists of image ids, one a line, whose images are left out.

    Raises:
        DataError: a file is missing or cannot be used; the message names file, entry and key.
        UserError: an output cannot be written.
    """
    sources = find_sources(raw)
    for kind in ("image_data", *(SOURCES[name] for name in outputs)):
        if kind not in sources:
            where = ", ".join(map(str, raw))
            raise DataError(f"{where}: neither {kind}.json nor {kind}.json.zip is there; download it, or see --only")
    evaluation = [*map(read_evaluation_images, exclude), *map(read_held_out, held_out)]
    images = read_images(sources["image_data"], evaluation, image_root)
    with ExitStack() as stack:
        paths = {name: stack.enter_context(atomic_path(out / OUTPUTS[name])) for name in OUTPUTS if name in outputs}
        drafts = {name: Draft(stack.enter_context(TemporaryFile(dir=out))) for name in (*paths, "objects")}
        _fill(drafts, sources, images, rules)
        for name, path in paths.items():
            drafts[name].write(path)
    return images, {name: drafts[name] for name in paths}


def _fill(drafts: Mapping[str, Draft], sources: dict[str, RawFile], images: Images, rules: Rules) -> None:
    """Read the annotations into the drafts of the outputs; those of objects.json wait in the draft "objects"."""
    descriptions, attributes, spatial = (drafts.get(name) for name in OUTPUTS)
    objects = drafts["objects"]
    if descriptions:
        for image_id, image, regions in read_per_image(sources, "region_descriptions", images):
            descriptions.add(image_id, describe_regions(regions, image_id, image, rules, descriptions.dropped))
    if spatial and "objects" in sources:
        for image_id, _, things in read_per_image(sources, "objects", images):
            objects.add(image_id, things)
    for image_id, image, things in read_per_image(sources, "attributes", images) if attributes or spatial else ():
        if attributes:
            attributes.add(image_id, describe_attributes(things, image, rules, attributes.dropped))
        if spatial:
            others = objects.get(image_id)
            spatial.add(image_id, describe_positions(things, others, image, rules, spatial.dropped))


def read_images(source: RawFile, evaluation: Sequence[EvaluationImages], image_root: Path | None) -> Images:
    """Read image_data.json; leave out the evaluation's images and, given image_root, those that are not under it."""
    if image_root is not None and not image_root.is_dir():
        raise DataError(f"--image-root {image_root}: no such folder; it must hold VG_100K and VG_100K_2")
    table = dict(_read_all(source, read_image_row))
    if not table:
        raise DataError(f"{source}: holds no images")
    held = [{i for i, image in table.items() if file.holds(i, image.coco_id, image.flickr_id)} for file in evaluation]
    for file, ids in zip(evaluation, held, strict=True):
        if file.visual_genome and not ids:
            raise DataError(f"{file.path}: {source} has none of its {len(file)} ids; are they Visual Genome's?")
    rest = {i: image for i, image in table.items() if not any(i in ids for ids in held)}
    missing = {i for i, image in rest.items() if image_root is not None and not (image_root / image.name).is_file()}
    used = {i: image for i, image in rest.items() if i not in missing}
    return Images(table, used, list(zip(evaluation, held, strict=True)), missing, set())


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


def summary(images: Images, drafts: dict[str, Draft]) -> str:
    """Images, then each output with its entries and boxes, and the candidates that each rule dropped."""
    files = [(f"  {file.path}: of {len(file):,} images", len(held)) for file, held in images.evaluation]
    leaking = set().union(*(held for _, held in images.evaluation))
    counts = [
        ("images in image_data", len(images.all)),
        *([("left out: in a val or test split", len(leaking)), *files] if files else []),
        *([("left out: not on disk", len(images.missing))] if images.missing else []),
        *([("left out: not in image_data", len(images.unknown))] if images.unknown else []),
        ("images used", len(images.used)),
    ]
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
    empty = [name for name, draft in drafts.items() if not draft.entries]
    warning = "warning: {} holds no entries; training refuses such a file, so leave it out of train_file"
    return "\n".join([table(counts), "", *_unseen(images), table(rows), *map(warning.format, empty)])


def _unseen(images: Images) -> list[str]:
    """Lines about the images that --exclude-eval, if it was given, cannot find."""
    ids = [(image.coco_id, image.flickr_id) for image in images.all.values()]
    no_coco, no_flickr = (sum(pair[i] is None for pair in ids) for i in (0, 1))
    files = [file for file, _ in images.evaluation if not file.visual_genome]
    lines = [
        f"Without coco_id: {no_coco:,} images of image_data; without flickr_id: {no_flickr:,}; with neither, so that "
        f"no file can tell them: {ids.count((None, None)):,}.",
        *(f"{file.path}: holds no val or test split, so it left out nothing." for file in files if not len(file)),
        *(
            f"{file.path}: images that are not COCO's by name, as RefCLEF's: {file.unknown:,}; Visual Genome has no "
            "ids of theirs, so none could be looked for."
            for file in files
            if file.unknown
        ),
        "",
    ]
    return lines if files else []


def table(rows: Sequence[Sequence[object]]) -> str:
    """`aligned`, with thousands separators in numbers."""
    return aligned([[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows])
