"""The benchmarks: what each reads, how it resizes an image, which splits and metrics it reports."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import GroundingConfig
from dataset import flickr, refer
from dataset.expressions import Expression
from dataset.transforms import resize_bicubic, resize_bilinear_image


class Benchmark(NamedTuple):
    """One benchmark.

    Args:
        config: the config file that is used unless another is named.
        load: (config, skip_missing=False) -> its expressions, read and checked, in the order of the result file.
        resize: (image, side) -> uint8 (side, side, 3).
        splits: split -> the name it is reported under.
        metrics: "box" and "point", in the order of the log lines.
    """

    name: str
    config: str
    load: Callable[..., list[Expression]]
    resize: Callable[[Image.Image, int], np.ndarray]
    splits: dict[str, str]
    metrics: tuple[str, ...]


def _load_refcoco(config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
    config.require("test_file", "refcoco_data", "det_file")
    return refer.load_expressions(
        test_file=config.test_file,
        image_root=config.image_root,
        refer_root=str(config.refcoco_data),
        dataset=config.refer_dataset,
        split_by=config.refer_split,
        det_file=config.det_file,
        skip_missing=skip_missing,
    )


def _load_refclef(config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
    config.require("test_file", "refcoco_data")
    return refer.load_expressions(
        test_file=config.test_file,
        image_root=config.image_root,
        refer_root=str(config.refcoco_data),
        dataset="refclef",
        split_by=refer.refclef_split(config),
        entry_split=True,
        skip_missing=skip_missing,
    )


def _load_flickr(config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
    config.require("image_ids_file", "phrase_box_file", "sentences_file")
    return flickr.load_expressions(
        image_ids_file=config.image_ids_file,
        phrase_box_file=config.phrase_box_file,
        sentences_file=config.sentences_file,
        image_root=config.image_root,
        skip_missing=skip_missing,
    )


REFCOCO = Benchmark(
    "RefCOCO+",
    "./configs/Grounding_refcoco.yaml",
    _load_refcoco,
    resize_bicubic,
    {"val": "val_d", "testA": "testA_d", "testB": "testB_d"},
    ("box", "point"),
)
REFCLEF = Benchmark(
    "RefCLEF",
    "./configs/Grounding_refclef.yaml",
    _load_refclef,
    resize_bicubic,
    {"val": "val_d", "test": "test"},
    ("point",),
)
FLICKR = Benchmark(
    "Flickr30k",
    "./configs/Grounding_flickr.yaml",
    _load_flickr,
    resize_bilinear_image,
    {"val": "val_d", "test": "test"},
    ("point",),
)
BENCHMARKS = {"refcoco": REFCOCO, "refclef": REFCLEF, "flickr": FLICKR}  # by their names on command lines

IN_PLACE_OF_REFCOCO_PLUS = {"refcoco": "RefCOCO", "refcocog": "RefCOCOg"}


def asked_for(benchmark: Benchmark, config: GroundingConfig) -> Benchmark:
    """The benchmark that a config asks for: by `refer_dataset`, RefCOCO or RefCOCOg in place of RefCOCO+.

    Their splits are reported by their own names; "val_d" and the like are the release's names for RefCOCO+ alone.
    """
    name = IN_PLACE_OF_REFCOCO_PLUS.get(config.refer_dataset)
    if benchmark is not REFCOCO or name is None:
        return benchmark
    held_out = refer.splits_of(config.refer_dataset, config.refer_split)[1:]
    return benchmark._replace(name=name, splits={split: split for split in held_out})
