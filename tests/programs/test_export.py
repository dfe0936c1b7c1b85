"""export.py, and students as --checkpoint: the same maps, refusals, names of the hub, the model card."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import demo
import export
import Pretrain
from config import ConfigError, GroundingConfig, PretrainConfig, load_config
from dataset.photos import read_photo
from dataset.reading import DataError
from grounding import evaluate
from grounding.benchmarks import REFCOCO_PLUS
from grounding.explain import ground
from grounding.load import open_model
from grounding.results import ResultError
from grounding.web.examples import offered
from models.checkpoint import CheckpointError, init_text_encoder, read_checkpoint
from models.pretrain import PretrainModel
from models.student import FILES, StudentError, local_checkpoint
from tests.data_keys import data_keys
from tests.training_runs import arguments
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
HELD = ["README.md", "config.json", "model.safetensors", "vocab.txt"]
SIZE_KEYS = ("bert_config", "image_res", "patch_size", "vision_width", "vision_depth", "vision_heads", "embed_dim")
PHRASE = "the small red triangle"


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A checkpoint of a training run."""
    Pretrain.main(Pretrain.parse_args(arguments(place, place / "run", "--max_steps", "1")))
    return place / "run" / "checkpoint_00.pth"


@pytest.fixture(scope="module")
def student(place: Path, trained: Path) -> Path:
    """Its student in float32. Do not write into it."""
    return exported(place, trained, place / "given" / "student")


def exported(place: Path, checkpoint: Path, out: Path, *words: str) -> Path:
    line = [str(checkpoint), str(out), "--text_encoder", str(place / "data" / "text_encoder"), *words]
    export.main(export.parse_args(line))
    return out


def copied(student: Path, folder: Path) -> Path:
    return Path(shutil.copytree(student, folder / "copy"))


def config_of_evaluation(place: Path, **keys: Any) -> Path:
    """A config with the published sizes, unless `keys` say others."""
    path = place / f"evaluation_{len(list(place.glob('evaluation_*')))}.yaml"
    path.write_text(json.dumps({**data_keys("refcoco", place / "data"), "image_res": 48, "block_num": 1, **keys}))
    return path


def evaluated(config: Path, output: Path, *words: str) -> Path:
    line = ["--config", str(config), "--output_dir", str(output), "--device", "cpu", "--num_workers", "0", *words]
    evaluate.evaluate(REFCOCO_PLUS, evaluate.parse_args(REFCOCO_PLUS, line))
    return output


def maps(output: Path) -> torch.Tensor:
    return torch.stack([row["pred"] for row in torch.load(output / "result" / "epoch00.pth", weights_only=True)])


# ---- the same model


def test_a_student_evaluates_as_its_checkpoint(place: Path, trained: Path, student: Path, tmp_path: Path) -> None:
    """The folder brings sizes and vocabulary; the config of the evaluation says other sizes."""
    assert sorted(path.name for path in student.iterdir()) == HELD
    assert student.stat().st_mode == place.joinpath("given").stat().st_mode
    assert (student / "model.safetensors").stat().st_mode == (student / "config.json").stat().st_mode
    sizes = load_config(place / "config.yaml", PretrainConfig).model_dump()
    config = config_of_evaluation(place, **{key: sizes[key] for key in SIZE_KEYS})
    words = ["--checkpoint", str(trained), "--text_encoder", str(place / "data" / "text_encoder")]
    before = evaluated(config, tmp_path / "before", *words)
    after = evaluated(config_of_evaluation(place), tmp_path / "after", "--checkpoint", str(student))
    assert torch.equal(maps(before), maps(after))
    assert (before / "result" / "log.txt").read_text() == (after / "result" / "log.txt").read_text()
    origins = [json.loads((one / "result" / "epoch00.json").read_text()) for one in (before, after)]
    differ = {key for key in origins[0] if origins[0][key] != origins[1][key]}
    assert differ == {"checkpoint", "checkpoint state", "checkpoint content"}
    assert load_config(after / "config.yaml", GroundingConfig).bert_config == str(student / "config.json")
    evaluated(config_of_evaluation(place), after, "--checkpoint", str(student))  # its own result: skipped
    card = exported(place, trained, tmp_path / "told", "--results", str(before)) / "README.md"
    rows = [line for line in card.read_text().splitlines() if line.startswith("| RefCOCO+ | ")]
    lines = [json.loads(line) for line in (before / "result" / "log.txt").read_text().splitlines()]
    assert rows == [
        f"| RefCOCO+ | {metric} | {key} | {100 * line[key]:.2f} | itm at layer 1, 48 pixels, fp32 |"
        for metric, line in zip(REFCOCO_PLUS.metrics, lines, strict=True)
        for key in line
        if key != "epoch"
    ]
    assert "Measured on the checkpoint" not in card.read_text()
    card = exported(place, trained, tmp_path / "told", "--results", str(before), "--half", "--force") / "README.md"
    assert rows[0] in card.read_text()
    assert export.ROUNDED in card.read_text()
    with pytest.raises(
        ResultError, match=rf"after: holds no complete result of {trained} \(its results are of: {student}"
    ):
        exported(place, trained, tmp_path / "untold", "--results", str(before), str(after))
    assert not (tmp_path / "untold").exists()


