"""Where `prepare.py check` is tested: a small data set to damage, or a training config of three entries."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import prepare
from tests.dataset.raw.check_damage import EVALUATION, ROOT, SCENES, TRAIN, Check, Outcome


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set. Do not write into it."""
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    counts = ["--train", str(TRAIN), "--annotated", str(TRAIN), "--eval", str(EVALUATION), "--size", "48"]
    args = prepare.parse_args(["scenes", str(out), *counts])
    args.run(args)
    return out


@pytest.fixture
def place(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the shipped configs and a data/scenes of its own."""
    shutil.copytree(scenes, tmp_path / SCENES)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `prepare.py check` and return its exit status and what it prints."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        args = prepare.parse_args(["check", *words])
        status = 0
        try:
            args.run(args)
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, capsys.readouterr().out)

    return run


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training config of three entries about two images of 20 x 10 pixels, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(f"images/{name}")
    rows = [{"image": image, "caption": "a dog", "bbox": [[0, 0, 5, 5]]} for image in ("a.png", "b.png")]
    Path("train.json").write_text(json.dumps([*rows, {**rows[1], "caption": ["a cat", "cat"], "bbox": []}]))
    bert = {"fusion_layer": 1, "encoder_width": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    Path("bert.json").write_text(json.dumps(bert))
    sizes = {"image_res": 8, "patch_size": 4, "vision_width": 8, "vision_heads": 2, "amc": {"layer": 1}}
    files = {"train_file": ["train.json"], "image_root": "images", "bert_config": "bert.json"}
    Path("some.yaml").write_text(json.dumps({**sizes, **files}))  # JSON is YAML
    return tmp_path
