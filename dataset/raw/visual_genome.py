"""Visual Genome (Krishna et al., IJCV 2017) to the three training files of AMC, by the rules of `vg_phrases`.

Annotations are read as streams, in whatever order of images; entries wait in temporary files until they are written in
the order of image ids. In memory are image_data.json, one image's annotations, and where each image's entries wait.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem
from dataset.raw.evaluation_images import EvaluationImages, read_evaluation_images
from dataset.raw.vg_fields import Image, Row, Thing, read_each, read_image, read_image_id, read_regions, read_things
from dataset.raw.vg_files import Draft, Source, Spool, find_sources, read_entries
from dataset.raw.vg_phrases import DROPPED, Rules, describe_attributes, describe_positions, describe_regions
from dataset.reading import DataError
from utils import aligned, atomic_path

T = TypeVar("T")

OUTPUTS = {
    "descriptions": "vg_descriptions.json",
    "attributes": "vg_attributes.json",
    "attributes_spatial": "vg_attributes_spatial.json",
}
SOURCES = {"descriptions": "region_descriptions", "attributes": "attributes", "attributes_spatial": "attributes"}


class Images(NamedTuple):
    """The images of image_data.json: those to use by id, and the ids of the others.

    Args:
        evaluation: in a val or test split of --exclude-eval.
        missing: not on disk.
        unknown: images that other files have and image_data has not, gathered while those are read.
        found: for each evaluation file, how many of image_data's images are in it.
        no_coco, no_flickr, no_id: how many images have no such id, and how many have neither.
    """

    used: dict[int, Image]
    evaluation: set[int]
    missing: set[int]
    unknown: set[int]
    found: list[int]
    no_coco: int
    no_flickr: int
    no_id: int


class Report(NamedTuple):
    """What became of the images, the evaluation files in the order of `images.found`, and the outputs."""

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
) -> Report:
    """Write `outputs`, keys of `OUTPUTS`, to the folder `out`: all of them or, when something is wrong, none.

    Args:
        raw: folders and files that hold image_data, region_descriptions, attributes and perhaps objects.
        exclude: files of evaluation splits, whose images are left out.
        image_root: leave out images that are not on disk under this folder; None: do not look.

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
            drafts = {name: Draft(stack.enter_context(Spool(out))) for name in OUTPUTS if name in outputs}
            if "descriptions" in drafts:
                _draft_descriptions(sources, images, rules, drafts["descriptions"])
            if drafts.keys() - {"descriptions"}:
                others = stack.enter_context(Spool(out))
                _draft_attributes(sources, images, rules, others, drafts)
            for name, draft in drafts.items():
                draft.write(stack.enter_context(atomic_path(out / OUTPUTS[name])))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); is there room, and are you allowed to?") from error
    return Report(images, evaluation, drafts)


def _draft_descriptions(sources: dict[str, Source], images: Images, rules: Rules, draft: Draft) -> None:
    for image_id, image, regions in read_per_image(sources["region_descriptions"], "regions", images, read_regions):
        draft.add(image_id, describe_regions(regions, image_id, image, rules, draft.dropped))


def _draft_attributes(
    sources: dict[str, Source], images: Images, rules: Rules, others: Spool, drafts: dict[str, Draft]
) -> None:
    """Both files that come from attributes.json; `others` is where the objects of objects.json wait, if it is there."""
    plain, spatial = drafts.get("attributes"), drafts.get("attributes_spatial")
    if spatial and "objects" in sources:
        for image_id, _, things in read_per_image(sources["objects"], "objects", images, read_things):
            others.add(image_id, json.dumps([(thing.object_id, thing.names, thing.box) for thing in things]))
    for image_id, image, things in read_per_image(sources["attributes"], "attributes", images, read_things):
        if plain:
            plain.add(image_id, describe_attributes(things, image, rules, plain.dropped))
        if spatial:
            rows = json.loads(others.get(image_id) or "[]")
            more = [Thing(object_id, names, [], box and tuple(box)) for object_id, names, box in rows]
            spatial.add(image_id, describe_positions(things, more, image, rules, spatial.dropped))


# ---- images


