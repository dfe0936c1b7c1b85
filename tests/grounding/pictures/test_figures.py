"""docs/figures.py and the numbers in its pictures, on a tiny model of large weights."""

import json
from pathlib import Path

import cv2
import matplotlib.text
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from config import AMCConfig, GroundingConfig, PretrainConfig, load_config
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from dataset.transforms import normalise
from docs import figures
from docs.figures import look, parts, terms, training_view
from grounding.explain import Explainer, encode, ground
from grounding.load import open_model
from grounding.pictures.render import RIGHT, WRONG, pixels
from models import amc
from models.albef import build_albef
from tests.drawn import assert_texts_are_apart, at, photo
from tests.small_model import BERT, SIZES
from utils import UserError

PHRASE = "the small red star"
SIDEWAYS_AND_UPRIGHT = pytest.mark.parametrize("size", [(70, 40), (40, 70)])
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's sizes, a vocabulary, a training config. Do not write into it."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "bert.json").write_text(json.dumps(BERT))
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    keys = {**SIZES, "bert_config": str(folder / "bert.json"), "image_root": "", "mask_size": 24}
    amc_keys = {"layer": 2, "mean_over": "sample", "margin_mean": 0.4, "margin_max": 0.2}
    (folder / "training.yaml").write_text(json.dumps({**keys, "train_file": [], "amc": amc_keys}))
    return folder


@pytest.fixture(scope="module")
def explainer(folder: Path) -> Explainer:
    return make_explainer(folder, seed=7)


