"""The benchmarks: what each reads, how it resizes an image, which splits and metrics it reports.

A new benchmark is a reader in dataset/, one `Benchmark` in `BENCHMARKS`, and a YAML file that names it by `benchmark:`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import ConfigError, GroundingConfig
from dataset import flickr, own, refer, vg_regions
from dataset.expressions import Expression, Reading, load, with_merged_boxes
from dataset.transforms import resize_bicubic, resize_bilinear_image
from grounding.metrics import find_metric


class Benchmark(NamedTuple):
    """One benchmark.

    Args:
        name: as messages and reports say it.
        config: the config file that is used unless another is named.
        read: (config, reading) -> its expressions in the order of the result file, as the readers in dataset/ do.
        resize: (image, side) -> uint8 (side, side, 3).
        splits: split -> the name it is reported under; empty: what the config or the data say (`with_splits`).
        metrics: names in grounding/metrics.py, in the order of the log lines; the last one of its own decides which
            checkpoint is best.
        added: how many of the metrics, at the end, are not its own: the config's key `metrics` asks for them.
    """

    name: str
    config: str
    read: Callable[[GroundingConfig, Reading], list[Expression]]
    resize: Callable[[Image.Image, int], np.ndarray]
    splits: dict[str, str]
    metrics: tuple[str, ...]
    added: int = 0

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """The metrics that it has without the config's."""
        return self.metrics[: len(self.metrics) - self.added]

    @property
    def decisive(self) -> str:
        """The metric that decides which checkpoint is best."""
        return self.own_metrics[-1]

    def with_metrics(self, names: Sequence[str]) -> "Benchmark":
        """The benchmark with further metrics; those that it has already are its own."""
        new = [name for name in dict.fromkeys(names) if name not in self.metrics]
        return self._replace(metrics=(*self.metrics, *new), added=len(new)) if new else self

    def log_keys(self, metric: str) -> dict[str, str]:
        """Split -> its key in a metric's log line: its reported name; for an added metric, with the metric's before it.

        Log lines do not name their metric otherwise, and those of the published ones must not be mistaken.
        """
        added = metric not in self.own_metrics
        return {split: f"{metric}_{name}" if added else name for split, name in self.splits.items()}

    def load(self, config: GroundingConfig, skip_missing: bool = False) -> list[Expression]:
        """Read and check its expressions; `dataset.expressions.load` says what for, and what it raises."""
        found = load(partial(self.read, config), skip_missing)
        return [with_merged_boxes(one) for one in found] if config.box_protocol == "merged" else found


# The names by which the release reports splits.
SPLITS = {"val": "val_d", "testA": "testA_d", "testB": "testB_d"}
TWO_SPLITS = {"val": "val_d", "test": "test"}
MERGED = ", merged boxes"  # follows the name of a benchmark with `box_protocol: merged`, in results and reports

REFCOCO_PLUS = Benchmark(
    "RefCOCO+", "./configs/Grounding_refcoco.yaml", refer.read_refcoco, resize_bicubic, SPLITS, ("box", "point")
)
REFCLEF = Benchmark(
    "RefCLEF", "./configs/Grounding_refclef.yaml", refer.read_refclef, resize_bicubic, TWO_SPLITS, ("point",)
)
FLICKR = Benchmark(
    "Flickr30k", "./configs/Grounding_flickr.yaml", flickr.read_flickr, resize_bilinear_image, TWO_SPLITS, ("point",)
)
OWN = Benchmark("Own data", "./configs/Grounding_own.yaml", own.read_own, resize_bicubic, {}, ("map_box", "point"))

BENCHMARKS = {  # by the config's key `benchmark`
    "refcoco+": REFCOCO_PLUS,
    "refcoco": REFCOCO_PLUS._replace(name="RefCOCO", config="./configs/Grounding_refcoco_unc.yaml", splits={}),
    "refcocog": REFCOCO_PLUS._replace(name="RefCOCOg", config="./configs/Grounding_refcocog.yaml", splits={}),
    "refclef": REFCLEF,
    "flickr": FLICKR,
    "vg": OWN._replace(
        name="Visual Genome", config="./configs/Grounding_vg.yaml", read=vg_regions.read_vg, metrics=("point",)
    ),
    "own": OWN,
}


def benchmark_of(config: GroundingConfig, script: Benchmark | None = None) -> Benchmark:
    """The benchmark that a config names by its key `benchmark`, or failing that, the one that a script evaluates.

    Args:
        script: the benchmark of a script that evaluates nothing else; that of RefCOCO+ also takes RefCOCO and RefCOCOg.

    Raises:
        ConfigError: no benchmark is named, the name is unknown, or the script evaluates another one.
        MetricError: the config asks for a metric that does not exist.
        DataError: the data set is not split by `refer_split`.
    """
    names = ", ".join(BENCHMARKS)
    if config.benchmark is None and script is None:
        raise ConfigError(f"the config lacks 'benchmark', which says what to evaluate: one of {names}")
    if config.benchmark is not None and config.benchmark not in BENCHMARKS:
        raise ConfigError(f"benchmark is {config.benchmark!r}, which is none of {names}")
    named = BENCHMARKS[config.benchmark] if config.benchmark else None
    if script and named and script.read is not named.read:
        raise ConfigError(
            f"benchmark is {config.benchmark!r}, and this script evaluates {script.name}; run grounding_eval.py"
        )
    found = script or named
    assert found is not None
    if found.read is refer.read_refcoco and config.refer_dataset != "refcoco+":
        held_out = refer.splits_of(config.refer_dataset, config.refer_split)[1:]
        found = BENCHMARKS[config.refer_dataset]._replace(splits={split: split for split in held_out})
    if config.box_protocol == "merged":
        found = found._replace(name=found.name + MERGED)
    for name in config.metrics:
        find_metric(name)
    return found.with_metrics(config.metrics)


def guessed(config: GroundingConfig) -> Benchmark | None:
    """Whose data keys a config has that names no benchmark, as the release's files: the script that would take it."""
    if config.image_ids_file:
        return FLICKR
    if config.refcoco_data:
        return REFCOCO_PLUS if config.det_file else REFCLEF
    return None


def with_splits(benchmark: Benchmark, expressions: Sequence[Expression]) -> Benchmark:
    """The benchmark with the splits that it reports: without its own, all those of the data, in order."""
    return benchmark._replace(splits=benchmark.splits or {one.split: one.split for one in expressions})
