"""Which images the val and test splits of the benchmarks hold, so that training can leave them out.

COCO's image ids (RefCOCO, RefCOCO+, RefCOCOg) and Flickr's photo ids (Flickr30k) are in Visual Genome's image_data.
RefCLEF's images are of another collection (SAIAPR TC-12), whose ids are not there: only RefCLEF itself can use them.
"""

import re
from pathlib import Path
from typing import NamedTuple

from dataset.expressions import Problems, require
from dataset.flickr import load_ids
from dataset.raw.archives import require_file
from dataset.reading import DataError, load_json
from dataset.refer import load_refs
from dataset.vg_regions import read_image_ids

COCO_ID_IN_NAME = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})")  # how the names of COCO's files begin


class EvaluationImages(NamedTuple):
    """The images of a file's val and test splits: by COCO's, Flickr's or Visual Genome's id; how many have none.

    `saiapr`: the ids of the last ones, RefCLEF's, if the file tells them.
    """

    path: Path
    coco: frozenset[int] = frozenset()
    flickr: frozenset[int] = frozenset()
    unknown: int = 0
    visual_genome: frozenset[int] = frozenset()
    saiapr: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.coco) + len(self.flickr) + self.unknown + len(self.visual_genome)

    def holds(self, image_id: int, coco_id: int | None, flickr_id: int | None) -> bool:
        return image_id in self.visual_genome or coco_id in self.coco or flickr_id in self.flickr


def read_evaluation_images(path: Path) -> EvaluationImages:
    """Read REFER's refs(SPLIT).p, a JSON list of {"image", "split"?}, or Flickr30k's image ids, one a line (.txt).

    Every split but train counts: by the ref's or the entry's own `split`, or else, and for .txt, by the file's name.

    Raises:
        DataError: the file is missing, or is none of these.
    """
    readers = {".p": _read_refs, ".json": _read_json, ".txt": _read_ids}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected REFER's refs(SPLIT).p, a JSON list of expressions or a .txt of Flickr ids")
    require_file(path, "--exclude-eval takes the files of the splits to leave out")
    return readers[path.suffix](path)


def read_held_out(path: Path) -> EvaluationImages:
    """Read a list of Visual Genome's image ids, all of which count; raises `DataError`."""
    require_file(path, "--hold-out takes lists of Visual Genome's image ids")
    with Problems() as problems:
        return EvaluationImages(path, visual_genome=frozenset(read_image_ids(str(path), problems)))


def _read_refs(path: Path) -> EvaluationImages:
    refs = load_refs(path).values()
    ids = frozenset(ref["image_id"] for ref in refs if not is_train(ref["split"]))
    # The number in a file_name is unreliable; that it is COCO's is not.
    if any(COCO_ID_IN_NAME.match(str(ref.get("file_name"))) for ref in refs):
        return EvaluationImages(path, coco=ids)
    return EvaluationImages(path, unknown=len(ids), saiapr=ids)


def _read_json(path: Path) -> EvaluationImages:
    images = set()
    with Problems() as problems:
        for index, row in enumerate(load_json(path, list)):
            with problems.at(f"{path}: entry {index}"):
                image = require(row, "image", str)
                if not is_train(require({"split": path.stem, **row}, "split", str)):
                    images.add(image)
    matches = [COCO_ID_IN_NAME.match(image.rpartition("/")[2]) for image in images]
    coco = frozenset(int(match[1]) for match in matches if match)
    return EvaluationImages(path, coco=coco, unknown=matches.count(None))


def _read_ids(path: Path) -> EvaluationImages:
    ids = load_ids(str(path))
    for image_id in ids:
        if not image_id.isdecimal():
            raise DataError(f"{path}: {image_id!r} is no id of a Flickr photo; the file must list ids, one a line")
    return EvaluationImages(path, flickr=frozenset() if is_train(path.stem) else frozenset(map(int, ids)))


def is_train(split: str) -> bool:
    """Whether a split's or a file's name speaks of training alone: a doubtful one counts as evaluation."""
    return "train" in split and "val" not in split and "test" not in split
