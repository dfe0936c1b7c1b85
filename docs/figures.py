"""The pictures of the README and of docs/gradcam.md: phrases and their maps, what a map is made of, and AMC's loss.

    python docs/figures.py phrases    three phrases and their maps, before AMC and after
    python docs/figures.py gradcam    attention, gradient, their product, the map
    python docs/figures.py words      the map of each word
    python docs/figures.py amc        the two terms of AMC's loss, before AMC and after
    python docs/figures.py layers     every fusion layer, before AMC and after

Without --image, the pages' own examples are drawn, by the two models that ship.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from grounding.pictures.render import COLORMAP, DPI, RIGHT, WRONG, DrawnBox, draw
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
PART, HALF, PHRASE, LAYER = 2.42, 2.3, 2.65, 0.93  # inches: of a panel in each picture
LARGEST = 150_000  # bytes
AS_IT_IS = AugmentConfig(flip_prob=0, grayscale_prob=0, jitter_prob=0)
MARK: dict[str, Any] = {"ms": 9, "mfc": "white", "mec": "black", "mew": 1.5, "ls": "none", "clip_on": False}
MISSING: dict[str, Any] = {"color": WRONG, "lw": 5, "solid_capstyle": "butt", "zorder": 1}
TEXT: dict[str, Any] = {"fontproperties": SMALL, "pad": 3, "parse_math": False}


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

    @property
    def loss(self) -> float:
        return max(0.0, self.outside - self.inside + self.margin)


def terms(cam: Tensor, mask: Tensor, options: AMCConfig) -> tuple[Term, Term]:
    """L_mean and L_max of one map (s, s) and mask (s, s)."""
    inside, outside = cam[mask == 1], cam[mask == 0]
    return (
        Term("mean", float(inside.mean()), float(outside.mean()), options.margin_mean),
        Term("max", float(inside.max()), float(outside.max()), options.margin_max),
    )


# ---- pictures


def phrases_figure(models: Models, image: Image.Image, phrases: Sequence[str], boxes: Sequence[Box]) -> Figure:
    """A row a model, a column a phrase; boxes, one a phrase, tell who is right."""
    rows = [ground_all(explainer, encode(explainer, image), phrases) for explainer in models.values()]
    heads = ["\n".join(wrap(f'"{found.text}"', PHRASE, SMALL)) for found in rows[0]]
    return _table(image, list(models), heads, [_with_truth(row, boxes) for row in rows], PHRASE)


def layers_figure(models: Models, image: Image.Image, phrases: Sequence[str], boxes: Sequence[Box]) -> Figure:
    """A row a phrase, a column each fusion layer of each model; boxes, one a phrase, tell who is right."""
    columns = {}
    for name, explainer in models.items():
        encoded = encode(explainer, image)
        for block in explainer.model.layers("itm"):
            answers = ground_all(explainer._replace(block=block), encoded, phrases)
            columns[f"{name}\nlayer {block}"] = _with_truth(answers, boxes)
    names = ["\n".join(wrap(clean_caption(phrase, MAX_WORDS), LAYER, SMALL)) for phrase in phrases]
    return _table(image, names, list(columns), list(zip(*columns.values(), strict=True)), LAYER)


def gradcam_figure(explainer: Explainer, image: Image.Image, phrase: str, boxes: Sequence[Box]) -> Figure:
    """The image, then A, G, max(G, 0), A * max(G, 0) on the grid of patches, then the map at the image's size."""
    encoded = encode(explainer, image)
    made, found = parts(look(explainer, encoded, phrase)), ground(explainer, encoded, phrase)
    figure, grid = _panels(2, 3, image.size, PART)
    first, *middle, last = grid.flat
    first.set_title(f'"{found.text}"', **TEXT)
    draw(first, image, image.size[::-1])
    for axes, (title, values) in zip(middle, made.items(), strict=True):
        low, high = float(values.min()), float(values.max())
        spread = max(-low, high)
        colours: dict[str, Any] = (
            {"cmap": "RdBu_r", "vmin": -spread, "vmax": spread} if low < 0 else {"cmap": COLORMAP, "vmin": 0}
        )
        axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colours)
        axes.set_title(f"{title}\n{low:.2g} to {high:.2g}", **TEXT)
    last.set_title(f"the map at the image's size\nmatch probability {found.match:.3f}", **TEXT)
    draw(last, image, image.size[::-1], found.map, COLORMAP, map(DrawnBox, boxes), found.point, scale=0.6)
    return figure