def make_explainer(folder: Path, seed: int) -> Explainer:
    config = GroundingConfig.model_validate({**SIZES, "bert_config": str(folder / "bert.json"), "image_root": ""})
    model = build_albef(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "temp":
            parameter.normal_(std=0.4, generator=generator)
            if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.add_(1)
    return Explainer(model, load_tokenizer(str(folder)), torch.device("cpu"), "itm", 1)


@pytest.fixture(scope="module")
def config(folder: Path) -> PretrainConfig:
    return load_config(folder / "training.yaml", PretrainConfig)


@pytest.fixture(scope="module")
def two(folder: Path, explainer: Explainer) -> figures.Models:
    return {"one": explainer, "other": make_explainer(folder, seed=8)}


# ---- numbers


def test_the_parts_of_a_map(explainer: Explainer) -> None:
    image = encode(explainer, photo(40, 70))
    seen = look(explainer, image, PHRASE)
    made = parts(seen)
    a, g = seen.attention[0], seen.gradient[0]
    for found, by_hand in zip(made.values(), (a, g, g.clamp(min=0), a * g.clamp(min=0)), strict=True):
        torch.testing.assert_close(found, by_hand.mean(dim=1).mean(dim=0).reshape(3, 3))
    attention, _, positive, product = made.values()
    np.testing.assert_allclose(product, ground(explainer, image, PHRASE).small, rtol=1e-4)
    assert (product - attention * positive).abs().max() > 1e-5  # no mean of the parts' means


@SIDEWAYS_AND_UPRIGHT
def test_a_pair_as_the_loss_sees_it(size: tuple[int, int], explainer: Explainer, config: PretrainConfig) -> None:
    """The map and the terms are those of the loss, the mask covers the box's share of the square."""
    image, (width, height) = photo(*size), size
    view = training_view(explainer, image, PHRASE, [(0, 0, width / 2, height / 2)], config)
    assert view.image.shape == (48, 48, 3)
    assert (view.image[:20, :20] == (255, 0, 0)).all()
    expected = torch.zeros(24, 24)
    expected[:12, :12] = 1
    assert torch.equal(view.mask, expected)
    squared = normalise(cv2.resize(np.asarray(image), (48, 48), interpolation=cv2.INTER_LINEAR))[None]
    model = explainer.model
    cam = model.explain(model.encode(squared), None, explainer.tokenizer([PHRASE]), "itm", 2).maps
    cam = amc.resize(amc.normalise_map(cam), 24)
    torch.testing.assert_close(view.cam, cam[0])
    one = torch.ones(1)
    for mask in (view.mask, 1 - view.mask):
        mean, largest = terms(view.cam, mask, config.amc)
        assert mean.loss == pytest.approx(float(amc.mean_margin_loss(cam, mask[None], one, 0.4, "sample")), abs=1e-6)
        assert largest.loss == pytest.approx(float(amc.max_margin_loss(cam, mask[None], one, 0.2)), abs=1e-6)


def test_terms_by_hand() -> None:
    cam, mask = torch.tensor([[0.9, 0.1], [0.5, 0.3]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    mean, largest = terms(cam, mask, AMCConfig(margin_mean=0.1, margin_max=0.5))
    assert [*mean[1:], mean.loss] == pytest.approx([0.5, 0.4, 0.1, 0], abs=1e-6)
    assert [*largest[1:], largest.loss] == pytest.approx([0.9, 0.5, 0.5, 0.1], abs=1e-6)


def test_boxes_of_a_phrase_make_one_mask(explainer: Explainer, config: PretrainConfig) -> None:
    boxes = [(-5, 0, 15, 10), (30, 20, 10, 20), (39.5, 0, 9, 1)]  # out of the image on the left; the last has no pixel
    mask = training_view(explainer, photo(40, 40), PHRASE, boxes, config).mask
    expected = torch.zeros(24, 24)
    expected[:6, :6] = expected[12:, 18:] = 1
    assert torch.equal(mask, expected)


# ---- pictures


@SIDEWAYS_AND_UPRIGHT
def test_gradcam_figure(size: tuple[int, int], explainer: Explainer) -> None:
    image = photo(*size)
    figure = figures.gradcam_figure(explainer, image, "The small red star!", [(20, 10, 9, 8)])
    drawn = pixels(figure)
    found = ground(explainer, image, PHRASE)
    made = parts(look(explainer, encode(explainer, image), PHRASE))
    titles = [axes.get_title() for axes in figure.axes]
    assert (titles[0], titles[5].splitlines()[1]) == (f'"{PHRASE}"', f"match probability {found.match:.3f}")
    for axes, title, values in zip(figure.axes[1:5], titles[1:5], made.values(), strict=True):
        assert title.splitlines()[1] == f"{values.min():.2g} to {values.max():.2g}"
        (picture,) = axes.get_images()
        np.testing.assert_allclose(picture.get_array(), values)
    assert at(figure.axes[0], drawn, 2, 2) == (255, 0, 0)  # upright
    assert at(figure.axes[0], drawn, size[0] - 3, size[1] - 3) != (255, 0, 0)
    y, x = divmod(int(made["A max(G, 0): the map"].argmax()), 3)
    assert at(figure.axes[4], drawn, x, y) == pytest.approx((253, 231, 36), abs=2)  # viridis' end, in that patch
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(size[0] / size[1])
    assert [line.get_xydata().tolist() for line in figure.axes[5].lines] == [[list(found.point)]]
    assert figure.axes[5].patches[-1].get_bbox().bounds == (19.5, 9.5, 9, 8)


@SIDEWAYS_AND_UPRIGHT
def test_amc_figure(size: tuple[int, int], two: figures.Models, config: PretrainConfig) -> None:
    box = (size[0] / 2, 0, size[0] / 2, size[1] / 2)  # the upper right quarter
    figure = figures.amc_figure(two, photo(*size), PHRASE, [box], config)
    drawn = pixels(figure)
    for (name, model), (inside, outside, line) in zip(two.items(), np.reshape(figure.axes, (2, 3)), strict=True):
        view = training_view(model, photo(*size), PHRASE, [box], config)
        mean, largest = terms(view.cam, view.mask, config.amc)
        assert inside.get_title() == f"{name}: inside\nmean {mean.inside:.3f}, max {largest.inside:.3f}"
        assert outside.get_title() == f"{name}: outside\nmean {mean.outside:.3f}, max {largest.outside:.3f}"
        assert [text.get_text() for text in line.texts if text.get_text()] == [
            f"mean term\nmax(0, {mean.outside:.3f} - {mean.inside:.3f} + 0.4) = {mean.loss:.3f}",
            f"max term\nmax(0, {largest.outside:.3f} - {largest.inside:.3f} + 0.2) = {largest.loss:.3f}",
        ]
        places = {tuple(at) for drawn_line in line.lines for at in np.round(drawn_line.get_xydata(), 5).tolist()}
        expected = {(mean.inside, 1), (mean.outside, 1), (mean.outside + 0.4, 1)}
        expected |= {(largest.inside, 0), (largest.outside, 0), (largest.outside + 0.2, 0)}
        assert places == {(round(x, 5), y) for x, y in expected}
        for axes, part in ((inside, view.mask), (outside, 1 - view.mask)):
            shown = axes.get_images()[1].get_array()
            assert ((shown.mask == 0) == (part.numpy() == 1)).all()
            y, x = divmod(int((view.cam * part).argmax()), 24)
            assert axes.lines[0].get_xydata().tolist() == [[x, y]]
            grey = [len(set(at(axes, drawn, *place))) == 1 for place in ((20, 2), (2, 20))]
            assert grey == [axes is outside, axes is inside]


def test_tables_of_maps(two: figures.Models) -> None:
    """Phrases by model and layers by phrase: the same maps, in their places, and who is right."""
    image, phrases = photo(70, 40), ["circle", "the very big purple square at the bottom of all"]
    found = {
        (name, layer, phrase): ground(model._replace(block=layer), image, phrase)
        for name, model in two.items()
        for layer in (1, 2)
        for phrase in phrases
    }
    x, y = found["other", 1, phrases[1]].point
    boxes = dict(zip(phrases, [(0, 0, 1, 1), (x - 2, y - 2, 5, 5)], strict=True))  # nothing is strictly in the first
    layered = [(name, layer, phrase) for phrase in phrases for name in two for layer in (1, 2)]
    tables = [
        (figures.phrases_figure, [(name, 1, phrase) for name in two for phrase in phrases], list(two)),
        (figures.layers_figure, layered, phrases),
    ]
    for draw, cells, names in tables:
        figure = draw(two, image, phrases, list(boxes.values()))
        for axes, cell in zip(figure.axes, cells, strict=True):
            (line,), (_, shown), point = axes.lines, axes.get_images(), found[cell].point
            left, top, width, height = boxes[cell[2]]
            right = left < point[0] < left + width and top < point[1] < top + height
            assert line.get_xydata().tolist() == [list(point)]
            assert line.get_markerfacecolor() == (RIGHT if right else WRONG)
            assert axes.patches[-1].get_bbox().bounds == (left - 0.5, top - 0.5, width, height)
            np.testing.assert_allclose(shown.get_array(), found[cell].map, atol=1e-4)
        assert RIGHT in {axes.lines[0].get_markerfacecolor() for axes in figure.axes}
        assert [" ".join(text.get_text().split()) for axes in figure.axes for text in axes.texts] == names
        plain = draw(two, image, phrases, [])
        assert {axes.lines[0].get_markerfacecolor() for axes in plain.axes} == {"white"}
        heads = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert heads == ["one\nlayer 1", "one\nlayer 2", "other\nlayer 1", "other\nlayer 2"]


@pytest.mark.parametrize("size", [(40, 70), (70, 40), (8, 8)])
def test_no_text_is_covered(size: tuple[int, int], two: figures.Models, config: PretrainConfig) -> None:
    image, phrases = photo(*size), [PHRASE, "the small red star above the big blue square"]
    assert_texts_are_apart(figures.gradcam_figure(two["one"], image, PHRASE, []))
    assert_texts_are_apart(figures.amc_figure(two, image, PHRASE, [(0, 0, 4, 4)], config))
    assert_texts_are_apart(figures.layers_figure(two, image, phrases, []))
    assert_texts_are_apart(figures.phrases_figure(two, image, phrases, []))


def test_large_pictures_have_fewer_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(2, 2))
    figure.add_axes((0, 0, 1, 1)).imshow(np.asarray(photo(60, 60)))
    figures.save_small(figure, tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(figures, "LARGEST", size - 1)
    figures.save_small(figure, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size < size
    assert [Image.open(tmp_path / name).mode for name in ("a.png", "b.png")] == ["RGB", "P"]


# ---- the program


def run(*words: str) -> None:
    figures.main(figures.parse_args(list(words)))


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> list[str]:
    """Options that name two checkpoints of tiny models, an image and a vocabulary."""
    (folder / "grounding.yaml").write_text(
        json.dumps({**SIZES, "bert_config": str(folder / "bert.json"), "image_root": "", "block_num": 1})
    )
    for name, seed in (("before", 8), ("after", 7)):
        torch.save({"model": make_explainer(folder, seed).model.state_dict()}, folder / f"{name}.pth")
    photo(40, 30).save(folder / "photo.png")
    own, config = str(folder / "grounding.yaml"), ["--training", str(folder / "training.yaml")]
    models = ["--checkpoint", str(folder / "after.pth"), "--config", own]
    models += ["--before", str(folder / "before.pth"), "--before_config", own, "--before_name", "first"]
    return [*models, *config, "--text_encoder", str(folder), "--device", "cpu", "--image", str(folder / "photo.png")]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("phrases", ["first", "after AMC", f'"{PHRASE}"']),
        ("gradcam", ["attention A", "match probability"]),
        ("words", [PHRASE, "whole phrase", "star"]),
        ("amc", ["first: inside", "after AMC: outside", "+ 0.4)", "+ 0.2)"]),
        ("layers", ["first\nlayer 1", "after AMC\nlayer 2"]),
    ],
)
def test_each_figure_by_its_command(
    name: str, told: list[str], checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Figure] = []
    save_small = figures.save_small
    monkeypatch.setattr(figures, "save_small", lambda figure, path: (made.append(figure), save_small(figure, path))[1])
    run(name, *checkpoints, "--phrase", PHRASE, "--box", "2", "3", "9", "8", "--output", str(tmp_path / "a.png"))
    assert [(path.name, Image.open(path).format) for path in tmp_path.iterdir()] == [("a.png", "PNG")]
    (figure,) = made
    texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    assert all(any(part in text for text in texts) for part in told)
    if name in ("phrases", "layers"):
        # Opened as the program does, which changes how products round: the numbers are then the same ones.
        after = open_model(checkpoints[1], checkpoints[3], checkpoints[-5], "cpu").explainer()
        found = ground(after._replace(block=1 if name == "phrases" else 2), photo(40, 30), PHRASE)
        np.testing.assert_allclose(figure.axes[-1].get_images()[1].get_array(), found.map)


def test_command_lines_that_make_no_figure(checkpoints: list[str], tmp_path: Path) -> None:
    image, box = ["--image", "a.png"], ["--box", "1", "1", "2", "2"]
    cases = {
        "go together": ["gradcam", *image],
        "--image, --phrase and --box": ["amc", *box],
        "gradcam is drawn of one --phrase, and there are 2": ["gradcam", *image, "--phrase", "a", "--phrase", "b"],
        "one for each of the 2 phrases": ["layers", *image, "--phrase", "a", "--phrase", "b", *box],
        "give --box X Y W H": ["amc", *image, "--phrase", "a"],
    }
    for message, words in cases.items():
        with pytest.raises(UserError, match=message):
            run(*words)
    with pytest.raises(UserError, match="covers nothing of"):
        run("amc", *checkpoints, "--phrase", "a", "--box", "50", "1", "2", "2", "--output", str(tmp_path / "a.png"))


def test_without_options_the_pages_example_is_asked() -> None:
    for name, example in figures.EXAMPLES.items():
        assert figures.question(figures.parse_args([name])) == example
        assert len(example.boxes) == len(example.phrases)
