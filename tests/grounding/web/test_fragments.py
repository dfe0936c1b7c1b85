"""The HTML of the page: captions, words, messages; what visitors send is text in it."""

import base64
import io

import numpy as np
from PIL import Image

from grounding.explain import Answer, WordMap
from grounding.web import fragments
from grounding.web.session import Picture, Reply, reduced

SCENE = Image.effect_noise((84, 112), 90).convert("RGB")


def made_up(name: str, words: tuple[str, ...] = ()) -> Reply:
    """A reply to one phrase, whose map has one hot cell, and words of their own."""
    small = np.zeros((3, 4), np.float32)
    small[1, 2] = 1
    maps = tuple(WordMap(word, (word,), small / len(words), 1 / len(words)) for word in words)
    return Reply(name, [Answer("P", "p", 0.25, small, maps)], [], {})


def chosen(name: str, image: Image.Image) -> Picture:
    return Picture("k", name, image, reduced(image))


def test_markup_is_text() -> None:
    nasty = "<img src=x onerror=alert(1)>\"'"
    shown = chosen(f"{nasty}.png", SCENE)
    replies = [made_up(nasty, ("[CLS]", nasty)), Reply(nasty, [nasty], [], {})]
    parts = [fragments.row(shown, "p", replies, 0, choice, 0.5, "viridis") for choice in (0, 2)]
    parts += [fragments.shown_picture(shown, nasty), fragments.note(nasty), fragments.message(nasty)]
    for part in parts:
        assert "<img src=x" not in part
        assert "&lt;img src=x onerror=alert(1)&gt;" in part


def test_words_are_those_of_the_first_model_that_answers() -> None:
    shown = chosen("a.b.png", SCENE)
    failed = Reply("broken", ["cannot be opened"], [], {})
    replies = [failed, made_up("one", ("[CLS]", "red")), made_up("two", ("[CLS]", "blue"))]
    assert fragments.map_names(replies, 0) == ["whole phrase", "[CLS]", "red"]
    assert fragments.map_names([failed], 0) == ["whole phrase"]
    html = fragments.row(shown, "p", replies, 0, 2, 0.5, "viridis")
    assert html.count("data:image/png") == 2  # the picture and one map
    assert "50% of the phrase&#39;s map" in html
    assert "this model has no map of &#39;red&#39; in &#39;p&#39;" in html
    assert "cannot be opened" in html
    assert 'download="a-b_p_red_one.png"' in html
    assert html.count("match probability 0.250") == 1


def test_colours_and_boxes_of_a_row() -> None:
    shown = chosen("a.png", SCENE)
    rows = {name: fragments.row(shown, "p", [made_up("one")], 0, 0, 0.5, name) for name in ("viridis", "jet")}
    assert rows["viridis"] != rows["jet"]
    small = np.eye(6, 12, dtype=np.float32) + np.eye(6, 12, 6, dtype=np.float32)
    small[::2] = small[:, ::2] = 0
    many = Reply("one", [Answer("P", "p", 0.25, small, ())], [], {})
    html = fragments.row(shown, "p", [many], 0, 0, 0.5, "jet")
    assert "; others [" in html
    assert " and 3 more" in html
    none = Reply("one", [Answer("P", "p", 0.25, np.zeros((3, 3), np.float32), ())], [], {})
    assert "no box: the map is 0 everywhere" in fragments.row(shown, "p", [none], 0, 0, 0.5, "jet")
    broken = Reply("one", [Answer("P", "p", 0.25, np.full((3, 3), np.nan, np.float32), ())], [], {})
    assert "values that are not numbers" in fragments.row(shown, "p", [broken], 0, 0, 0.5, "jet")


def test_a_large_picture_is_shown_reduced() -> None:
    image = Image.effect_noise((3000, 1500), 90).convert("RGB")
    html = fragments.shown_picture(chosen("a.png", image), "someone, CC0")
    assert "3000 x 1500 pixels · someone, CC0" in html
    content = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    assert Image.open(io.BytesIO(content)).size == (640, 320)
    assert image.size == (3000, 1500)