def amc_figure(models: Models, image: Image.Image, phrase: str, boxes: Sequence[Box], config: PretrainConfig) -> Figure:
    """A row a model: the map in the box, the map outside of it, and both terms as distances on a line."""
    figure, grid = _panels(len(models), 3, (1, 1), HALF)
    for (name, explainer), (inside, outside, line) in zip(models.items(), grid, strict=True):
        view = training_view(explainer, image, phrase, boxes, config)
        mean, largest = terms(view.cam, view.mask, config.amc)
        _half(inside, view, view.mask, "o")
        inside.set_title(f"{name}: inside\nmean {mean.inside:.3f}, max {largest.inside:.3f}", **TEXT)
        _half(outside, view, 1 - view.mask, "X")
        outside.set_title(f"{name}: outside\nmean {mean.outside:.3f}, max {largest.outside:.3f}", **TEXT)
        _distances(line, (mean, largest))
    handles, labels = grid[0, 2].get_legend_handles_labels()
    figure.legend(handles[:4], labels[:4], loc="outside lower center", ncols=4, frameon=False, prop=SMALL)
    return figure


def _half(axes: Axes, view: Training, part: Tensor, mark: str) -> None:
    """The map where `part` is 1, the image in grey where it is not; the mask's border, and a mark at the maximum."""
    grey = Image.fromarray(view.image).convert("L").resize((part.shape[1], part.shape[0]))
    axes.imshow(grey, cmap="gray", vmin=-120, vmax=255)
    cam = np.ma.masked_array(view.cam.numpy(), part.numpy() == 0)
    axes.imshow(cam, cmap=COLORMAP, vmin=0, vmax=1, interpolation="nearest")
    axes.contour(view.mask.numpy(), levels=[0.5], colors="white", linewidths=1.5)
    y, x = divmod(int((view.cam * part).argmax()), part.shape[1])
    axes.plot(x, y, mark, **MARK)


def _distances(axes: Axes, found: Sequence[Term]) -> None:
    """Terms as distances: the inside, where it should be at least, and what is missing."""
    arrow = {"arrowstyle": "->", "color": "#555555", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    for y, term in zip((1, 0), found, strict=True):
        least = term.outside + term.margin
        missing = [term.inside, least] if term.loss > 0 else []
        axes.plot(term.inside, y, "o", label="inside", **MARK)
        axes.plot(term.outside, y, "X", label="outside", **MARK)
        axes.plot(least, y, "|", color="#555555", ms=16, mew=2, label="outside + margin")
        axes.plot(missing, [y] * len(missing), label="the term: what is missing", **MISSING)
        axes.annotate("", (least, y), (term.outside, y), arrowprops=arrow)
        sum_of_term = f"max(0, {term.outside:.3f} - {term.inside:.3f} + {term.margin:g}) = {term.loss:.3f}"
        axes.text(0, y + 0.2, f"{term.name} term\n{sum_of_term}", fontproperties=SMALL, va="bottom")
    axes.set_axis_on()
    axes.set(xlim=(-0.05, 1.05 + max(term.margin for term in found)), ylim=(-0.3, 1.75), yticks=[])
    axes.tick_params(labelsize=8)
    axes.spines[["left", "right", "top"]].set_visible(False)


# ---- parts of pictures


def _panels(rows: int, columns: int, size: tuple[int, int], width: float) -> tuple[Figure, np.ndarray]:
    """Panels (rows, columns) of an image's proportions, about `width` inches wide; `save_small` cuts off the rest."""
    height = width * size[1] / size[0]
    figure = Figure((columns * width + 1.2, rows * (height + 0.6)), dpi=DPI, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_box_aspect(height / width)
        axes.set_axis_off()
    return figure, grid


Cell = tuple[Grounding, Sequence[Box]]


def _with_truth(answers: Sequence[Grounding], boxes: Sequence[Box]) -> list[Cell]:
    return [(found, boxes[k : k + 1]) for k, found in enumerate(answers)]


def _table(
    image: Image.Image, names: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[Cell]], width: float
) -> Figure:
    """Maps with points, green or red where there is a true box; names beside the rows, heads above the columns."""
    figure, grid = _panels(len(names), len(heads), image.size, width)
    beside: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "center"}
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, **TEXT)
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.annotate(name, (0, 0.5), (-6, 0), fontproperties=SMALL, parse_math=False, **beside)
    figure.draw_without_rendering()  # the panels have their places, by which `draw` reduces large images
    size = image.size[::-1]
    for axes, (found, boxes) in zip(grid.flat, itertools.chain(*rows), strict=True):
        colour = "white"
        if boxes:
            cam = maps.ResizedMap(torch.from_numpy(found.small), *size)
            colour = RIGHT if metrics.point_correct(cam, np.array(boxes)) else WRONG
        draw(axes, image, size, found.map, COLORMAP, map(DrawnBox, boxes), found.point, colour, scale=0.6)
    return figure


def save_small(figure: Figure, path: Path) -> tuple[int, int]:
    """Write a figure as a PNG, of 256 colours if it would be larger than `LARGEST` in all of them; returns its size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    picture = Image.open(drawn).convert("RGB")
    with utils.atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
        if temporary.stat().st_size > LARGEST:
            few = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            few.save(temporary, format="PNG", optimize=True)
    return picture.size


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
    width, height = save_small(figure, path)
    print(f"{path}: {width} x {height} pixels")


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
