"""What the controls of the page call, without a browser."""

import io
from typing import Any

import pytest
from PIL import Image

from models.interface import LayerError
from tests.grounding.web.conftest import Counted, noise

gr = pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
layout = pytest.importorskip("grounding.web.layout")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def events(counted: Counted) -> Any:
    return layout.Events(counted.answers, [])


@pytest.fixture
def key(counted: Counted) -> str:
    """The key of a picture that was added."""
    return counted.answers.add_picture(noise(), "noise.jpg").key


def controls(key: str, text: str, **changed: Any) -> list[Any]:
    """What the page's controls hold, with `Question`'s names."""
    usual = {"key": key, "text": text, "model": "one", "other": layout.NOTHING, "mode": "itm", "layer": 1}
    return list((usual | {"threshold": 0.5, "colormap": "viridis", "asked": {}} | changed).values())


def html(rows: list[dict[str, Any]]) -> list[str]:
    return [row["value"] for row in rows]


@pytest.mark.parametrize(
    ("other", "models"), [(layout.NOTHING, ["one"]), ("one", ["one"]), ("two", ["one", "two"])], ids=str
)
def test_a_second_model_is_asked_only_if_there_is_one(other: str, models: list[str], events: Any, key: str) -> None:
    _, asked, *rows = events.answer(*controls(key, "a red star\ncircle", other=other))
    assert asked == {"a red star": 0, "circle": 0}
    assert [row["visible"] for row in rows] == [True] * 2 + [False] * 4
    for phrase, shown in zip(asked, html(rows), strict=False):
        assert f"<div>{phrase}</div>" in shown
        assert [name for name in ("one", "two") if f"map of {phrase}, {name}" in shown] == models
        assert shown.count("<figure>") == len(models)
        assert 'role="alert"' not in shown


def test_a_chosen_word_stays_with_its_phrase(events: Any, key: str) -> None:
    before = {"circle": 1, "a red star": 2, "gone": 1, "blue": 9}  # "blue" has no ninth word
    _, asked, *rows = events.answer(*controls(key, "a red star\nblue", asked=before))
    assert asked == {"a red star": 2, "blue": 0}
    assert '<button role="radio" data-word="2" aria-checked="true">a</button>' in rows[0]["value"]
    assert [shown.count('aria-checked="true"') for shown in html(rows[:2])] == [1, 1]


def test_a_row_shows_its_phrase_whatever_the_box_holds(events: Any, key: str) -> None:
    values = controls(key, "something else", other="two", asked={"a red star": 0, "circle": 0})

    def choose(phrase: Any, word: Any) -> list[Any]:
        return events.choose_word(gr.EventData(None, {"phrase": phrase, "word": word}), *values)

    for phrase in ("a red star", "circle"):
        asked, row = choose(phrase, 0)
        assert asked == {"a red star": 0, "circle": 0}
        assert row["value"].count(f"map of {phrase}, ") == 2
    asked, row = choose("a red star", 3)
    assert asked == {"a red star": 3, "circle": 0}
    assert row["value"].count("map of red (in: a red star), ") == 2
    whole = choose("a red star", 0)
    for odd in (None, 99, -1, "1", 1.0):
        assert choose("a red star", odd) == whole
    for odd in (None, "something else", 1):
        assert 'role="alert"' in choose(odd, 0)[1]["value"]


def test_messages_in_place_of_rows(events: Any) -> None:
    status, asked, *rows = events.answer(*controls("", ""))
    assert "choose a picture first" in status
    assert asked == {}
    assert not any(row["visible"] or row["value"] for row in rows)
    event = gr.EventData(None, {"phrase": "circle", "word": 0})
    _, row = events.choose_word(event, *controls("", "", asked={"circle": 0}))
    assert "choose a picture first" in row["value"]


@pytest.mark.parametrize("index", [-1, 2, "x", None, 1.0, [0]])
def test_examples_that_there_are_not(index: Any, events: Any) -> None:
    _, shown, _ = events.choose(gr.EventData(None, {"example": index}))
    assert "there is no such example" in shown


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 20)])
def test_pictures_of_long_sides(size: tuple[int, int], events: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    picture = events.answers.add_picture(buffer.getvalue(), "long.png")
    assert max(picture.reduced.size) == 640
    shown = events.answer(*controls(picture.key, "a red star"))[2]["value"]
    assert "map of a red star, one" in shown
    assert len(shown) < 200_000


def test_a_layer_that_a_model_lacks(counted: Counted) -> None:
    """It is refused at the start if no model has it; if another one has, the page says what it shows in its place."""
    offers = counted.answers.offers
    counted.answers.offers = {name: offers[name] for name in ("two", "one")}
    counted.answers.check_layer("itm", 2)
    counted.answers.check_layer("itc", 0)
    with pytest.raises(LayerError, match=r"^--block_num 9: two has no .* itm, only 1; one has no .* itm, only 1, 2$"):
        counted.answers.check_layer("itm", 9)
    events = layout.Events(counted.answers, [], 2)
    update, said = events.layers("two", layout.NOTHING, "itm", None)
    assert (update["value"], update["choices"]) == (1, [("1 (usual)", 1)])
    assert "two has no layer 2 in mode itm, only 1; 1 was chosen in its place." in said
    assert events.layers("one", layout.NOTHING, "itm", None)[0]["value"] == 2
    assert events.layers("one", layout.NOTHING, "itc", None)[0]["choices"] == [("0", 0), ("1 (usual)", 1)]
    for model, layer in (("one", None), ("one", 1), ("two", 1)):
        assert "has no layer" not in events.layers(model, layout.NOTHING, "itm", layer)[1]
    counted.answers.offers = {"broken": offers["broken"], **counted.answers.offers}
    counted.answers.check_layer("itm", 9)  # the page says why the model cannot be opened
    assert "broken.pth" in events.layers("broken", layout.NOTHING, "itm", None)[1]
