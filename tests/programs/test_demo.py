"""demo.py and the opening of checkpoints: which config, which vocabulary, which files are written, what is said."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from config import ConfigError, GroundingConfig, PretrainConfig, load_config
from dataset.photos import read_photo
from dataset.reading import DataError
from dataset.scenes import files as scenes_files
from dataset.transforms import resize_bilinear_image
from grounding.benchmarks import FLICKR, REFCOCO_PLUS
from grounding.explain import encode, ground, ground_all
from grounding.load import config_of, open_model
from grounding.maps import ScoredBox
from models.albef import build_albef
from models.checkpoint import CheckpointError
from models.interface import LayerError
from runs import newest_checkpoint
from tests.data_keys import data_keys
from tests.small_model import BERT, SIZES
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's checkpoint, which says its sizes, a vocabulary, and images; do not write into it."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "bert.json").write_text(json.dumps(BERT))
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    trained = {
        **SIZES,
        "bert_config": str(folder / "bert.json"),
        "image_root": "x",
        "train_file": [],
        "amc": {"layer": 2},
    }
    config = PretrainConfig.model_validate(trained)
    torch.manual_seed(3)
    model = build_albef(config).state_dict()
    torch.save({"model": model, "config": config.model_dump(), "epoch": 0}, folder / "tuned.pth")
    torch.save({"model": model}, folder / "silent.pth")
    (folder / "photos" / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6
    for seed, (name, size) in enumerate((("b.jpg", (30, 20)), ("a.png", (9, 8)), ("more/B.png", (12, 12)))):
        grey = np.random.default_rng(seed).normal(128, 90, size[::-1]).clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        image.save(folder / "photos" / name, **({"exif": exif} if name == "b.jpg" else {}))
    (folder / "broken.jpg").write_text("not found")
    return folder


def run(place: Path, output: Path, *words: str) -> None:
    options = ["--checkpoint", str(place / "tuned.pth"), "--text_encoder", str(place), "--device", "cpu"]
    demo.main(demo.parse_args([*words, *options, "--output_dir", str(output)]))


def written(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


# ---- what is written


def test_one_image_and_its_phrases(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = place / "photos" / "b.jpg"
    words = ["--words", "--json", "--npz", "--box", "2", "3", "9", "8"]
    run(place, tmp_path, str(photo), "The red dog!", "circle", *words)
    pictures = ["b_01_the-red-dog.png", "b_02_circle.png"]
    strips = ["b_01_the-red-dog_words.png", "b_02_circle_words.png"]
    assert written(tmp_path) == sorted(["b.json", "b.npz", *pictures, *strips])
    opened = open_model(place / "tuned.pth", text_encoder=str(place), device="cpu")
    found = ground_all(opened.explainer(), read_photo(photo), ["The red dog!", "circle"])
    result = json.loads((tmp_path / "b.json").read_text())
    phrases = result.pop("phrases")
    assert result == {
        "image": str(photo),
        "height": 30,  # stored 20 high, and turned
        "width": 20,
        "checkpoint": str(place / "tuned.pth"),
        "config": f"the sizes in {place / 'tuned.pth'}",
        "image_res": 48,
        "resize": "RefCOCO+",
        "gradcam_mode": "itm",
        "block_num": 2,
        "precision": "fp32",
        "threshold": 0.5,
    }
    arrays = np.load(tmp_path / "b.npz")
    assert arrays["phrases"].tolist() == ["The red dog!", "circle"]
    shown = capsys.readouterr().out
    for k, (row, one, picture) in enumerate(zip(phrases, found, pictures, strict=True), start=1):
        np.testing.assert_allclose(arrays[f"map_{k:02d}"], one.map, atol=1e-6)
        np.testing.assert_allclose(arrays[f"small_{k:02d}"], one.small, rtol=1e-4)
        assert arrays[f"words_{k:02d}"].shape == (len(one.words), 3, 3)
        x, y = one.point
        assert row == {
            "phrase": one.phrase,
            "text": one.text,
            "match": pytest.approx(one.match),
            "point": [x, y],
            "boxes": [{"box": list(box.box), "score": pytest.approx(box.score)} for box in one.boxes],
            "words": [
                {"word": word.word, "pieces": list(word.pieces), "share": pytest.approx(word.share)}
                for word in one.words
            ],
            "truth": [[2, 3, 9, 8]],
            "point_correct": 2 < x < 11 and 3 < y < 11,
            "best_box_iou": pytest.approx(demo.metrics.iou(one.boxes[0].box, [2, 3, 9, 8])),
            "picture": picture,
        }
        assert f"{photo}: {one.text!r}: match {one.match:.3f}, point [{x}, {y}], box {list(one.boxes[0].box)}" in shown
    assert "the sizes in" in shown
    assert "; itm at layer 2" in shown


def test_a_truth_that_is_met() -> None:
    """The point is strictly inside a box; of several true boxes, the one that the best box meets best counts."""
    small = torch.zeros(4, 6)
    small[1, 2] = small[1, 3] = 1.0
    found: Any = SimpleNamespace(small=small.numpy(), map=small.numpy(), boxes=())
    assert demo.against_truth(found, []) == {}
    edge = [[2, 1, 3, 3]]
    assert demo.against_truth(found, edge) == {"truth": edge, "point_correct": False, "best_box_iou": 0.0}
    found.boxes = (ScoredBox((1, 0, 3, 3), 1.0), ScoredBox((1, 0, 3, 2), 0.5))
    both = demo.against_truth(found, [[0, 0, 5, 4], [1, 0, 3, 2]])
    assert (both["point_correct"], both["best_box_iou"]) == (True, pytest.approx(6 / 9))  # the first has 9/20


def test_folders_and_lists_of_images(place: Path, tmp_path: Path) -> None:
    photos = place / "photos"
    run(place, tmp_path / "folder", str(photos), "circle")
    assert written(tmp_path / "folder") == ["a_01_circle.png", "b_01_circle.png"]
    words = ["--phrase", "circle", "--phrase", "a star", "--json"]
    run(place, tmp_path / "list", "--images", str(photos), str(photos / "more" / "B.png"), *words)
    names = [f"{name}_{end}" for name in ("B-2", "a", "b") for end in ("01_circle.png", "02_a-star.png")]
    assert written(tmp_path / "list") == sorted([*names, "B-2.json", "a.json", "b.json"])
    assert json.loads((tmp_path / "list" / "B-2.json").read_text())["width"] == 12


def test_options_reach_the_model(place: Path, tmp_path: Path) -> None:
    photo = place / "photos" / "a.png"
    words = ["--benchmark", "flickr", "--gradcam_mode", "itc", "--block_num", "0", "--set", "image_res=32"]
    words += ["--precision", "bf16", "--force_precision", "--threshold", "0.9"]
    words += ["--json", "--npz", "--word_maps", "--colormap", "jet"]
    run(place, tmp_path, str(photo), "circle", *words)
    result, arrays = json.loads((tmp_path / "a.json").read_text()), np.load(tmp_path / "a.npz")
    said = [result[key] for key in ("resize", "gradcam_mode", "block_num", "image_res", "threshold", "precision")]
    assert said == ["Flickr30k", "itc", 0, 32, 0.9, "bf16"]
    assert sorted(arrays.files) == ["map_01", "phrases", "small_01"]
    opened = open_model(place / "tuned.pth", text_encoder=str(place), device="cpu", overrides=["image_res=32"])
    maps, smalls = [], []
    for precision in ("bf16", "fp32"):
        explainer = opened.explainer("itc", 0, precision)
        (found,) = ground_all(explainer, encode(explainer, read_photo(photo), resize_bilinear_image), ["circle"], 0.9)
        maps.append(found.map)
        smalls.append(found.small)  # a map of one patch is the same in all precisions once it is normalised
        if precision == "bf16":
            assert result["phrases"][0]["boxes"][0]["box"] == list(found.boxes[0].box)
    np.testing.assert_allclose(arrays["map_01"], maps[0], atol=1e-5)
    assert 1e-4 < np.abs(smalls[0] - smalls[1]).max() / smalls[1].max() < 0.1


def test_notes_on_phrases(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place, tmp_path, str(place / "photos" / "a.png"), "a red $ circle", "a " * 31, "circle")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: phrase 'a red $ circle': the vocabulary lacks $; the model reads [UNK]",
        f"note: phrase '{'a ' * 31}': cut to 30 words, as in evaluation",
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^an image and a phrase are missing"),
        ("PHOTO", "^a phrase is missing"),
        ("--phrase x", "^an image is missing"),
        ("PHOTO --images PHOTO", r"a\.png': do not mix a positional image with --images; pass phrases by --phrase"),
        ("PHOTO x --checkpoints one.pth", "^--checkpoints belongs to --web; one --checkpoint answers"),
        ("--images PHOTO nope --phrase x", "^nope: no such file, .*; beside --images, phrases are given by --phrase"),
        ("nope x", "^nope: no such file, folder or pattern; the image comes first"),
        ("PHOTOS x --box 1 1 1 1", "^--box belongs to one image, and there are 2"),
        ("PHOTO x --threshold 1.5", "^the threshold is a share .* not 1.5"),
        ("PHOTO x --colormap nope", "^--colormap nope: no colour map"),
        *(
            (f"PHOTO x --box {box}", r"covers nothing of .*a\.png, which is 9 pixels wide and 8 high")
            for box in ("20 1 3 3", "1 1 0 3", "-5 1 5 3", "1 8 2 2")
        ),
    ],
)
def test_command_lines_that_say_too_little_or_too_much(words: str, message: str, place: Path, tmp_path: Path) -> None:
    paths = {"PHOTO": str(place / "photos" / "a.png"), "PHOTOS": str(place / "photos")}
    with pytest.raises(UserError, match=message):
        run(place, tmp_path, *(paths.get(word, word) for word in words.split()))
    assert not written(tmp_path)


def test_phrases_of_both_kinds(place: Path) -> None:
    photo = place / "photos" / "a.png"
    args = demo.parse_args([str(photo), "x", "--phrase", "y", "--phrase", "z"])
    assert demo.what_to_ask(args) == ([photo], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("images", "strict", "skipped"),
    [
        ("broken.jpg photos/a.png", r"broken\.jpg: not an image.*--skip_broken", 1),
        ("absent.jpg absent*.png broken.jpg photos/a.png", r"absent\.jpg: no such file", 3),
        ("broken.jpg", r"broken\.jpg: not an image.*--skip_broken", 1),
    ],
)
def test_broken_images_are_named_or_skipped(
    images: str, strict: str, skipped: int, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", *(str(place / name) for name in images.split()), "--phrase", "circle"]
    with pytest.raises(DataError, match=strict):
        run(place, tmp_path / "strict", *words)
    if images.endswith("a.png"):
        run(place, tmp_path / "lenient", *words, "--skip_broken")
        assert written(tmp_path / "lenient") == ["a_01_circle.png"]
    else:
        with pytest.raises(DataError, match="none of the images could be read"):
            run(place, tmp_path / "lenient", *words, "--skip_broken")
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == skipped
    left_out = f"{skipped} of {skipped + 1} images could not be read and were left out"
    assert (left_out in printed) == images.endswith("a.png")


def test_a_message_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit, match=r"^error: an image and a phrase are missing"):
        runpy.run_path("demo.py", run_name="__main__")


def test_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DEMO_AMC", tmp_path)
    assert demo.demo_model() == Path("checkpoints/scenes_amc.safetensors")
    assert "ships with the repository" in capsys.readouterr().out
    for epoch in ("09", "99", "100"):
        (tmp_path / f"checkpoint_{epoch}.pth").touch()
    assert demo.demo_model() == newest_checkpoint(tmp_path) == tmp_path / "checkpoint_100.pth"
    assert "knows nothing of photographs" in capsys.readouterr().out


# ---- which config, which vocabulary


def test_the_config_by_the_checkpoints_sizes(place: Path) -> None:
    scenes = load_config("configs/scenes/Pretrain.yaml", PretrainConfig).model_dump()
    config, origin = config_of({"config": scenes}, "x.pth", REFCOCO_PLUS, [])
    assert config == load_config("configs/scenes/Grounding_refcoco.yaml", GroundingConfig)
    assert origin == "configs/scenes/Grounding_refcoco.yaml, by the checkpoint's sizes"
    assert config_of({"config": scenes}, "x.pth", FLICKR, ["block_num=4"])[0] == load_config(
        "configs/scenes/Grounding_flickr.yaml", GroundingConfig, ["block_num=4"]
    )
    # the release's own dict: image_res 256, no sizes beside those that it names
    released = {"bert_config": "configs/config_bert.json", "image_res": 256, "vision_width": 768, "embed_dim": 256}
    assert config_of({"config": released}, "x.pth", REFCOCO_PLUS, [])[0].image_res == 384
    assert config_of({"config": released}, "x.pth", FLICKR, [])[0].image_res == 256
    own = {**released, "vision_depth": 24, "image_res": 128, "amc": {"layer": 7}, "train_file": ["x"]}
    config, origin = config_of({"config": own}, "x.pth", REFCOCO_PLUS, ["embed_dim=64"])
    assert (config.vision_depth, config.image_res, config.block_num, config.embed_dim) == (24, 128, 7, 64)
    assert origin == "the sizes in x.pth"


def test_checkpoints_that_do_not_say_their_sizes(place: Path) -> None:
    names = "configs/Grounding_flickr.yaml or configs/scenes/Grounding_flickr.yaml"
    for content in ({}, {"config": None}, {"config": {"image_res": 256}}):
        with pytest.raises(ConfigError, match=rf"^x\.pth: does not say .* pass --config, for instance {names}"):
            config_of(content, "x.pth", FLICKR, [])
    with pytest.raises(ConfigError, match=r"silent\.pth: does not say"):
        open_model(place / "silent.pth", text_encoder=str(place), device="cpu")
    values = {**SIZES, "bert_config": str(place / "bert.json"), "image_root": "", "block_num": 1}
    config = place.parent / "own.yaml"
    config.write_text(json.dumps(values))
    opened = open_model(place / "silent.pth", config, str(place), "cpu")
    assert (opened.origin, opened.explainer().block) == (str(config), 1)
    with pytest.raises(CheckpointError, match="does not fit the model of this config"):
        open_model(place / "silent.pth", config, str(place), "cpu", overrides=["embed_dim=4"])


def test_an_opened_model_is_ready_to_be_asked(place: Path) -> None:
    opened = open_model(place / "tuned.pth", text_encoder=str(place), device="cpu")
    assert (opened.explainer().mode, opened.explainer().block) == ("itm", 2)
    with pytest.raises(LayerError, match="--block_num 0: the fusion layers are 1 to 2"):
        opened.explainer("itm", 0)
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert not opened.model.training


def test_the_vocabulary_must_be_the_models(place: Path, bert_vocab: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(bert_vocab.read_bytes())
    with pytest.raises(ConfigError, match=r"30522 word pieces, and .*bert\.json says 122; pass the --text_encoder"):
        open_model(place / "tuned.pth", text_encoder=str(tmp_path), device="cpu")


def test_what_ships_needs_nothing_else(tmp_path: Path) -> None:
    """A fresh clone: both models of the scenes open, and the AMC model finds most phrases of the scenes that ship."""
    assert Path("configs/scenes/vocab.txt").read_text().split() == scenes_files.vocabulary()
    stage1, config = Path("checkpoints/scenes_stage1.safetensors"), "configs/scenes/Grounding_refcoco.yaml"
    opened = open_model(stage1, config, device="cpu")
    assert (opened.tokenizer.vocab_size, opened.report.loaded) == (122, 177)
    opened = open_model(demo.SHIPPED_AMC, device="cpu")
    assert opened.report.loaded == 177
    assert (opened.origin, opened.config.block_num) == (f"{config}, by the checkpoint's sizes", 3)
    shown = Path("docs/images/scenes")
    scenes_files.generate(tmp_path, seed=0, train=1, annotated=1, evaluation=22)
    expected = REFCOCO_PLUS.load(GroundingConfig(**data_keys("refcoco", tmp_path)))
    rows = [(row["image"], row["text"]) for row in json.loads((shown / "phrases.json").read_text())]
    expressions = [one for one in expected if (Path(one.image).name, one.text) in rows]
    assert len(expressions) == len(rows) == 16
    right = {}
    for one in expressions:
        image, drawn = read_photo(shown / Path(one.image).name), read_photo(Path(one.image))
        assert np.abs(np.asarray(image, int) - np.asarray(drawn, int)).mean() < 1  # another libjpeg rounds differently
        found = ground(opened.explainer(), image, one.text)
        right[one.text] = demo.against_truth(found, one.boxes.tolist())["point_correct"]
    assert right["the small red triangle"]  # of README and docs/demo.md
    assert sum(right.values()) >= 12, right


def test_names_of_files() -> None:
    paths = [Path(name) for name in ("a/x.jpg", "b/x.png", "X.gif", "x-2.jpg", "y.z.jpg")]
    assert list(demo.file_names(paths).values()) == ["x", "x-2", "X-3", "x-2-2", "y.z"]
    assert [demo.slug(text) for text in ("The dog, left", "日本", "a/../b", "x" * 60)] == [
        "the-dog-left",
        "phrase",
        "a-b",
        "x" * 40,
    ]
