"""docs/figures.py and the numbers in its pictures, on a tiny model of large weights."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.random import default_rng
from PIL import Image

from config import GroundingConfig, PretrainConfig
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from dataset.transforms import normalise
from docs import figures
from docs.figures import look, parts, terms, training_view
from grounding.explain import Explainer, encode, ground
from grounding.load import open_model
from models import amc
from models.albef import build_albef
from tests.small_model import BERT, SIZES
from utils import UserError

PHRASE = "the small red star"
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
    return figures.load_config(folder / "training.yaml", PretrainConfig)


def photo(width: int, height: int) -> Image.Image:
    """Noise with a red upper left corner."""
    pixels = default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    return Image.fromarray(pixels)


def drawn(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


# ---- numbers


def test_the_parts_of_a_map(explainer: Explainer) -> None:
    image = encode(explainer, photo(40, 70))
    seen = look(explainer, image, PHRASE)
    made = parts(seen)
    assert seen.token_mask is not None
    assert seen.token_mask.tolist() == [[1] * 5]  # [CLS] and four words
    a, g = seen.attention[0], seen.gradient[0]
    for found, by_hand in zip(made.values(), (a, g, g.clamp(min=0), a * g.clamp(min=0)), strict=True):
        torch.testing.assert_close(found, by_hand.mean(dim=1).mean(dim=0).reshape(3, 3))
    attention, _, positive, product = made.values()
    np.testing.assert_allclose(product, ground(explainer, image, PHRASE).small, rtol=1e-4)
    assert seen.gradient.min() < 0 <= positive.min()
    assert (product - attention * positive).abs().max() > 1e-5  # no mean of the parts' means


def test_terms_by_hand() -> None:
    cam = torch.tensor([[0.9, 0.1], [0.5, 0.3]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    options = figures.AMCConfig(margin_mean=0.2, margin_max=0.5)
    small = figures.AMCConfig(margin_mean=0.1, margin_max=0.3)
    for found, mean, largest in (
        (terms(cam, mask, options), (0.5, 0.4, 0.2, 0.1), (0.9, 0.5, 0.5, 0.1)),
        (terms(cam, 1 - mask, options), (0.4, 0.5, 0.2, 0.3), (0.5, 0.9, 0.5, 0.9)),
        (terms(cam, mask, small), (0.5, 0.4, 0.1, 0.0), (0.9, 0.5, 0.3, 0.0)),
    ):
        assert [term.name for term in found] == ["mean", "max"]
        assert [term[1:] for term in found] == [pytest.approx(mean, abs=1e-6), pytest.approx(largest, abs=1e-6)]


@pytest.mark.parametrize("size", [(40, 70), (70, 40)])
def test_a_pair_as_the_loss_sees_it(size: tuple[int, int], explainer: Explainer, config: PretrainConfig) -> None:
    """The map and the terms are those of the loss, the mask covers the box's share of the square."""
    image, (width, height) = photo(*size), size
    view = training_view(explainer, image, PHRASE, [(0, 0, width / 2, height / 2)], config)
    assert view.image.shape == (48, 48, 3)
    assert (view.image[:20, :20] == (255, 0, 0)).all()
    expected = torch.zeros(24, 24)
    expected[:12, :12] = 1
    assert torch.equal(view.mask, expected)
    pixels = normalise(cv2.resize(np.asarray(image), (48, 48), interpolation=cv2.INTER_LINEAR))[None]
    model = explainer.model
    cam = model.explain(model.encode(pixels), None, explainer.tokenizer([PHRASE]), "itm", 2).maps
    cam = amc.resize(amc.normalise_map(cam), 24)
    torch.testing.assert_close(view.cam, cam[0])
    (mean, largest), one = terms(view.cam, view.mask, config.amc), torch.ones(1)
    assert mean.loss == float(amc.mean_margin_loss(cam, expected[None], one, 0.4, "sample"))
    assert largest.loss == float(amc.max_margin_loss(cam, expected[None], one, 0.2))
    for term, margin in ((mean, 0.4), (largest, 0.2)):
        assert term.loss == pytest.approx(max(0, term.outside - term.inside + margin), abs=1e-6)
    assert mean.inside == pytest.approx(float(view.cam[:12, :12].mean()))
    assert largest.inside == pytest.approx(float(view.cam[:12, :12].max()))


def test_boxes_of_a_phrase_make_one_mask(explainer: Explainer, config: PretrainConfig) -> None:
    boxes = [(-5, 0, 15, 10), (30, 20, 10, 20), (39.5, 0, 9, 1)]  # out of the image on the left; the last has no pixel
    mask = training_view(explainer, photo(40, 40), PHRASE, boxes, config).mask
    expected = torch.zeros(24, 24)
    expected[:6, :6] = expected[12:, 18:] = 1
    assert torch.equal(mask, expected)


# ---- pictures


