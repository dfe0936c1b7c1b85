"""The benchmarks: what each reads, how it resizes an image, which splits and metrics it reports.

A new benchmark is a reader in dataset/, one `Benchmark` in `BENCHMARKS`, and a YAML file that names it by `benchmark:`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import ConfigError, GroundingConfig
from dataset import flickr, own, refer
from dataset.expressions import Expression
from dataset.transforms import resize_bicubic, resize_bilinear_image


class Benchmark(NamedTuple):
    """One benchmark.

    Args:
        name: as messages and reports say it.
        config: the config file that is used unless another is named.
        load: (config, skip_missing=False) -> its expressions, read and checked, in the order of the result file.
        resize: (image, side) -> uint8 (side, side, 3).
        splits: split -> the name it is reported under; empty: what the config or the data say (`with_splits`).
        metrics: names in grounding/metrics.py, in the order of the log lines; the last one decides which checkpoint is
            best.
    """

    name: str
    config: str
    load: Callable[..., list[Expression]]
    resize: Callable[[Image.Image, int], np.ndarray]
    splits: dict[str, str]
    metrics: tuple[str, ...]


def _load_refer(config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
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


def _load_own(config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
    config.require("test_file")
    return own.load_expressions(test_file=config.test_file, image_root=config.image_root, skip_missing=skip_missing)


# The names by which the release reports splits.
SPLITS = {"val": "val_d", "testA": "testA_d", "testB": "testB_d"}
TWO_SPLITS = {"val": "val_d", "test": "test"}

REFCOCO_PLUS = Benchmark(
    "RefCOCO+", "./configs/Grounding_refcoco.yaml", _load_refer, resize_bicubic, SPLITS, ("box", "point")
)
REFCLEF = Benchmark(
    "RefCLEF", "./configs/Grounding_refclef.yaml", _load_refclef, resize_bicubic, TWO_SPLITS, ("point",)
)
FLICKR = Benchmark(
    "Flickr30k", "./configs/Grounding_flickr.yaml", _load_flickr, resize_bilinear_image, TWO_SPLITS, ("point",)
)
OWN = Benchmark("Own data", "./configs/Grounding_own.yaml", _load_own, resize_bicubic, {}, ("map_box", "point"))

BENCHMARKS = {  # by the config's key `benchmark`
    "refcoco+": REFCOCO_PLUS,
    "refcoco": REFCOCO_PLUS._replace(name="RefCOCO", config="./configs/Grounding_refcoco_unc.yaml", splits={}),
    "refcocog": REFCOCO_PLUS._replace(name="RefCOCOg", config="./configs/Grounding_refcocog.yaml", splits={}),
    "refclef": REFCLEF,
    "flickr": FLICKR,
    "own": OWN,
}


def benchmark_of(config: GroundingConfig, script: Benchmark | None = None) -> Benchmark:
    """The benchmark that a config names by its key `benchmark`, or failing that, the one that a script evaluates.

    Args:
        script: the benchmark of a script that evaluates nothing else; that of RefCOCO+ also takes RefCOCO and RefCOCOg.

    Raises:
        ConfigError: no benchmark is named, the name is unknown, or the script evaluates another one.
        DataError: the data set is not split by `refer_split`.
    """
    names = ", ".join(BENCHMARKS)
    if config.benchmark is None and script is None:
        raise ConfigError(f"the config lacks 'benchmark', which says what to evaluate: one of {names}")
    if config.benchmark is not None and config.benchmark not in BENCHMARKS:
        raise ConfigError(f"benchmark is {config.benchmark!r}, which is none of {names}")
    named = BENCHMARKS[config.benchmark] if config.benchmark else None
    if script and named and script.load is not named.load:
        raise ConfigError(
            f"benchmark is {config.benchmark!r}, and this script evaluates {script.name}; run grounding_eval.py"
        )
    found = script or named
    assert found is not None
    if found.load is not _load_refer or config.refer_dataset == "refcoco+":
        return found
    held_out = refer.splits_of(config.refer_dataset, config.refer_split)[1:]
    return BENCHMARKS[config.refer_dataset]._replace(splits={split: split for split in held_out})


def with_splits(benchmark: Benchmark, expressions: Sequence[Expression]) -> Benchmark:
    """The benchmark with the splits that it reports: without its own, all those of the data, in order."""
    return benchmark._replace(splits=benchmark.splits or {one.split: one.split for one in expressions})
