"""BLIP through the programs: a folder of transformers evaluated and shown, a run trained, resumed and evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
import export
import Pretrain
from benchmarks.counts import Counts
from config import ConfigError
from grounding import evaluate
from grounding.benchmarks import REFCOCO_PLUS
from grounding.load import open_model
from grounding.results import ResultError
from models.blip import Blip
from models.checkpoint import CheckpointError
from models.interface import LayerError
from tests.small_blip import SIZES, transformers_blip, write_folder
from tests.training_runs import Interruption, arguments, interrupt, make_workplace, ready, same_weights, saved, train
from training.log import TrainingLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace whose configs are of a small BLIP, its folder `hub` and a run in `run`."""
    place = make_workplace(tmp_path_factory.mktemp("blip"))
    write_folder(place / "hub", transformers_blip())
    (place / "blip.json").write_text(json.dumps(SIZES))
    config = json.loads((place / "config.yaml").read_text())
    for key in ("patch_size", "vision_width", "vision_depth", "vision_heads", "vision_initializer_range", "embed_dim"):
        del config[key]
    config |= {"model": "blip", "bert_config": str(place / "blip.json")}
    config["schedular"]["epochs"] = 2
    (place / "config.yaml").write_text(json.dumps(config))
    data, refer = place / "data", place / "data" / "refer"
    grounding = {
        "benchmark": "refcoco+",
        "test_file": [str(refer / "refcoco+" / f"refcoco+_{part}.json") for part in ("val", "test")],
        "refcoco_data": str(refer),
        "det_file": str(refer / "refcoco+" / "dets.json"),
        "image_root": str(data / "images"),
        "image_res": 48,
        "block_num": 1,
    }
    sizes = {"model": "blip", "bert_config": str(place / "blip.json")}
    (place / "grounding.yaml").write_text(json.dumps(grounding | sizes))
    (place / "albef.yaml").write_text(json.dumps(grounding))
    train(place, place / "run", "--checkpoint", str(place / "hub"), "--validate", str(place / "grounding.yaml"))
    return place


def run_evaluation(place: Path, config: str, checkpoint: Path, output: Path, *words: str) -> list[dict[str, float]]:
    line = ["--config", str(place / config), "--checkpoint", str(checkpoint), "--output_dir", str(output)]
    line += ["--device", "cpu", "--num_workers", "0", *words]
    evaluate.evaluate(REFCOCO_PLUS, evaluate.parse_args(REFCOCO_PLUS, line))
    return [json.loads(row) for row in (output / "result" / "log.txt").read_text().splitlines()]


def test_training_logs_what_it_trains(place: Path) -> None:
    rows = [json.loads(row) for row in (place / "run" / "log.txt").read_text().splitlines()]
    losses = {"train_loss_ita", "train_loss_itm", "train_loss_cam1", "train_loss_cam2"}
    accuracies = {"val_refcoco+_box", "val_refcoco+_point"}
    assert len(rows) == 2
    assert all({key for key in row if "loss" in key or "val" in key} == losses | accuracies for row in rows)
    assert rows[-1]["train_loss_itm"] != rows[0]["train_loss_itm"]
    assert "vision_width" not in (place / "run" / "config.yaml").read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--checkpoint", str(place / "hub"), "--save_every", "2", "--resume", "auto")
    with monkeypatch.context() as patch:
        interrupt(patch, "between two steps", Pretrain.Run, "backward", 5)
        with pytest.raises(Interruption):
            train(place, tmp_path, *words)
    train(place, tmp_path, *words)
    one, other = saved(place / "run", 1), saved(tmp_path, 1)
    assert same_weights(one["model"], other["model"])
    moved = open_model(place / "hub", device="cpu").model.state_dict()
    assert not torch.equal(one["model"]["itm_head.weight"], moved["itm_head.weight"])


