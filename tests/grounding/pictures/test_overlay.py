"""The pictures of a phrase: what is where in the pixels, nothing cut, on images of any size."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from grounding.explain import Grounding, WordMap
from grounding.maps import ResizedMap, map_boxes, share_of_maximum
from grounding.pictures.overlay import LEAST_WIDTH, SIDE, TITLE, break_lines, overlay, word_strip, wrap
from grounding.pictures.render import DPI, pixels, save, see_through
from tests.drawn import assert_texts_are_apart, at
from utils import UserError

pytestmark = pytest.mark.slow

RED, WHITE = (255, 59, 48), (255, 255, 255)
LONG = "a very small " * 9 + "w" * 120


def grounding(small: Sequence[Sequence[float]], size: tuple[int, int], text: str = "a thing") -> Grounding:
    """What a map (h, w) makes of an image of (width, height), with the words of `text` on the same map."""
    pred = torch.tensor(small)
    cam = ResizedMap(pred, size[1], size[0])
    shares = share_of_maximum(cam)
    words = tuple(WordMap(word, (word,), pred.numpy(), 0.25) for word in ("[CLS]", *text.split()))
    return Grounding(text, text, 0.875, pred.numpy(), words, shares, cam.point(), map_boxes(cam, shares, 0.5))


HOT = [[0.0] * 8 for _ in range(4)]
HOT[2] = [0.0, 1.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]  # row 2, columns 1 and 2 of an image 8 wide and 4 high


def test_the_map_lies_where_it_belongs() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((7, 0), (0, 0, 255))
    figure = overlay(image, grounding(HOT, (8, 4)))
    drawn, axes = pixels(figure), figure.axes[0]
    assert at(axes, drawn, 0.7, 1.7) == pytest.approx((190, 173, 28), abs=3)  # 75% of the end of viridis, on black
    assert at(axes, drawn, 7, 0) == (0, 0, 255)  # where the map is 0 the image is untouched
    assert at(axes, drawn, 1, 1) == (0, 0, 0)
    assert at(axes, drawn, 1, 2) == WHITE  # the point
    jet = overlay(image, grounding(HOT, (8, 4)), colormap="jet")
    assert at(jet.axes[0], pixels(jet), 0.7, 1.7) == pytest.approx((96, 0, 0), abs=3)


def test_best_box_and_true_boxes_are_drawn_at_their_places() -> None:
    image = Image.new("RGB", (8, 4), "black")
    figure = overlay(image, grounding(HOT, (8, 4)), truth=[[4, 0, 3, 3]])
    drawn, axes = pixels(figure), figure.axes[0]
    panel = axes.get_window_extent()
    inside = drawn[len(drawn) - int(panel.y1) : len(drawn) - int(panel.y0)]  # without title and legend
    rows, columns = np.nonzero((inside == RED).all(axis=2))
    ends = [(columns.min(), panel.y1 - rows.min()), (columns.max(), panel.y1 - rows.max())]
    found = axes.transData.inverted().transform(ends)
    np.testing.assert_allclose(found, [[0.5, 1.5], [2.5, 2.5]], atol=0.05)  # [1, 2, 2, 1], around whole pixels
    lower = [at(axes, drawn, x, 2.5) for x in np.linspace(3.6, 6.4, 200)]
    assert 20 < lower.count(WHITE) < 180  # dashes
    assert WHITE not in [at(axes, drawn, x, 2.5) for x in np.linspace(0, 3.3, 200)]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["point", "best box", "ground truth"]


def test_the_outline_of_a_region_is_drawn_around_its_pixels() -> None:
    region = np.zeros((4, 8), bool)
    region[1:3, 4:8] = True  # to the right border
    figure = overlay(Image.new("RGB", (8, 4), "black"), grounding(HOT, (8, 4)), region=region)
    drawn, axes = pixels(figure), figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 7.5), (3.5, -0.5))
    lower = [at(axes, drawn, x, 2.5) for x in np.linspace(4.1, 6.9, 200)]
    assert 20 < lower.count(WHITE) < 180  # dashes
    for x in (3.5, 7.49):  # at the image's border, too
        assert [at(axes, drawn, x, y) for y in np.linspace(1.1, 1.9, 200)].count(WHITE) > 20
    elsewhere = [at(axes, drawn, x, y) for x in np.linspace(3.7, 6.9, 50) for y in (0, 0.3, 1, 2, 2.8, 3)]
    assert WHITE not in elsewhere
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "ground truth"


def test_a_true_box_that_is_the_best_box_shows_both() -> None:
    figure = overlay(Image.new("RGB", (8, 4), "black"), grounding(HOT, (8, 4)), truth=[[1, 2, 2, 1]])
    drawn, axes = pixels(figure), figure.axes[0]
    lower = [at(axes, drawn, x, 2.5) for x in np.linspace(0.6, 2.4, 200)]
    assert lower.count(WHITE) > 50
    assert lower.count(RED) > 20


def test_what_is_written_beside_a_map_without_a_box() -> None:
    figure = overlay(Image.new("RGB", (8, 4)), grounding([[0.0, 0.0]], (8, 4), r"the $\frac thing"))
    assert [text.get_text() for text in figure.texts] == [r"the $\frac thing", "match probability 0.875"]
    assert figure.axes[1].get_ylabel() == "share of the maximum"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["point"]
    assert not (pixels(figure) == RED).all(axis=2).any()  # a formula that is none would stop here


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (300, 9), (9, 300), (40, 30)])
@pytest.mark.parametrize("picture", [overlay, word_strip])
def test_no_text_is_cut_or_covered(size: tuple[int, int], picture: Callable[..., Figure]) -> None:
    figure = picture(Image.new("RGB", size, "gray"), grounding(HOT, size, LONG))
    assert_texts_are_apart(figure, whole=True)
    box = figure.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(size[0] / size[1])
    assert figure.get_figwidth() >= LEAST_WIDTH


def shown(axes: Axes) -> list[tuple[int, ...]]:
    """The sizes of image and map as they are handed to matplotlib."""
    return [picture.get_array().shape[:2] for picture in axes.get_images()]  # type: ignore[union-attr]


def test_large_images_are_reduced_and_small_ones_are_not() -> None:
    longest = round(SIDE * DPI)
    figure = overlay(Image.new("RGB", (1600, 1200)), grounding(HOT, (1600, 1200)))
    assert shown(figure.axes[0]) == [(longest * 3 // 4, longest)] * 2
    assert shown(overlay(Image.new("RGB", (8, 4)), grounding(HOT, (8, 4))).axes[0]) == [(4, 8)] * 2
    assert figure.axes[0].get_xlim() == (-0.5, 1599.5)
    assert figure.axes[0].get_ylim() == (1199.5, -0.5)
    smaller = overlay(
        Image.new("RGB", (400, 300)), grounding(HOT, (1600, 1200))
    )  # a copy: coordinates stay the image's
    assert shown(smaller.axes[0]) == [(300, 400), (longest * 3 // 4, longest)]
    assert smaller.axes[0].get_window_extent().bounds == figure.axes[0].get_window_extent().bounds
    assert (smaller.axes[0].get_xlim(), smaller.axes[0].get_ylim()) == ((-0.5, 1599.5), (1199.5, -0.5))


def test_the_strip_has_a_panel_for_each_word() -> None:
    image = Image.new("RGB", (8, 4), "black")
    found = grounding(HOT, (8, 4), "the red $x_$ one on the left")
    cold = found.words[1]._replace(small=np.fliplr(np.array(HOT, np.float32)).copy())
    figure = word_strip(image, replace(found, words=(found.words[0], cold, *found.words[2:])))
    drawn = pixels(figure)
    titles = [axes.get_title() for axes in figure.axes]
    words = ["[CLS]", "the", "red", "$x_$", "one", "on", "the", "left"]
    assert titles == ["whole phrase", *(f"{word} 25%" for word in words)]
    assert at(figure.axes[1], drawn, 1, 2) == pytest.approx((190, 173, 28), abs=3)
    assert at(figure.axes[2], drawn, 1, 2) == (0, 0, 0)
    assert at(figure.axes[2], drawn, 6, 2) == pytest.approx((190, 173, 28), abs=3)
    rows = sorted({round(axes.get_window_extent().y0) for axes in figure.axes}, reverse=True)
    assert [[round(axes.get_window_extent().y0) for axes in figure.axes].count(row) for row in rows] == [6, 3]
    alone = word_strip(image, replace(found, words=()))
    assert len(alone.axes) == 1
    assert alone.texts[-1].get_text() == "mode itc: no maps of words"


def test_lines_break_between_words_and_in_long_ones() -> None:
    def ten(line: str) -> bool:
        return len(line) <= 10

    assert break_lines("the dog on the left", ten) == ["the dog on", "the left"]
    assert break_lines("a abcdefghijklmnopqrstuvw z", ten) == ["a", "abcdefghij", "klmnopqrst", "uvw z"]
    assert break_lines("a\t b\nc", ten) == ["a b c"]
    assert break_lines("abc", lambda line: False) == ["a", "b", "c"]
    assert break_lines("", ten) == [""]
    assert len(wrap("m" * 40, 3, TITLE)) > len(wrap("i" * 40, 3, TITLE)) == 1


def test_colour_maps_let_the_image_through() -> None:
    colours = see_through("viridis")
    assert colours(0.0)[3] == 0
    assert colours(1.0) == pytest.approx((0.993, 0.906, 0.144, 0.75), abs=1e-3)
    assert (np.diff([colours(step)[3] for step in np.linspace(0, 1, 20)]) > 0).all()
    with pytest.raises(UserError, match=r"--colormap jett: .*viridis"):
        see_through("jett")


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    figure = overlay(Image.new("RGB", (8, 4)), grounding(HOT, (8, 4)))
    save(figure, tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    written = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("RGB"))
    assert (written == pixels(figure)).all()