def read_images(source: Source, evaluation: Sequence[EvaluationImages], image_root: Path | None) -> Images:
    """Read image_data.json; leave out the evaluation's images and, given image_root, those that are not under it."""
    if image_root is not None and not image_root.is_dir():
        raise DataError(f"--image-root {image_root}: no such folder; it must hold VG_100K and VG_100K_2")
    table: dict[int, Image] = {}

    def read(row: Row) -> None:
        image_id, image = read_image(row)
        if image_id in table:
            raise EntryProblem("the image has an entry already", f"image {image_id}")
        table[image_id] = image

    for _ in _read_all(source, read):
        pass
    if not table:
        raise DataError(f"{source}: holds no images")
    held = [{i for i, image in table.items() if file.holds(image.coco_id, image.flickr_id)} for file in evaluation]
    leaking = set().union(*held)
    missing = {i for i, image in table.items() if image_root is not None and not (image_root / image.name).is_file()}
    return Images(
        used={i: image for i, image in table.items() if i not in leaking and i not in missing},
        evaluation=leaking,
        missing=missing - leaking,
        unknown=set(),
        found=[len(ids) for ids in held],
        no_coco=sum(image.coco_id is None for image in table.values()),
        no_flickr=sum(image.flickr_id is None for image in table.values()),
        no_id=sum(image.coco_id is None and image.flickr_id is None for image in table.values()),
    )


def read_per_image(
    source: Source, key: str, images: Images, read: Callable[[list[Any], Image], T]
) -> Iterator[tuple[int, Image, T]]:
    """(image id, image, `read` of its list under `key`) of each image to use, in the order of the file.

    Raises:
        DataError: an entry is not of the owners' form, or an image has two.
    """
    seen: set[int] = set()

    def read_entry(entry: Row) -> tuple[int, Image, T] | None:
        image_id = read_image_id(entry)
        if image_id in seen:
            raise EntryProblem("the image has an entry already", f"image {image_id}")
        seen.add(image_id)
        image = images.used.get(image_id)
        if image is None:
            return None
        rows = entry.get(key, [] if key == "attributes" else None)
        if not isinstance(rows, list):
            raise EntryProblem(f"key '{key}' must be a list", f"image {image_id}")
        return image_id, image, read(rows, image)

    for found in _read_all(source, read_entry):
        if found is not None:
            yield found
    images.unknown.update(seen - images.used.keys() - images.evaluation - images.missing)


def _read_all(source: Source, read: Callable[[Row], T]) -> Iterator[T]:
    """`read` of every entry of a file; a problem becomes a `DataError`."""
    try:
        yield from read_each(read_entries(source), "entry", read)
    except EntryProblem as problem:
        raise DataError(f"{source}: {problem.kind} ({problem.detail}); correct the entry or take it out") from None


# ---- what is said at the end


def describe(report: Report) -> str:
    """Images, then each output with its entries and boxes, and the candidates that each rule dropped."""
    images = report.images
    left_out = len(images.evaluation) + len(images.missing)
    rows = [["images in image_data", len(images.used) + left_out]]
    if report.evaluation:
        rows += [["left out: in a val or test split", len(images.evaluation)]]
    rows += [
        [f"  {file.path}: of {len(file):,} images", found]
        for file, found in zip(report.evaluation, images.found, strict=True)
    ]
    rows += [["left out: not on disk", len(images.missing)]] if images.missing else []
    rows += [["left out: not in image_data", len(images.unknown)]] if images.unknown else []
    rows += [["images used", len(images.used)]]
    parts = [table(rows)]
    if report.evaluation:
        parts.append(_recognised(report))
    parts.append(_outputs(report))
    return "\n\n".join(parts)


def _recognised(report: Report) -> str:
    """What --exclude-eval cannot see."""
    images = report.images
    lines = [
        f"Without coco_id: {images.no_coco:,} images of image_data; without flickr_id: {images.no_flickr:,}; with "
        f"neither, so that no file can tell them: {images.no_id:,}."
    ]
    for file in report.evaluation:
        if not len(file):
            lines.append(f"{file.path}: holds no val or test split, so it left out nothing.")
        if file.unknown:
            lines.append(
                f"{file.path}: images that are not COCO's by name, as RefCLEF's: {file.unknown:,}; Visual Genome has "
                "no ids of theirs, so none could be looked for."
            )
    return "\n".join(lines)


def _outputs(report: Report) -> str:
    drafts = report.drafts.values()
    rows: list[list[object]] = [["", *report.drafts]]
    for name in ("images", "entries", "boxes"):
        rows.append([name, *(getattr(draft, name) for draft in drafts)])
    rows.append(["dropped, by rule:"])
    for rule in DROPPED:
        if any(draft.dropped[rule] for draft in drafts):
            rows.append([f"  {rule}", *(draft.dropped[rule] for draft in drafts)])
    text = table(rows)
    for name, draft in report.drafts.items():
        if not draft.entries:
            text += f"\nwarning: {name} holds no entries; training refuses such a file, so leave it out of train_file"
    return text


def table(rows: list[list[object]]) -> str:
    """`aligned`, with thousands separators in numbers."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return aligned(cells)