def test_a_step_does_not_wait_for_its_device(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(place, tmp_path, "--checkpoint", str(place / "hub"))
    run.loader = [next(iter(run.loader))]  # type: ignore[assignment]
    monkeypatch.setattr(TrainingLog, "is_due", lambda *_: False)
    with Counts() as counts:
        run.train_epoch(0, 1)
    assert not counts.waits


def test_evaluation_takes_a_folder_and_a_trained_checkpoint(place: Path, tmp_path: Path) -> None:
    """A folder by any config; what a run has trained by a config of BLIP, and equal to its validation."""
    for mode in ("itm", "itc"):
        options = ("--block_num", "1", "--gradcam_mode", mode)
        found = [
            run_evaluation(place, config, place / "hub", tmp_path / f"{config}_{mode}", *options)
            for config in ("grounding.yaml", "albef.yaml")
        ]
        assert found[0] == found[1]
    with pytest.raises(LayerError, match="--block_num 6: the fusion layers are 0 to 1"):  # LAVIS' layer by default
        run_evaluation(place, "albef.yaml", place / "hub", tmp_path / "layer")
    text_encoder = ("--text_encoder", str(place / "data" / "text_encoder"))
    trained = place / "run" / "checkpoint_01.pth"
    with pytest.raises(CheckpointError, match="holds BLIP of transformers"):
        run_evaluation(place, "albef.yaml", trained, tmp_path / "albef", *text_encoder, "--block_num", "8")
    rows = run_evaluation(place, "grounding.yaml", trained, tmp_path / "trained", *text_encoder)
    last = json.loads((place / "run" / "log.txt").read_text().splitlines()[-1])
    assert [row["val_d"] for row in rows] == [last["val_refcoco+_box"], last["val_refcoco+_point"]]
    with pytest.raises(ResultError, match="checkpoint"):  # the results there are of another model
        run_evaluation(place, "grounding.yaml", place / "hub", tmp_path / "trained", "--block_num", "1")


def test_demo_draws_maps_and_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((place / "data" / "images").iterdir())
    line = [str(image), "the red circle", "--checkpoint", str(place / "hub"), "--block_num", "1", "--device", "cpu"]
    demo.main(demo.parse_args([*line, "--output_dir", str(tmp_path), "--json", "--npz", "--words"]))
    (answer,) = json.loads((tmp_path / f"{image.stem}.json").read_text())["phrases"]
    assert [word["word"] for word in answer["words"]] == ["the", "red", "circle"]  # [CLS] is no part of the map
    assert sum(word["share"] for word in answer["words"]) == pytest.approx(1)
    with np.load(tmp_path / f"{image.stem}.npz") as found:
        np.testing.assert_allclose(found["words_01"].mean(axis=0), found["small_01"], rtol=1e-4, atol=1e-9)
    trained = open_model(place / "run" / "checkpoint_01.pth", text_encoder=str(place / "data" / "text_encoder"))
    assert isinstance(trained.model, Blip)
    assert (trained.config.block_num, trained.config.image_res) == (1, 48)  # as in training


def test_what_does_not_take_blip_says_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of BLIP, which export\.py cannot write"):
        export.main(export.parse_args([str(place / "run" / "checkpoint_01.pth"), str(tmp_path / "out")]))
    with pytest.raises(ConfigError, match="--compile: is for ALBEF alone"):
        Pretrain.main(Pretrain.parse_args(arguments(place, tmp_path / "compiled", "--compile")))
    other = json.loads((place / "blip.json").read_text())
    other["text_config"]["num_attention_heads"] = 4
    (tmp_path / "blip.json").write_text(json.dumps(other))
    words = (f"bert_config={tmp_path / 'blip.json'}", "--checkpoint", str(place / "hub"))
    with pytest.raises(ConfigError, match="text_config's num_attention_heads is 4, and 2 in"):
        Pretrain.main(Pretrain.parse_args(arguments(place, tmp_path / "heads", *words)))
