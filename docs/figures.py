"""The pictures of the README and of docs/gradcam.md: phrases and their maps, what a map is made of, and AMC's loss.

    python docs/figures.py phrases    three phrases and their maps, before AMC and after
    python docs/figures.py gradcam    attention, gradient, their product, the map
    python docs/figures.py words      the map of each word
    python docs/figures.py amc        the two terms of AMC's loss, before AMC and after
    python docs/figures.py layers     every fusion layer, before AMC and after

Without --image, the pages' own examples are drawn, by the two models that ship.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from PIL import Image
from torch import Tensor

import utils
from config import AMCConfig, AugmentConfig, PretrainConfig, load_config
from dataset.photos import read_photo
from dataset.refer import MAX_WORDS
from dataset.scenes.paths import SHIPPED, SHIPPED_AMC, SHIPPED_CONFIG, SHOWN
from dataset.text import clean_caption
from dataset.transforms import augment_for_amc, resize_bilinear_image
from dataset.vg import clip_box
from demo import check_boxes
from grounding import maps, metrics
from grounding.explain import EncodedImage, Explainer, Grounding, clean_phrase, encode, ground, ground_all
from grounding.load import open_model
from grounding.pictures.overlay import SMALL, word_strip, wrap
from grounding.pictures.render import COLORMAP, DPI, RIGHT, WRONG, DrawnBox, draw, pixels
from models import amc
from models.interface import Explanation

Box = Sequence[float]  # [x, y, w, h] in pixels of the image
Models = dict[str, Explainer]  # by the name that the picture gives them


class Question(NamedTuple):
    """An image, its phrases, and their true boxes."""

    image: str
    phrases: Sequence[str]
    boxes: Sequence[Box]


TRIANGLE = Question(f"{SHOWN}/100000.jpg", ["the small red triangle"], [(19, 77, 20, 18)])
SQUARE = (57, 15, 36, 36)
SCENE_31 = Question(
    f"{SHOWN}/100031.jpg",
    ["the largest cross", "purple square", "biggest square"],
    [(45, 54, 39, 39), SQUARE, SQUARE],
)
EXAMPLES = {
    "phrases": SCENE_31,
    "gradcam": TRIANGLE,
    "words": TRIANGLE,
    "amc": Question(SCENE_31.image, ["biggest square"], [SQUARE]),
    "layers": SCENE_31,
}
ONE_PHRASE = ("gradcam", "words", "amc")
WIDTH, PART, PHRASE, LAYER = 7.6, 2.42, 2.65, 0.93  # inches: of a picture, and of a panel in one
LINE = 0.17  # inches, of small text
LARGEST = 150_000  # bytes
AS_IT_IS = AugmentConfig(flip_prob=0, grayscale_prob=0, jitter_prob=0)
MARK: dict[str, Any] = {"ms": 9, "mfc": "white", "mec": "black", "mew": 1.5, "ls": "none", "clip_on": False}
MISSING: dict[str, Any] = {"color": WRONG, "lw": 5, "solid_capstyle": "butt", "label": "the term: what is missing"}


# ---- numbers


def look(explainer: Explainer, image: EncodedImage, phrase: str) -> Explanation:
    """Attention and gradient of one phrase by the explainer's mode and layer."""
    ((_, seen, _, _),) = explainer.answers(image.encoded, [clean_phrase(explainer, phrase)])
    return seen


def parts(seen: Explanation) -> dict[str, Tensor]:
    """What the map of one phrase is made of, by title, each (h, w): means over heads and tokens."""
    a, g = seen.attention[0], seen.gradient[0]
    whole = {"attention A": a, "gradient G of the match logit": g, "max(G, 0)": g.clamp(min=0)}
    made = {title: x.mean(dim=(0, 1)).unflatten(-1, seen.grid).cpu() for title, x in whole.items()}
    return {**made, "A max(G, 0): the map": seen.maps[0].cpu()}


class Training(NamedTuple):
    """A pair as AMC's loss sees it, unflipped and in its own colours.

    image: uint8 (r, r, 3); cam: (s, s), normalised and resized; mask: (s, s) of 0 and 1.
    """

    image: np.ndarray
    cam: Tensor
    mask: Tensor


