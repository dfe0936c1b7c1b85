"""The HTML of the page: captions, words, messages; what visitors send is text in it."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from grounding.explain import Answer, WordMap
from grounding.web import fragments
from grounding.web.fragments import HTML
from grounding.web.session import Picture, Reply, reduced

SCENE = Image.effect_noise((84, 112), 90).convert("RGB")
HOT = np.zeros((3, 4), np.float32)
HOT[1, 2] = 1
SIX = np.zeros((6, 12), np.float32)  # a diagonal of spots
SIX[[1, 1, 3, 3, 5, 5], [1, 7, 3, 9, 5, 11]] = 1


def made_up(*words: str, small: np.ndarray = HOT, text: str = "p") -> Answer:
    """An answer with a map, each word with an equal part of it."""
    maps = tuple(WordMap(word, (word,), small / len(words), 1 / len(words)) for word in words)
    return Answer("P", text, 0.25, small, maps)


def chosen(name: str, image: Image.Image = SCENE) -> Picture:
    return Picture("k", name, image, reduced(image))


def row(answers: dict[str, Answer | str], word: object = 0, colormap: str = "viridis") -> str:
    replies = [Reply(model, {"p": answer}, [], {}) for model, answer in answers.items()]
    return fragments.row(chosen("a.b.png"), "p", replies, word, 0.5, colormap)[1]


def test_markup_is_text() -> None:
    nasty = "<img src=x onerror=alert(1)>\"'"
    replies = [
        Reply(nasty, {nasty: made_up("[CLS]", nasty, text=nasty)}, [], {}),
        Reply("other", {nasty: nasty}, [], {}),
    ]
    parts = [fragments.row(chosen(f"{nasty}.png"), nasty, replies, word, 0.5, "jet")[1] for word in (0, 2)]
    parts += [HTML.shown_picture(chosen(nasty), nasty), HTML.note(nasty), HTML.message(nasty)]
    for part in parts:
        assert "<img src=x" not in part
        assert "&lt;img src=x onerror=alert(1)&gt;" in part


def test_words_are_those_of_the_first_model_that_answers() -> None:
    answers = {"broken": "cannot be opened", "one": made_up("[CLS]", "red"), "two": made_up("[CLS]", "blue")}
    html = row(answers, 2)
    assert [html.index(f">{word}</button>") for word in ("whole phrase", "[CLS]", "red")]
    assert "blue" not in html
    assert html.count("data:image/png") == 2  # the picture and one map
    assert "50% of the phrase's map" in html
    assert "this model has no map of &#39;red&#39; in &#39;p&#39;" in html
    assert "cannot be opened" in html
    assert 'download="a-b_p_red_one.png"' in html
    assert html.count("match probability 0.250") == 1
    assert row({"broken": "cannot be opened"}, 1).count("</button>") == 1


def test_colours_of_a_row() -> None:
    assert row({"one": made_up()}, colormap="viridis") != row({"one": made_up()}, colormap="jet")


@pytest.mark.parametrize(
    ("small", "said"),
    [
        (HOT, "point 52, 55 · best box [41, 35, 23, 42]\n"),
        (SIX, "best box [77, 94, 7, 18]; others [35, 95, 7, 17] [7, 19, 7, 18] and 3 more\n"),
        (np.zeros((3, 3), np.float32), "no box: the map is 0 everywhere"),
        (np.full((3, 3), np.nan, np.float32), "values that are not numbers"),
    ],
    ids=["one", "many", "none", "broken"],
)
def test_boxes_of_a_row(small: np.ndarray, said: str) -> None:
    assert said in row({"one": made_up(small=small)})


def test_a_large_picture_is_shown_reduced() -> None:
    image = Image.effect_noise((3000, 1500), 90).convert("RGB")
    html = HTML.shown_picture(chosen("a.png", image), "someone, CC0")
    assert "a.png · 3000 x 1500 pixels · someone, CC0" in html
    content = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    assert Image.open(io.BytesIO(content)).size == (640, 320)
    assert image.size == (3000, 1500)


def test_remarks_are_made_once() -> None:
    replies = [Reply("one", {}, ["a: short", "b: long"], {}), Reply("two", {}, ["b: long", "c: cut"], {})]
    assert fragments.remarks(replies) == ["one: a: short", "one and two: b: long", "two: c: cut"]


def test_times_are_told() -> None:
    replies = [
        Reply("AMC", {"a": made_up()}, [], {"image": 0.8, "phrase": 0.04}),
        Reply("control", {"a": "no words", "b": made_up()}, [], {}),
        Reply("broken", dict.fromkeys("ab", "no checkpoint"), [], {}),
    ]
    took = "AMC: image 0.80 s, phrase 0.04 s; control: known already; broken: no answer; pictures 0.30 s"
    assert fragments.times(replies, 0.3) == took
