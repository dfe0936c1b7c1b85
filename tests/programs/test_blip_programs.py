"""BLIP through the programs: a folder of transformers evaluated and shown, a run trained, resumed and evaluated."""

import csv
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BlipForImageTextRetrieval

import demo
import export
import Pretrain
from benchmarks.counts import Counts
from config import PretrainConfig
from dataset.photos import read_photo
from dataset.raw.check import check
from grounding import evaluate
from grounding.benchmarks import benchmark_of
from grounding.explain import ground
from grounding.load import OpenedModel, open_model
from grounding.pictures.overlay import overlay
from grounding.pictures.render import save
from grounding.results import ResultError
from grounding.web import fragments
from grounding.web.examples import offered
from grounding.web.session import Answers
from models.albef import build_albef
from models.blip import Blip
from models.checkpoint import CheckpointError
from models.interface import LayerError
from models.student import StudentError
from tests.data_keys import data_keys
from tests.small_blip import SIZES, transformers_blip, write_folder
from tests.small_model import BERT
from tests.small_model import SIZES as ALBEF_SIZES
from tests.training_runs import Interruption, arguments, interrupt, make_workplace, ready, same_weights, saved, train
from training.log import TrainingLog
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
PHRASE = "the red circle"


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
    grounding = {"benchmark": "refcoco+", **data_keys("refcoco", place / "data"), "image_res": 48, "block_num": 1}
    (place / "grounding.yaml").write_text(
        json.dumps(grounding | {"model": "blip", "bert_config": str(place / "blip.json")})
    )
    (place / "albef.yaml").write_text(json.dumps(grounding))
    (place / "albef.json").write_text(json.dumps(BERT))
    sizes = ALBEF_SIZES | {"bert_config": str(place / "albef.json"), "image_root": "", "train_file": []}
    albef = PretrainConfig.model_validate({**sizes, "amc": {"layer": 1}})
    torch.save({"model": build_albef(albef).state_dict(), "config": albef.model_dump()}, place / "albef.pth")
    watched = ("--tensorboard", "--watch", str(an_image(place)), PHRASE)
    validated = ("--validate", str(place / "grounding.yaml"))
    train(place, place / "run", "--checkpoint", str(place / "hub"), *validated, *watched)
    return place


def an_image(place: Path) -> Path:
    return place / "data" / "images" / "100000.jpg"


def vocabulary(place: Path) -> tuple[str, str]:
    return "--text_encoder", str(place / "data" / "text_encoder")


def opened(place: Path) -> OpenedModel:
    """What the run has trained."""
    return open_model(place / "run" / "checkpoint_01.pth", None, vocabulary(place)[1], "cpu")


def run_evaluation(
    place: Path, config: str, checkpoint: Path | str, output: Path, *words: str
) -> list[dict[str, float]]:
    evaluate_by([place / config], checkpoint, output, *words)
    return [json.loads(row) for row in (output / "result" / "log.txt").read_text().splitlines()]


def evaluate_by(configs: list[Path], checkpoint: Path | str, output: Path, *words: str) -> None:
    line = ["--config", *map(str, configs), "--checkpoint", str(checkpoint), "--output_dir", str(output)]
    evaluate.evaluate(None, evaluate.parse_args(None, [*line, "--device", "cpu", "--num_workers", "0", *words]))