def texts(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def at(axes: Axes, pixels: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    across, up = axes.transData.transform((x, y))
    return tuple(pixels[round(len(pixels) - 1 - up), round(across)].tolist())


@pytest.mark.parametrize("size", [(40, 70), (70, 40)])
def test_gradcam_figure(size: tuple[int, int], explainer: Explainer) -> None:
    image = photo(*size)
    figure = figures.gradcam_figure(explainer, image, "The small red star!", [(20, 10, 9, 8)])
    pixels = drawn(figure)
    found = ground(explainer, image, PHRASE)
    made = parts(look(explainer, encode(explainer, image), PHRASE))
    titles = texts(figure)
    assert (titles[0], titles[5].splitlines()[1]) == (f'"{PHRASE}"', f"match probability {found.match:.3f}")
    for axes, title, values in zip(figure.axes[1:5], titles[1:5], made.values(), strict=True):
        assert title.splitlines()[1] == f"{values.min():.2g} to {values.max():.2g}"
        (picture,) = axes.get_images()
        np.testing.assert_allclose(picture.get_array(), values)
    assert at(figure.axes[0], pixels, 2, 2) == (255, 0, 0)  # upright
    assert at(figure.axes[0], pixels, size[0] - 3, size[1] - 3) != (255, 0, 0)
    y, x = divmod(int(made["A max(G, 0): the map"].argmax()), 3)
    hottest = at(figure.axes[4], pixels, (x + 0.5) * size[0] / 3, (y + 0.5) * size[1] / 3)
    assert hottest == pytest.approx((253, 231, 36), abs=2)  # viridis' end, in the place of that patch
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(size[0] / size[1])
    assert [line.get_xydata().tolist() for line in figure.axes[5].lines] == [[list(found.point)]]
    assert figure.axes[5].patches[-1].get_bbox().bounds == (19.5, 9.5, 9, 8)


@pytest.mark.parametrize("size", [(40, 70), (70, 40)])
def test_amc_figure(size: tuple[int, int], folder: Path, explainer: Explainer, config: PretrainConfig) -> None:
    models = {"one": explainer, "other": make_explainer(folder, seed=8)}
    box = (size[0] / 2, 0, size[0] / 2, size[1] / 2)  # the upper right quarter
    figure = figures.amc_figure(models, photo(*size), PHRASE, [box], config)
    pixels = drawn(figure)
    assert len(figure.axes) == 6
    for row, (name, model) in enumerate(models.items()):
        inside, outside, line = figure.axes[3 * row : 3 * row + 3]
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
            assert ((shown.mask == 0) == (part.numpy() == 1)).all()  # type: ignore[union-attr]
            y, x = divmod(int((view.cam * part).argmax()), 24)
            assert axes.lines[0].get_xydata().tolist() == [[x, y]]
            grey = [len(set(at(axes, pixels, *place))) == 1 for place in ((20, 2), (2, 20))]
            assert grey == [axes is outside, axes is inside]
    assert len({text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()}) == 4


def test_phrases_figure(folder: Path, explainer: Explainer) -> None:
    image, phrases = photo(70, 40), [PHRASE, "circle"]
    models = {"one": explainer, "other": make_explainer(folder, seed=8)}
    answers = [ground(model, image, phrase) for model in models.values() for phrase in phrases]
    x, y = answers[1].point
    figure = figures.phrases_figure(models, image, phrases, [(0, 0, 1, 1), (x - 2, y - 2, 5, 5)])
    assert [title.replace("\n", " ") for title in texts(figure)] == [
        f'{name}: "{phrase}"' for name in models for phrase in phrases
    ]
    for axes, found in zip(figure.axes, answers, strict=True):
        assert axes.lines[0].get_xydata().tolist() == [list(found.point)]
        np.testing.assert_allclose(axes.get_images()[1].get_array(), found.map, atol=1e-4)
    colours = [axes.lines[0].get_markerfacecolor() for axes in figure.axes]
    assert colours[:2] == [figures.WRONG, figures.RIGHT]


def test_layers_figure(folder: Path, explainer: Explainer) -> None:
    image, phrases = photo(70, 40), ["circle", "the very big purple square at the bottom of all"]
    models = {"one": explainer, "other": make_explainer(folder, seed=8)}
    points = {}
    for name, model in models.items():
        for block in (1, 2):
            points[name, block] = [ground(model._replace(block=block), image, phrase).point for phrase in phrases]
    x, y = points["other", 2][1]
    boxes = [(0, 0, 1, 1), (x - 2, y - 2, 5, 5)]  # nothing is strictly inside the first
    figure = figures.layers_figure(models, image, phrases, boxes)
    drawn(figure)
    heads = [axes.texts[0].get_text() for axes in figure.axes[:4]]
    assert heads == ["one\nlayer 1", "one\nlayer 2", "other\nlayer 1", "other\nlayer 2"]
    for row, (phrase, box) in enumerate(zip(phrases, boxes, strict=True)):
        cells = figure.axes[4 * row : 4 * row + 4]
        assert cells[0].texts[-1].get_text().split() == phrase.split()
        for axes, found in zip(cells, points.values(), strict=True):
            (line,) = axes.lines
            right = row == 1 and box[0] < found[1][0] < box[0] + 5 and box[1] < found[1][1] < box[1] + 5
            assert line.get_xydata().tolist() == [list(found[row])]
            assert line.get_markerfacecolor() == (figures.RIGHT if right else figures.WRONG)
            assert axes.patches[-1].get_bbox().bounds == (box[0] - 0.5, box[1] - 0.5, box[2], box[3])
    assert figure.axes[7].lines[0].get_markerfacecolor() == figures.RIGHT
    plain = figures.layers_figure(models, image, phrases, [])
    assert {axes.lines[0].get_markerfacecolor() for axes in plain.axes} == {"white"}


@pytest.mark.parametrize("size", [(40, 70), (70, 40), (8, 8)])
def test_no_text_is_cut_or_covered(
    size: tuple[int, int], folder: Path, explainer: Explainer, config: PretrainConfig
) -> None:
    image, models = photo(*size), {"stage 1": explainer, "AMC": explainer}
    long = "the small red star above the big blue square"
    made = [
        figures.gradcam_figure(explainer, image, PHRASE, []),
        figures.amc_figure(models, image, PHRASE, [(0, 0, 4, 4)], config),
        figures.layers_figure(models, image, [PHRASE, long], []),
        figures.phrases_figure(models, image, [PHRASE, long], []),
    ]
    for figure in made:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        found = [text for axes in figure.axes for text in (axes.title, *axes.texts) if text.get_text()]
        found += figure.legends[0].get_texts() if figure.legends else []
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in found]
        assert len(boxes) >= 4
        for text, box in zip(found, boxes, strict=True):
            assert box.x0 >= 0, text
            assert box.y0 >= 0, text
            assert box.x1 <= figure.bbox.x1, text
            assert box.y1 <= figure.bbox.y1, text
        for k, box in enumerate(boxes):
            for other in boxes[:k]:
                assert not box.padded(-1).overlaps(other.padded(-1)), found[k]


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


@pytest.mark.parametrize("name", figures.EXAMPLES)
def test_each_figure_by_its_command(
    name: str, checkpoints: list[str], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def keep(figure: Figure, path: Path) -> None:
        made[str(path)] = figure
        figures_save(figure, path)

    figures_save = figures.save_small
    monkeypatch.setattr(figures, "save_small", keep)
    box = ["--box", "2", "3", "9", "8"]
    run(name, *checkpoints, "--phrase", PHRASE, *box, "--output", str(tmp_path / "a.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    (figure,) = made.values()
    written = Image.open(tmp_path / "a.png")
    assert written.size == FigureCanvasAgg(figure).get_width_height()
    difference = np.asarray(written.convert("RGB"), int) - drawn(figure)
    assert np.abs(difference).mean() < 8
    # The checkpoint opened as the program does, which changes how products round: the numbers are then the same ones.
    opened = open_model(folder / "after.pth", folder / "grounding.yaml", str(folder), "cpu").explainer()
    found = ground(opened, photo(40, 30), PHRASE)
    heads = texts(figure) if name != "layers" else [axes.texts[0].get_text() for axes in figure.axes]
    if name == "gradcam":
        assert heads[5].endswith(f"{found.match:.3f}")
    elif name == "words":
        assert heads[0] == "whole phrase"
        assert heads[1:] == [f"{word.word} {100 * word.share:.0f}%" for word in found.words]
    else:
        assert [head.split("\n")[0].split(":")[0] for head in (heads[0], heads[-2 if name == "amc" else -1])] == [
            *("first", "after AMC")
        ]
    if name == "amc":
        training = figures.load_config(folder / "training.yaml", PretrainConfig)
        view = training_view(opened, photo(40, 30), PHRASE, [(2, 3, 9, 8)], training)
        assert f"mean {terms(view.cam, view.mask, training.amc)[0].inside:.3f}" in heads[3]
    elif name == "layers":
        last = ground(opened._replace(block=2), photo(40, 30), PHRASE)
        np.testing.assert_allclose(figure.axes[-1].get_images()[1].get_array(), last.map)


def test_large_pictures_have_fewer_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(2, 2))
    figure.add_axes((0, 0, 1, 1)).imshow(np.asarray(photo(60, 60)))
    figures.save_small(figure, tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(figures, "LARGEST", size - 1)
    figures.save_small(figure, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size < size
    assert [Image.open(tmp_path / name).mode for name in ("a.png", "b.png")] == ["RGB", "P"]
    assert (np.asarray(Image.open(tmp_path / "a.png")) == drawn(figure)).all()


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
