"""The published configuration itself: steps of full-size training on scenes rendered larger, then the three scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from config import PretrainConfig, load_config
from dataset.scenes import files as scenes_files
from tests.data_keys import data_keys

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 256 pixels, as large as training sees them."""
    folder = tmp_path_factory.mktemp("large_scenes")
    scenes_files.generate(folder, seed=2, train=4, annotated=4, evaluation=1, size=256)
    return folder


def start(*words: str, processes: int = 1, threads: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
    line = [sys.executable, *launcher, *words, "--device", "cpu", "--num_workers", "0"]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": str(threads)}, subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def printed(started: subprocess.Popen[str]) -> str:
    """What a program prints until it ends well."""
    out, errors = started.communicate()
    assert started.returncode == 0, errors[-3000:]
    return out


def options(keys: Mapping[str, object]) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def trained(scenes: Path, golden_text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output of a step of Pretrain.py by two processes; its 3 GB checkpoint goes when the tests are done."""
    output = tmp_path_factory.mktemp("published")
    keys = {"train_file": [str(scenes / "train_phrases.json")], "image_root": scenes / "images", "batch_size": 2}
    keys["mlm_probability"] = 0.5  # two short phrases at 15% have often no masked word at all
    words = ["--config", "configs/Pretrain.yaml", "--output_dir", str(output), "--max_steps", "1"]
    words += ["--text_encoder", str(golden_text_encoder), *options(keys)]
    printed(start("Pretrain.py", *words, processes=2, threads=max(1, (os.cpu_count() or 1) // 2)))
    yield output
    (output / "checkpoint_00.pth").unlink()


def test_a_step_of_training(trained: Path) -> None:
    row = json.loads((trained / "log.txt").read_text())
    assert row["train_lr"] == pytest.approx(1e-6)  # the first step of the warm-up
    assert all(0 < row[f"train_loss_{name}"] < 100 for name in ("mlm", "ita", "itm", "cam2"))
    assert 0 <= row["train_loss_cam1"] < 2  # a hinge that may be satisfied already
    config = load_config(trained / "config.yaml", PretrainConfig)
    published = load_config(ROOT / "configs" / "Pretrain.yaml", PretrainConfig)
    assert {key for key, value in config if value != getattr(published, key)} == {
        "train_file",
        "image_root",
        "batch_size",
        "mlm_probability",
    }
    checkpoint = torch.load(trained / "checkpoint_00.pth", weights_only=True, mmap=True)
    assert checkpoint.keys() >= {"model", "optimizer", "lr_scheduler", "config", "epoch"}
    expected = json.loads((ROOT / "tests" / "golden" / "state_dict_keys.json").read_text())
    found = {key: [list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in checkpoint["model"].items()}
    assert found == expected


def test_its_checkpoint_is_evaluated(trained: Path, scenes: Path, golden_text_encoder: Path, tmp_path: Path) -> None:
    sizes, started = {"refcoco": 24, "refclef": 24, "flickr": 16}, {}
    for script, name in (("", "refcoco"), ("_refclef", "refclef"), ("_flickr", "flickr")):
        words = ["--config", f"configs/Grounding_{name}.yaml", "--checkpoint", str(trained)]
        words += ["--output_dir", str(tmp_path / name), "--text_encoder", str(golden_text_encoder)]
        started[name] = start(f"grounding_eval_singlegpu{script}.py", *words, *options(data_keys(name, scenes)))
    for name, patches in sizes.items():
        assert "ignored on purpose: MLM head" in printed(started[name])
        records = torch.load(tmp_path / name / "result" / "epoch00.pth", weights_only=True)
        assert records
        assert all(record["pred"].shape == (patches, patches) for record in records)