def test_training_logs_what_it_trains(place: Path) -> None:
    rows = [json.loads(row) for row in (place / "run" / "log.txt").read_text().splitlines()]
    losses = {"train_loss_ita", "train_loss_itm", "train_loss_cam1", "train_loss_cam2"}
    accuracies = {"val_refcoco+_box", "val_refcoco+_point"}
    assert len(rows) == 2
    assert all({key for key in row if "loss" in key or "val" in key} == losses | accuracies for row in rows)
    assert rows[-1]["train_loss_itm"] != rows[0]["train_loss_itm"]
    assert "vision_width" not in (place / "run" / "config.yaml").read_text()
    events = EventAccumulator(str(place / "run" / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last["epochs/loss_cam2"] == pytest.approx(rows[-1]["train_loss_cam2"])
    (tag,) = events.Tags()["images"]
    drawn = np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
    image = read_photo(an_image(place))
    save(overlay(image, ground(opened(place).explainer(), image, PHRASE)), place / "drawn.png")
    np.testing.assert_array_equal(drawn, np.asarray(Image.open(place / "drawn.png").convert("RGB")))


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
    trained = place / "run" / "checkpoint_01.pth"
    with pytest.raises(CheckpointError, match="holds BLIP of transformers"):
        run_evaluation(place, "albef.yaml", trained, tmp_path / "albef", *vocabulary(place), "--block_num", "8")
    rows = run_evaluation(place, "grounding.yaml", trained, tmp_path / "trained", *vocabulary(place))
    last = json.loads((place / "run" / "log.txt").read_text().splitlines()[-1])
    assert [row["val_d"] for row in rows] == [last["val_refcoco+_box"], last["val_refcoco+_point"]]
    with pytest.raises(ResultError, match="checkpoint"):  # the results there are of another model
        run_evaluation(place, "grounding.yaml", place / "hub", tmp_path / "trained", "--block_num", "1")


def test_four_benchmarks_with_report_and_comparison(place: Path, tmp_path: Path) -> None:
    """Two checkpoints by one command, in both modes; then ALBEF beside them."""
    image, box = an_image(place), dict(zip(("x", "y", "width", "height"), (5, 5, 20, 20), strict=True))
    (tmp_path / "own.json").write_text(json.dumps([{"image": image.name, "phrase": PHRASE, "box": list(box.values())}]))
    size = dict(zip(("width", "height"), Image.open(image).size, strict=True))
    region = {"region_id": 1, "image_id": 1, "phrase": PHRASE, **box}
    for name, row in {
        "images": {"image_id": 1, "url": "x/VG_100K/1.jpg", **size},
        "regions": {"id": 1, "regions": [region]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    (tmp_path / "test.txt").write_text("1")
    (tmp_path / "VG_100K").mkdir()
    shutil.copy(image, tmp_path / "VG_100K" / "1.jpg")
    keys: dict[str, dict[str, Any]] = {name: data_keys(name, place / "data") for name in ("refclef", "flickr")}
    keys["own"] = {"test_file": [str(tmp_path / "own.json")], "image_root": str(image.parent)}
    keys["vg"] = {"image_data_file": str(tmp_path / "images.json"), "region_file": str(tmp_path / "regions.json")}
    keys["vg"] |= {"image_ids_file": [str(tmp_path / "test.txt")], "image_root": str(tmp_path)}
    sizes = {"model": "blip", "bert_config": str(place / "blip.json"), "image_res": 48, "block_num": 1}
    configs = {name: tmp_path / f"{name}.yaml" for name in keys}
    for name, path in configs.items():
        path.write_text(json.dumps({"benchmark": name, **keys[name], **sizes}))
    report = check(list(map(str, configs.values())), [], None, 1, 5, benchmark_of)
    assert not report.total("error"), report.text()
    wrong = check([str(configs["own"])], ["block_num=2", "image_res=40"], None, 1, 5, benchmark_of).text()
    assert "block_num is 2; the fusion layers are 0 to 1" in wrong
    assert "image_res is 40, which its patch_size of 16 does not divide" in wrong
    evaluate_by(list(configs.values()), place / "run", tmp_path / "itm", *vocabulary(place))
    itc = ("--gradcam_mode", "itc", *vocabulary(place))
    evaluate_by([configs["own"]], place / "run", tmp_path / "itc", *itc)
    for name in configs:
        rows = (tmp_path / "itm" / name / "result" / "log.txt").read_text().splitlines()
        assert {json.loads(row)["epoch"] for row in rows} == {"00", "01"}
    found = []
    for folder, mode in (("itm/own", "itm"), ("itm/vg", "itm"), ("itc", "itc")):
        (record,) = torch.load(tmp_path / folder / "result" / "epoch01.pth", weights_only=True)
        found.append(ground(opened(place).explainer(mode), read_photo(image), PHRASE).small)
        np.testing.assert_allclose(record["pred"], found[-1], rtol=1e-4, atol=1e-9)
    assert not np.allclose(found[0], found[2], rtol=0.1)
    albef = {**keys["own"], **ALBEF_SIZES, "block_num": 1, "bert_config": str(place / "albef.json")}
    (tmp_path / "albef.yaml").write_text(json.dumps({"benchmark": "own", **albef}))
    beside = ("--report", "--compare", str(tmp_path / "itm" / "own"), *vocabulary(place))
    evaluate_by([tmp_path / "albef.yaml"], place / "albef.pth", tmp_path / "beside", *beside)
    with (tmp_path / "beside" / "expressions.csv").open() as file:
        (row,) = csv.DictReader(file)
    points = [key.removeprefix("point: ") for key in row if key.startswith("point: ")]
    assert points == ["checkpoint_00", "checkpoint_01", "albef"]


def test_demo_draws_maps_and_words(place: Path, tmp_path: Path) -> None:
    image = an_image(place)
    line = [str(image), PHRASE, "--checkpoint", str(place / "hub"), "--block_num", "1", "--device", "cpu"]
    line += ["--output_dir", str(tmp_path), "--json", "--npz"]
    demo.main(demo.parse_args([*line, "--words"]))
    (answer,) = json.loads((tmp_path / f"{image.stem}.json").read_text())["phrases"]
    assert [word["word"] for word in answer["words"]] == ["the", "red", "circle"]  # [CLS] is no part of the map
    assert sum(word["share"] for word in answer["words"]) == pytest.approx(1)
    with np.load(tmp_path / f"{image.stem}.npz") as found:
        np.testing.assert_allclose(found["words_01"].mean(axis=0), found["small_01"], rtol=1e-4, atol=1e-9)
    demo.main(demo.parse_args([*line, "--words", "--gradcam_mode", "itc"]))
    (other,) = json.loads((tmp_path / f"{image.stem}.json").read_text())["phrases"]
    assert other["words"] == []
    assert other["match"] == pytest.approx(answer["match"])
    assert isinstance(opened(place).model, Blip)
    assert (opened(place).config.block_num, opened(place).config.image_res) == (1, 48)  # as in training


@pytest.mark.parametrize("first", ["albef", "student"])
def test_the_page_shows_a_word_by_blip_and_albef(place: Path, student: Path, first: str) -> None:
    """The maps of one have [CLS], of the other they have not."""
    offers = offered([str(place / "albef.pth"), str(student)])
    offers.sort(key=lambda offer: offer.name != first)
    answers = Answers(offers, lambda offer: open_model(offer.checkpoint, None, vocabulary(place)[1], "cpu"))
    picture = answers.add_picture(an_image(place).read_bytes(), "scene.jpg")
    for mode in ("itm", "itc"):
        replies = [answers.ask(picture.key, [PHRASE], offer.name, mode, None) for offer in offers]
        assert all(not isinstance(reply.answers[PHRASE], str) for reply in replies), replies
        _, html = fragments.row(picture, PHRASE, replies, 0, 0.5, "jet")
        assert html.count("match probability") == 2
        words: list[Any] = [reply.answers[PHRASE].words for reply in replies]  # type: ignore[union-attr]
        for number, word in enumerate(words[0], start=1):
            _, html = fragments.row(picture, PHRASE, replies, number, 0.5, "jet")
            shares = [other.share for other in itertools.chain(*words) if other.word == word.word]
            assert len(shares) == (1 if word.word == "[CLS]" else 2)
            assert html.count(f"map of {word.word} (in: {PHRASE})") == len(shares)
            assert ("this model has no map of &#39;[CLS]&#39;" in html) == (len(shares) == 1)
            assert re.findall("([0-9]+)% of the phrase's map", html) == [f"{100 * share:.0f}" for share in shares]
    replies = [answers.ask(picture.key, [PHRASE], "student", "itm", 2)]
    assert "student has no layer 2 in mode itm, only 0, 1" in str(replies[0].answers)


# ---- given away


@pytest.fixture(scope="module")
def student(place: Path) -> Path:
    """The run's, exported. Do not write into it."""
    exported(place / "run" / "checkpoint_01.pth", place / "student", *vocabulary(place))
    return place / "student"


def exported(checkpoint: Path, out: Path, *words: str) -> dict[str, Any]:
    """The config.json that export.py writes."""
    export.main(export.parse_args([str(checkpoint), str(out), *words]))
    return json.loads((out / "config.json").read_text())


def test_a_student_is_a_folder_of_transformers(place: Path, student: Path, tmp_path: Path) -> None:
    ours, image = opened(place), read_photo(an_image(place))
    again = open_model(student, device="cpu")
    assert (again.config.block_num, again.config.image_res) == (1, 48)
    for mode in ("itm", "itc"):
        one, other = (ground(of.explainer(mode), image, PHRASE) for of in (ours, again))
        assert np.array_equal(one.small, other.small)
        assert one.match == other.match
    own, said = BlipForImageTextRetrieval.from_pretrained(student, output_loading_info=True)
    assert {name: list(keys) for name, keys in said.items() if keys} == {"unexpected_keys": ["temp"]}
    ours_by_name = ours.model.state_dict()
    for name, value in own.state_dict().items():
        assert torch.equal(value, ours_by_name[name.replace("vision_model.", "visual_encoder.")])
    assert "BLIP\n" in (student / "README.md").read_text()
    config = exported(student, tmp_path / "half", "--half")
    assert config == json.loads((student / "config.json").read_text())
    train(place, tmp_path / "more", "--checkpoint", str(tmp_path / "half"), "--max_steps", "1")
    # of transformers' own, for images of another size
    larger = json.loads((place / "grounding.yaml").read_text()) | {"image_res": 64}
    (tmp_path / "larger.yaml").write_text(json.dumps(larger))
    config = exported(place / "hub", tmp_path / "larger", "--config", str(tmp_path / "larger.yaml"))
    assert (config["vision_config"]["image_size"], config["amc"]["layer"]) == (64, 1)
    _, said = BlipForImageTextRetrieval.from_pretrained(tmp_path / "larger", output_loading_info=True)
    assert not any(said.values())


def test_a_name_on_the_hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, without a network; of older folders, the weights of torch."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        StudentError, match=r"as a name on the Hugging Face hub: it can be neither downloaded nor found"
    ):
        open_model("Salesforce/blip-itm-base-coco")
    folder = tmp_path / "models--Salesforce--blip-itm-base-coco"
    shutil.copytree(place / "hub", folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    local = run_evaluation(place, "albef.yaml", place / "hub", tmp_path / "local", "--block_num", "1")
    cached = ("Salesforce/blip-itm-base-coco", tmp_path / "cached", "--block_num", "1")
    assert run_evaluation(place, "albef.yaml", *cached) == local


def test_weights_of_torch_are_downloaded_where_there_are_no_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write_folder(tmp_path / "there", transformers_blip(), safetensors=False)
    (there / "tf_model.h5").write_text("not asked for")

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "here").mkdir(exist_ok=True)
        for path in there.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = open_model("Salesforce/blip-itm-base-coco", device="cpu").model.state_dict()
    assert same_weights(found, open_model(place / "hub", device="cpu").model.state_dict())
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"config.json", "pytorch_model.bin", "vocab.txt"}


# ---- refused


def test_what_does_not_take_blip_says_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--compile: is for ALBEF alone"):
        Pretrain.main(Pretrain.parse_args(arguments(place, tmp_path / "compiled", "--compile")))
    known = {"num_attention_heads": (4, "text_config's num_attention_heads is 4, and 2 in")}
    known["sep_token_id"] = (102, r"\[SEP\] has the id 3, and by the model's config\.json 102")
    for key, (value, message) in known.items():
        other = json.loads((place / "blip.json").read_text())
        other["text_config"][key] = value
        (tmp_path / "blip.json").write_text(json.dumps(other))
        sizes = f"bert_config={tmp_path / 'blip.json'}"
        with pytest.raises(UserError, match=message):
            train(place, tmp_path / key, sizes, "--checkpoint", str(place / "hub"))
    trained = (place / "run" / "checkpoint_01.pth", tmp_path / "ids", *vocabulary(place), "--set", sizes)
    with pytest.raises(UserError, match=message):
        run_evaluation(place, "grounding.yaml", *trained)