def test_a_student_is_asked_as_its_checkpoint(place: Path, trained: Path, student: Path, tmp_path: Path) -> None:
    image = read_photo(next((place / "data" / "images").glob("*.jpg")))
    vocabulary = str(place / "data" / "text_encoder")
    half = exported(place, student, tmp_path / "half", "--half")  # of a student, and with its own vocabulary
    opened = [open_model(trained, None, vocabulary, "cpu"), open_model(student, device="cpu"), open_model(half)]
    assert opened[1].origin == f"the sizes in {student}"
    whole, same, rounded = (ground(each.explainer(), image, PHRASE) for each in opened)
    assert np.array_equal(whole.small, same.small)
    assert np.array_equal(whole.map, same.map)
    assert (whole.match, whole.point, whole.boxes) == (same.match, same.point, same.boxes)
    assert not np.array_equal(whole.small, rounded.small)
    np.testing.assert_allclose(rounded.small, whole.small, atol=0.02 * whole.small.max())
    weights = load_file(student / "model.safetensors")
    for name, tensor in load_file(half / "model.safetensors").items():
        assert torch.equal(tensor, weights[name].half())
    sizes = [(one / "model.safetensors").stat().st_size for one in (half, student)]
    assert 1.8 < sizes[1] / sizes[0] < 2
    line = [
        str(next((place / "data" / "images").glob("*.jpg"))),
        PHRASE,
        "--checkpoint",
        str(half),
        "--output_dir",
        str(tmp_path / "drawn"),
    ]
    demo.main(demo.parse_args([*line, "--device", "cpu"]))
    assert list((tmp_path / "drawn").glob("*.png"))


def test_training_starts_from_a_student(place: Path, trained: Path, student: Path, tmp_path: Path) -> None:
    line = arguments(place, tmp_path, "--max_steps", "1", "--checkpoint", str(student))
    del line[line.index("--text_encoder") : line.index("--text_encoder") + 2]
    args = Pretrain.parse_args(line)
    Pretrain.main(args)
    assert args.text_encoder == str(student)
    model = PretrainModel(load_config(place / "config.yaml", PretrainConfig))
    Pretrain.load_start(model, model.config, args, args.checkpoint)
    saved = torch.load(trained, weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name.replace("_m.", ".")]), name  # the teacher begins as the student
    with pytest.raises(CheckpointError, match="cannot resume, it lacks optimizer"):
        Pretrain.main(Pretrain.parse_args([*line, "--resume"]))
    with pytest.raises(CheckpointError, match="holds a whole model; pass it as --checkpoint"):
        init_text_encoder(model.text_encoder, str(student))


def test_the_published_sizes_are_found_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of the scenes is asked by the scenes' config, as the file that ships; its card holds no paths."""
    out = tmp_path / "amc"
    export.main(export.parse_args(["checkpoints/scenes_amc.safetensors", str(out), "--half"]))
    opened = open_model(out, device="cpu")
    assert opened.origin == "configs/scenes/Grounding_refcoco.yaml, by the checkpoint's sizes"
    assert opened.tokenizer.source == str(out / "vocab.txt")
    shipped = load_file("checkpoints/scenes_amc.safetensors")
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in load_file(out / "model.safetensors").items())
    card = (out / "README.md").read_text()
    assert "tuned by Attention Mask Consistency" in card
    assert '"layer": 3' in card
    assert "data/scenes" not in card
    assert "Not measured." in card
    assert [offer.name for offer in offered([str(out)])] == ["amc"]
    with pytest.raises(ConfigError, match="does not say the sizes of its model; pass --config"):
        export.main(export.parse_args(["checkpoints/scenes_stage1.safetensors", str(tmp_path / "one")]))
    config = "configs/scenes/Grounding_refcoco.yaml"
    export.main(export.parse_args(["checkpoints/scenes_stage1.safetensors", str(tmp_path / "one"), "--config", config]))
    assert open_model(tmp_path / "one", device="cpu").config.block_num == 3


# ---- what is refused


def test_what_stands_at_out_stays(place: Path, trained: Path, student: Path, tmp_path: Path) -> None:
    kept = copied(student, tmp_path)
    with pytest.raises(StudentError, match="copy: exists; choose another OUT, or replace it by --force"):
        exported(place, trained, kept)
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(StudentError, match=f"{name}: exists and is no folder that export.py wrote"):
            exported(place, trained, tmp_path / name, "--force")
    (kept / ".git").mkdir()
    with pytest.raises(StudentError, match=r"copy: exists and holds \.git as well"):
        exported(place, trained, kept, "--force")
    (kept / ".git").rmdir()
    written = (kept / "model.safetensors").stat()
    exported(place, trained, kept, "--force")
    assert (kept / "model.safetensors").stat().st_ino != written.st_ino
    assert sorted(path.name for path in kept.iterdir()) == HELD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file", "mine"]


