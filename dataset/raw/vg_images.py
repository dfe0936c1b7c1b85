"""image_data.json, and walking through the other files of Visual Genome image by image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dataset.expressions import EntryProblem
from dataset.raw.evaluation_images import EvaluationImages
from dataset.raw.vg_fields import Image, Row, read_each, read_image, read_image_id
from dataset.raw.vg_files import Source, read_entries
from dataset.reading import DataError

T = TypeVar("T")


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