def training_view(
    explainer: Explainer, image: Image.Image, phrase: str, boxes: Sequence[Box], config: PretrainConfig
) -> Training:
    """Map and mask of a phrase with its boxes, by the steps of training."""
    covered = np.zeros((image.height, image.width), np.uint8)
    for x, y, w, h in boxes:
        if (box := clip_box([x, y, x + w, y + h], image.height, image.width)) is not None:
            covered[box[1] : box[3], box[0] : box[2]] = 1
    rng, side = np.random.default_rng(0), explainer.model.image_res
    pixels, mask, _ = augment_for_amc(np.asarray(image), covered, phrase, AS_IT_IS, side, config.mask_size, rng)
    encoded = encode(explainer, Image.fromarray(pixels), resize_bilinear_image)
    cam = look(explainer._replace(block=config.amc.layer), encoded, phrase).maps.cpu()
    return Training(pixels, amc.resize(amc.normalise_map(cam), config.mask_size)[0], torch.from_numpy(mask).float())


class Term(NamedTuple):
    """A term of AMC's loss on one pair, before its weight: max(0, outside - inside + margin)."""

    name: str
    inside: float
    outside: float
    margin: float
    loss: float


def terms(cam: Tensor, mask: Tensor, options: AMCConfig) -> tuple[Term, Term]:
    """L_mean and L_max of one map (s, s) and mask (s, s), by `models.amc`."""
    pair, outside = (cam[None], mask[None], torch.ones(1)), 1 - mask
    by_mean = amc.mean_margin_loss(*pair, options.margin_mean, options.mean_over)
    by_max = amc.max_margin_loss(*pair, options.margin_max)
    mean_inside, mean_outside = (float((cam * part).sum() / part.sum()) for part in (mask, outside))
    max_inside, max_outside = (float((cam * part).max()) for part in (mask, outside))
    return (
        Term("mean", mean_inside, mean_outside, options.margin_mean, float(by_mean)),
        Term("max", max_inside, max_outside, options.margin_max, float(by_max)),
    )


# ---- pictures


def phrases_figure(models: Models, image: Image.Image, phrases: Sequence[str], boxes: Sequence[Box]) -> Figure:
    """A row a model: the map of each phrase, with its point and true box; boxes, one a phrase, tell who is right."""
    answers = {name: ground_all(explainer, encode(explainer, image), phrases) for name, explainer in models.items()}
    titles = [wrap(f'{name}: "{found.text}"', PHRASE, SMALL) for name, row in answers.items() for found in row]
    head = 0.08 + LINE * max(map(len, titles))
    figure, grid = _panels(len(models), len(phrases), image.size, PHRASE, head)
    found = [(one, boxes[k : k + 1]) for row in answers.values() for k, one in enumerate(row)]
    for axes, title, (one, box) in zip(grid, titles, found, strict=True):
        _show(axes, image, "\n".join(title), one, box, judged=True)
    return figure


def gradcam_figure(explainer: Explainer, image: Image.Image, phrase: str, boxes: Sequence[Box]) -> Figure:
    """The image, then A, G, max(G, 0), A * max(G, 0) on the grid of patches, then the map at the image's size."""
    encoded = encode(explainer, image)
    made, found = parts(look(explainer, encoded, phrase)), ground(explainer, encoded, phrase)
    figure, grid = _panels(2, 3, image.size, PART, head=0.42)
    _show(grid[0], image, f'"{found.text}"')
    for axes, (title, values) in zip(grid[1:5], made.items(), strict=True):
        low, high = float(values.min()), float(values.max())
        spread = max(-low, high)
        colours: dict[str, Any] = (
            {"cmap": "RdBu_r", "vmin": -spread, "vmax": spread} if low < 0 else {"cmap": COLORMAP, "vmin": 0}
        )
        extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
        axes.imshow(values.numpy(), extent=extent, aspect="auto", interpolation="nearest", **colours)
        _title(axes, f"{title}\n{low:.2g} to {high:.2g}")
    _show(grid[5], image, f"the map at the image's size\nmatch probability {found.match:.3f}", found, boxes)
    return figure


def amc_figure(models: Models, image: Image.Image, phrase: str, boxes: Sequence[Box], config: PretrainConfig) -> Figure:
    """A row a model: the map in the box, the map outside of it, and both terms as distances on a line."""
    side, gap, head, foot = 2.15, 0.1, 0.42, 0.5
    total = len(models) * (side + head + gap) + foot
    figure = Figure(figsize=(WIDTH, total), dpi=DPI)
    for row, (name, explainer) in enumerate(models.items()):
        view = training_view(explainer, image, phrase, boxes, config)
        found = terms(view.cam, view.mask, config.amc)
        bottom = (total - (row + 1) * (side + head + gap)) / total
        for column, (where, part, mark) in enumerate((("inside", view.mask, "o"), ("outside", 1 - view.mask, "X"))):
            x = gap + column * (side + gap)
            axes = figure.add_axes((x / WIDTH, bottom, side / WIDTH, side / total))
            _half(axes, view, part, mark)
            mean, largest = (getattr(term, where) for term in found)
            _title(axes, f"{name}: {where}\nmean {mean:.3f}, max {largest:.3f}")
        x = 2 * (side + gap) + 3 * gap
        line = figure.add_axes((x / WIDTH, bottom + 0.25 / total, (WIDTH - x - gap) / WIDTH, side / total))
        handles = _hinges(line, found)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, prop=SMALL)
    return figure


