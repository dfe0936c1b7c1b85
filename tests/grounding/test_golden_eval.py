"""The evaluation scripts at full size, against the published method's maps and metrics."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from config import GroundingConfig, load_config
from grounding.benchmarks import FLICKR, REFCLEF, REFCOCO_PLUS, Benchmark
from grounding.evaluate import evaluate, parse_args
from tests.data_keys import data_keys

GOLDEN = Path(__file__).parents[1] / "golden"
MAP_TOLERANCE = 2e-3  # of a map's maximum: golden/README.md


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """A full-size model is 2 GB."""
    yield
    gc.collect()


@pytest.mark.parametrize(
    ("benchmark", "name", "mode"),
    [
        (REFCOCO_PLUS, "refcoco", "itm"),
        (REFCOCO_PLUS, "refcoco", "itc"),
        (REFCLEF, "refclef", "itm"),
        (FLICKR, "flickr", "itm"),
    ],
    ids=["refcoco", "refcoco_itc", "refclef", "flickr"],
)
def test_maps_and_metrics_are_the_published_ones(
    benchmark: Benchmark,
    name: str,
    mode: str,
    golden_data: Path,
    golden_checkpoint: Path,
    golden_text_encoder: Path,
    tmp_path: Path,
) -> None:
    words = ["--config", f"configs/Grounding_{name}.yaml", "--checkpoint", str(golden_checkpoint.parent)]
    words += ["--output_dir", str(tmp_path), "--text_encoder", str(golden_text_encoder), "--gradcam_mode", mode]
    for key, value in data_keys(name, golden_data).items():
        words += ["--set", f"{key}={value}"]
    evaluate(benchmark, parse_args(benchmark, [*words, "--device", "cpu", "--num_workers", "0"]))

    golden_name = "refcoco_itc" if mode == "itc" else name
    golden = np.load(GOLDEN / f"eval_{golden_name}.npz")
    results = torch.load(tmp_path / "result" / "epoch00.pth", weights_only=True)
    assert [record["ref_id"] for record in results] == golden["ref_id"].tolist()
    for record, expected in zip(results, golden["pred"], strict=True):
        pred = record["pred"].numpy()
        assert pred.dtype == np.float32
        np.testing.assert_allclose(pred / pred.max(), expected / expected.max(), rtol=0, atol=MAP_TOLERANCE)

    lines = [json.loads(line) for line in (tmp_path / "result" / "log.txt").read_text().splitlines()]
    assert lines == json.loads((GOLDEN / "eval_metrics.json").read_text())[golden_name]
    assert load_config(tmp_path / "config.yaml", GroundingConfig).image_root == str(golden_data / "images")
