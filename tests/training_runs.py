"""Runs of Pretrain.py with a tiny model, on the CPU: what starts them, and what reads their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import Pretrain
from config import PretrainConfig, load_config
from dataset.scenes import files as scenes_files
from tests.small_model import BERT, SIZES
from training.log import MEASURED

REPOSITORY = Path(__file__).parents[1]
LOSSES = {"train_loss_mlm", "train_loss_ita", "train_loss_itm", "train_loss_cam1", "train_loss_cam2"}
KEYS = {*LOSSES, "train_lr", "epoch"}  # those of the release's log.txt
Row = dict[str, Any]


def make_workplace(folder: Path) -> Path:
    """Tiny scenes (`data`), a config of a tiny model (`config.yaml`) and its `bert.json` in one folder."""
    data = folder / "data"
    scenes_files.generate(data, seed=5, train=24, annotated=24, evaluation=4, size=48)
    bert = BERT | {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.05, "encoder_width": 32}
    (folder / "bert.json").write_text(json.dumps(bert))
    config = SIZES | {
        "train_file": [str(data / "train_phrases.json")],
        "image_root": str(data / "images"),
        "bert_config": str(folder / "bert.json"),
        "vision_width": 32,
        "vision_initializer_range": 0.2,
        "embed_dim": 16,
        "queue_size": 64,
        "batch_size": 8,
        "mask_size": 48,
        "amc": {"layer": 1},
        "optimizer": {"opt": "adamW", "lr": 1e-3},
        "schedular": {"epochs": 3, "warmup_epochs": 2, "warmup_interval": 2, "warmup_lr": 1e-4, "min_lr": 1e-5},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML too
    return folder


def arguments(place: Path, output: Path, *words: str) -> list[str]:
    """The command line of a run on the CPU; in `words`, key=value is a config key."""
    line = ["--config", str(place / "config.yaml"), "--text_encoder", str(place / "data" / "text_encoder")]
    line += ["--output_dir", str(output), "--num_workers", "0", "--device", "cpu"]
    for word in words:
        line += ["--set", word] if "=" in word else [word]
    return line


def log_rows(output: Path) -> list[Row]:
    """log.txt without the one thing in it that no two runs share."""
    rows = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds") >= 0
    return rows


def step_rows(output: Path) -> list[Row]:
    """steps.jsonl without what is measured."""
    rows = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        assert all(row.pop(name) >= 0 for name in MEASURED)
    return rows


def left_by_a_run(epochs: int) -> set[str]:
    checkpoints = {f"checkpoint_{epoch:02d}.pth" for epoch in range(epochs)}
    return {"config.yaml", "run.json", "log.txt", "steps.jsonl", *checkpoints}


def train(place: Path, output: Path, *words: str) -> list[Row]:
    Pretrain.main(Pretrain.parse_args(arguments(place, output, *words)))
    return log_rows(output)


def saved(output: Path, epoch: int) -> dict[str, Any]:
    return torch.load(output / f"checkpoint_{epoch:02d}.pth", weights_only=True)


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def total(row: Row) -> float:
    return sum(row[name] for name in LOSSES)


def ready(place: Path, output: Path, *words: str) -> Pretrain.Run:
    """A run before its first step."""
    args = Pretrain.parse_args(arguments(place, output, *words))
    return Pretrain.Run(args, load_config(args.config, PretrainConfig, args.set), torch.device("cpu"))


class Interruption(Exception):
    """What stands for a power cut."""


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, owner: object, name: str, after: int) -> None:
    original, calls = getattr(owner, name), 0

    def stop(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interruption(where)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stop)