def _half(axes: Axes, view: Training, part: Tensor, mark: str) -> None:
    """The map where `part` is 1, the image in grey where it is not; the mask's border, and a mark at the maximum."""
    size = (part.shape[1], part.shape[0])
    axes.imshow(Image.fromarray(view.image).convert("L").resize(size), cmap="gray", vmin=-120, vmax=255)
    axes.imshow(
        np.ma.masked_array(view.cam.numpy(), part.numpy() == 0),
        cmap=COLORMAP,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.contour(view.mask.numpy(), levels=[0.5], colors="white", linewidths=1.5)
    y, x = divmod(int((view.cam * part).argmax()), part.shape[1])
    axes.plot(x, y, mark, **MARK)
    axes.set_axis_off()


def _hinges(axes: Axes, found: Sequence[Term]) -> list[Line2D]:
    """Terms as distances: the inside, where it should be at least, and what is missing; returns a legend's handles."""
    least_mark: dict[str, Any] = {"marker": "|", "color": "#555555", "ls": "none", "ms": 16, "mew": 2}
    arrow = {"arrowstyle": "->", "color": "#555555", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    for y, (name, inside, outside, margin, loss) in zip((1, 0), found, strict=True):
        least = outside + margin
        axes.annotate("", (least, y), (outside, y), arrowprops=arrow)
        missing = axes.plot([inside, least] if loss > 0 else [], [y, y] if loss > 0 else [], **MISSING)
        wanted = axes.plot(least, y, label="outside + margin", **least_mark)
        (circle,) = axes.plot(inside, y, "o", label="inside", **MARK)
        (cross,) = axes.plot(outside, y, "X", label="outside", **MARK)
        text = f"{name} term\nmax(0, {outside:.3f} - {inside:.3f} + {margin:g}) = {loss:.3f}"
        axes.text(0, y + 0.2, text, fontproperties=SMALL, va="bottom")
    axes.set(xlim=(-0.05, 1.05 + max(term.margin for term in found)), ylim=(-0.3, 1.75), yticks=[])
    axes.tick_params(labelsize=8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    return [circle, cross, *wanted, *missing]


def layers_figure(models: Models, image: Image.Image, phrases: Sequence[str], boxes: Sequence[Box]) -> Figure:
    """A row a phrase: its map at every fusion layer of every model; boxes, one a phrase, tell who is right."""
    columns = [(name, asked, block) for name, asked in models.items() for block in asked.model.layers("itm")]
    encoded = {name: encode(explainer, image) for name, explainer in models.items()}
    names = [wrap(clean_caption(phrase, MAX_WORDS), len(columns) * LAYER, SMALL) for phrase in phrases]
    head = 0.08 + LINE * max(map(len, names))
    figure, grid = _panels(len(phrases), len(columns), image.size, LAYER, head, top=2 * LINE)
    for column, (name, explainer, block) in enumerate(columns):
        answers = ground_all(explainer._replace(block=block), encoded[name], phrases)
        _above(grid[column], f"{name}\nlayer {block}", 0.5, head)
        for row, found in enumerate(answers):
            _show(grid[row * len(columns) + column], image, "", found, boxes[row : row + 1], judged=True)
    for row, lines in enumerate(names):
        _above(grid[row * len(columns)], "\n".join(lines), 0, 0.04)
    return figure


# ---- parts of pictures


def _panels(
    rows: int, columns: int, size: tuple[int, int], width: float, head: float, top: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels `width` inches wide, of an image's proportions, by row; `head` inches above each are for its title."""
    gap, height = 0.08, width * size[1] / size[0]
    across, down = gap + columns * (width + gap), top + rows * (head + height + gap) + gap
    figure = Figure(figsize=(across, down), dpi=DPI)
    axes = []
    for row in range(rows):
        for column in range(columns):
            x, y = gap + column * (width + gap), down - top - (row + 1) * (head + height + gap)
            axes.append(figure.add_axes((x / across, y / down, width / across, height / down)))
            axes[-1].set_axis_off()
    return figure, axes


def _show(
    axes: Axes,
    image: Image.Image,
    title: str,
    found: Grounding | None = None,
    boxes: Sequence[Box] = (),
    judged: bool = False,
) -> None:
    """An image and, over it, a map with its point and the true boxes; `judged`: they colour the point green or red."""
    _title(axes, title)
    size = image.size[::-1]
    if found is None:
        draw(axes, image, size)
        return
    colour = "white"
    if judged and boxes:
        cam = maps.ResizedMap(torch.from_numpy(found.small), *size)
        colour = RIGHT if metrics.point_correct(cam, np.array(boxes)) else WRONG
    draw(axes, image, size, found.map, COLORMAP, map(DrawnBox, boxes), found.point, colour, scale=0.6)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontproperties=SMALL, pad=3, parse_math=False)


def _above(axes: Axes, text: str, across: float, up: float) -> None:
    """Text `up` inches above a panel, at its left end (`across` 0) or in its middle (0.5)."""
    place = axes.transAxes + ScaledTranslation(0, up, axes.figure.dpi_scale_trans)
    sides: dict[str, Any] = {"ha": "left" if across == 0 else "center", "va": "bottom", "parse_math": False}
    axes.text(across, 1, text, transform=place, fontproperties=SMALL, **sides)


def save_small(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, of 256 colours if it would be larger than `LARGEST` in all of them."""
    picture = Image.fromarray(pixels(figure))
    with utils.atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
        if temporary.stat().st_size > LARGEST:
            few = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            few.save(temporary, format="PNG", optimize=True)


# ---- the program


def main(args: argparse.Namespace) -> None:
    name, asked = args.figure, question(args)
    image = read_photo(Path(asked.image))
    check_boxes(asked.boxes, image, Path(asked.image))
    after = open_model(args.checkpoint, args.config, args.text_encoder, args.device).explainer()
    if name == "gradcam":
        figure = gradcam_figure(after, image, asked.phrases[0], asked.boxes)
    elif name == "words":
        figure = word_strip(image, ground(after, image, asked.phrases[0]))
    else:
        before = open_model(args.before, args.before_config, args.text_encoder, args.device).explainer()
        models = {args.before_name: before, "after AMC": after}
        if name == "amc":
            training = load_config(args.training, PretrainConfig)
            figure = amc_figure(models, image, asked.phrases[0], asked.boxes, training)
        else:
            draw_all = phrases_figure if name == "phrases" else layers_figure
            figure = draw_all(models, image, asked.phrases, asked.boxes)
    path = args.output or Path("docs/images") / f"{name}.png"
    save_small(figure, path)
    print(f"{path}: {int(figure.bbox.width)} x {int(figure.bbox.height)} pixels")


def question(args: argparse.Namespace) -> Question:
    """What a command line asks; raises `UserError` where the figure needs other phrases or boxes."""
    if not (args.image or args.phrase or args.box):
        return EXAMPLES[args.figure]
    if not (args.image and args.phrase):
        raise utils.UserError(
            "--image, --phrase and --box go together; without any of them, the pages' example is drawn"
        )
    if args.figure in ONE_PHRASE and len(args.phrase) > 1:
        raise utils.UserError(f"{args.figure} is drawn of one --phrase, and there are {len(args.phrase)}")
    if args.figure not in ONE_PHRASE and len(args.box) not in (0, len(args.phrase)):
        raise utils.UserError(f"--box: one for each of the {len(args.phrase)} phrases, in their order, or none")
    if args.figure == "amc" and not args.box:
        raise utils.UserError("amc compares the map inside and outside of a box; give --box X Y W H")
    return Question(args.image, args.phrase, args.box)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("figure", choices=EXAMPLES)
    add("--image", help="draw this image, not the page's example")
    add("--phrase", action="append", default=[], help="phrases and layers: may be repeated, each with its --box")
    add("--box", nargs=4, type=float, action="append", default=[], metavar=("X", "Y", "W", "H"), help="a true box")
    add("--checkpoint", default=SHIPPED_AMC, help=f"the model after AMC (default: {SHIPPED_AMC})")
    add("--config", help="its Grounding_*.yaml (default: chosen by the sizes that the checkpoint states)")
    add("--before", default=SHIPPED, help=f"the model before AMC (default: {SHIPPED})")
    add("--before_config", default=SHIPPED_CONFIG, help=f"its Grounding_*.yaml (default: {SHIPPED_CONFIG})")
    add("--before_name", default="before AMC", help="what the figure calls it")
    add("--training", default="configs/scenes/Pretrain.yaml", help="the training config with AMC's layer and margins")
    add("--text_encoder", help="hub name or local folder, as in demo.py")
    add("--device", help="cuda or cpu (default: the GPU if there is one)")
    add("--output", type=Path, help="a PNG (default: docs/images/FIGURE.png)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(main, parse_args())