def test_nothing_is_left_of_what_cannot_be_written(
    place: Path, trained: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, rename = copied(student, tmp_path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise OSError(28, os.strerror(28))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StudentError, match="copy: cannot be written, no space is left"):
        exported(place, trained, kept, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert sorted(path.name for path in kept.iterdir()) == HELD


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json: not valid JSON"),
        ("config.json", b"[]", r"config\.json: .*valid dictionary"),
        ("config.json", b"\x80\x04", r"config\.json: not a text file"),
        ("config.json", b'{"image_res": 48}', r"config\.json: key 'bert_config' is missing"),
        ("config.json", b'{"auto_map": {}, "bert_config": {}}', r"unknown key 'auto_map'"),
        ("config.json", b'{"bert_config": "config_bert.json"}', r"config\.json: key 'bert_config': .*valid dict"),
        ("model.safetensors", b"PK\x03\x04 a pickle", "not a readable checkpoint"),
        ("model.safetensors", b"\x80\x02 a pickle of the old kind", "not a readable checkpoint"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("vocab.txt", b"[PAD]\n[CLS]", r"vocab\.txt: holds no \[MASK\]"),
    ],
)
def test_damaged_folders(name: str, content: bytes, message: str, student: Path, tmp_path: Path) -> None:
    folder = copied(student, tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_model(folder, device="cpu")


def test_incomplete_folders(place: Path, student: Path, tmp_path: Path) -> None:
    folder = copied(student, tmp_path)
    save_file(load_file("checkpoints/scenes_amc.safetensors"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="copy: does not fit the model of this config"):
        open_model(folder, device="cpu")
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"copy: the folder holds no vocab\.txt and no tokenizer\.json"):
        open_model(folder, device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"as a student it lacks config\.json\)"):
        open_model(folder, device="cpu")
    with pytest.raises(evaluate.EvaluationError, match=r"the folder holds no \*\.pth, and no config\.json"):
        evaluated(config_of_evaluation(place), tmp_path / "out", "--checkpoint", str(folder))
    with pytest.raises(UserError, match="copy: no such checkpoint; the page takes"):
        offered([str(folder)])


# ---- the hub


class Hub:
    """Stands for the hub: gives a folder, or raises an error; keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> None:
        self.asked: list[Any] = []
        self.answer = answer
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_a_name_on_the_hub(place: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, student)
    assert open_model("someone/amc", device="cpu").report.path == str(student)
    evaluated(config_of_evaluation(place), tmp_path, "--checkpoint", "someone/amc@v1.0")
    assert [offer[:2] for offer in offered(["someone/amc", str(student)])] == [("amc", student), ("student", student)]
    line = arguments(place, tmp_path / "run", "--max_steps", "1", "--checkpoint", "some-one/amc_2.1@refs/pr/1")
    Pretrain.main(Pretrain.parse_args(line))
    names = [("someone/amc", None), ("someone/amc", "v1.0"), ("someone/amc", None), ("some-one/amc_2.1", "refs/pr/1")]
    assert hub.asked == [(name, {"revision": at, "allow_patterns": list(FILES)}) for name, at in names]


def test_what_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    paths = ["x.pth", "amc", "a/b/c", "some/checkpoint_01.pth", "owner/amc", "./owner", "../amc", "/tmp/x", "a/b@"]
    assert [str(local_checkpoint(path)) for path in paths] == [path.removeprefix("./") for path in paths]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (errors.LocalEntryNotFoundError("no connection"), "neither downloaded nor found in the local cache .no conn"),
        (ConnectionError(), r"local cache \(ConnectionError\); check the network, or pass a folder"),
        (errors.HFValidationError("Repo id must"), r"cache \(Repo id must\)"),
        (DataError("another"), "local cache"),
        (Path("configs"), r"holds no model\.safetensors and no config\.json; export\.py writes such"),
    ],
)
def test_what_the_hub_does_not_give(answer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, answer)
    with pytest.raises(StudentError, match="^--checkpoint no/such: no such local file or folder, and .*" + message):
        open_model("no/such")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.GatedRepoError, "its owner grants access on request"),
        (errors.RevisionNotFoundError, "no/such has no revision v2"),
    ],
)
def test_what_the_hub_refuses(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, kind.__new__(kind))  # its arguments differ from version to version
    with pytest.raises(StudentError, match=f"such@v2: no such local .*hub: {message}"):
        local_checkpoint("no/such@v2")


def test_a_student_reads_as_a_checkpoint(student: Path) -> None:
    content = read_checkpoint(student)
    assert content.keys() == {"model", "config"}
    assert content["config"]["bert_config"] == str(student / "config.json")
    assert content["config"]["amc"]["layer"] == 1
