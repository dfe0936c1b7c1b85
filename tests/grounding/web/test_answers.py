"""What the page of demo.py --web answers, without a browser: what is kept, what is refused, what is offered."""

import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config import PretrainConfig
from dataset.reading import DataError
from dataset.scenes import files as scenes_files
from dataset.scenes.paths import SHIPPED, SHIPPED_AMC
from dataset.transforms import resize_bilinear_image
from grounding.explain import Answer, Explainer, PhraseError, ground_all, of_word
from grounding.load import OpenedModel, open_model
from grounding.web import examples, fragments, session
from grounding.web.examples import Offer, offered, scene_examples
from grounding.web.session import Answers, Picture, Recent, Reply, split_phrases
from models.albef import ALBEF, build_albef
from models.interface import LayerError
from tests.small_model import BERT, SIZES
from utils import UserError

pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
from grounding.web.layout import NOTHING, Events

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, which say their sizes; the second has one layer less, and its own vocabulary file."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    for name, layers in (("one", 3), ("two", 2)):
        (folder / f"{name}.json").write_text(json.dumps({**BERT, "num_hidden_layers": layers}))
        trained = {**SIZES, "bert_config": str(folder / f"{name}.json"), "image_root": "x", "train_file": []}
        config = PretrainConfig.model_validate({**trained, "amc": {"layer": 1}})
        torch.manual_seed(layers)
        torch.save({"model": build_albef(config).state_dict(), "config": config.model_dump()}, folder / f"{name}.pth")
    (folder / "broken.pth").write_text("no checkpoint")
    return folder


class Counted:
    """`Answers` over the two checkpoints, counting what is asked of the models."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.calls = {"open": 0, "encode": 0, "ask": 0}

        def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **keys: Any) -> Any:
                self.calls[name] += 1
                return function(*args, **keys)

            return counted

        def open_offer(offer: Offer) -> OpenedModel:
            self.calls["open"] += 1
            return open_model(offer.checkpoint, text_encoder=str(place), device="cpu")

        monkeypatch.setattr(ALBEF, "encode", count("encode", ALBEF.encode))
        monkeypatch.setattr(session, "ask", count("ask", session.ask))
        found = [Offer(name, place / f"{name}.pth") for name in ("one", "two", "broken")]
        self.answers = Answers(found, open_offer, **options)

    def took(self) -> tuple[int, int, int]:
        """How often a model was opened, an image encoded and phrases asked since the last time."""
        counts = self.calls["open"], self.calls["encode"], self.calls["ask"]
        self.calls = dict.fromkeys(self.calls, 0)
        return counts


@pytest.fixture
def counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(place, monkeypatch)


def file(seed: int = 0, size: tuple[int, int] = (30, 20), orientation: int = 1) -> bytes:
    """A picture of noise, as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


# ---- what the controls call


@pytest.fixture
def events(counted: Counted) -> Events:
    return Events(counted.answers, [])


def controls(key: str, text: str, other: str = NOTHING, **changed: Any) -> list[Any]:
    """What the page's controls hold, with `Question`'s names."""
    usual = {"key": key, "text": text, "model": "one", "other": other, "mode": "itm", "layer": 1}
    return list((usual | {"threshold": 0.5, "colormap": "viridis", "asked": {}} | changed).values())


def html(rows: list[dict[str, Any]]) -> list[str]:
    return [row["value"] for row in rows]


def test_a_second_model_is_asked_only_if_there_is_one(events: Events) -> None:
    key = events.answers.add_picture(file(), "noise.jpg").key
    for other, models in ((NOTHING, ["one"]), ("one", ["one"]), ("two", ["one", "two"])):
        _, asked, *rows = events.answer(*controls(key, "a red star\ncircle", other))
        assert asked == {"a red star": 0, "circle": 0}
        assert [row["visible"] for row in rows] == [True] * 2 + [False] * 4
        for phrase, shown in zip(asked, html(rows), strict=False):
            assert f"<div>{phrase}</div>" in shown
            assert [name for name in ("one", "two") if f"map of {phrase}, {name}" in shown] == models
            assert shown.count("<figure>") == len(models)
            assert 'role="alert"' not in shown


def test_a_chosen_word_stays_with_its_phrase(events: Events) -> None:
    key = events.answers.add_picture(file(), "noise.jpg").key
    before = {"circle": 1, "a red star": 2, "gone": 1, "blue": 9}  # "blue" has no ninth word
    _, asked, *rows = events.answer(*controls(key, "a red star\nblue", asked=before))
    assert asked == {"a red star": 2, "blue": 0}
    assert '<button role="radio" data-word="2" aria-checked="true">a</button>' in rows[0]["value"]
    assert [shown.count('aria-checked="true"') for shown in html(rows[:2])] == [1, 1]


def test_a_row_shows_its_phrase_whatever_the_box_holds(events: Events) -> None:
    key = events.answers.add_picture(file(), "noise.jpg").key
    values = controls(key, "something else", "two", asked={"a red star": 0, "circle": 0})
    for number, phrase in enumerate(("a red star", "circle")):
        asked, row = events.choose_word(number, {"word": 0}, *values)
        assert asked == {"a red star": 0, "circle": 0}
        assert row["value"].count(f"map of {phrase}, ") == 2
    asked, word = events.choose_word(0, {"word": 3}, *values)
    assert asked == {"a red star": 3, "circle": 0}
    assert word["value"].count("map of red (in: a red star), ") == 2
    whole = events.choose_word(0, {"word": 0}, *values)
    for odd in ({}, {"word": 99}, {"word": -1}, {"word": "1"}, {"word": 1.0}):
        assert events.choose_word(0, odd, *values) == whole
    assert 'role="alert"' in events.choose_word(5, {"word": 0}, *values)[1]["value"]


def test_messages_in_place_of_rows(events: Events) -> None:
    status, asked, *rows = events.answer(*controls("", ""))
    assert "choose a picture first" in status
    assert asked == {}
    assert not any(row["visible"] or row["value"] for row in rows)
    _, row = events.choose_word(0, {"word": 0}, *controls("", "circle", asked={"circle": 0}))
    assert "choose a picture first" in row["value"]


def test_what_a_model_cannot_say_is_shown_beside_the_other(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a map that is not finite, found when it is made; the other model's maps stand, and the next try is new."""
    key, asked = events.answers.add_picture(file(), "noise.jpg").key, session.ask

    def broken(explainer: Explainer, *given: Any) -> list[Answer]:
        if explainer.model is bad:
            raise UserError("weights <b>nan</b>")
        return asked(explainer, *given)

    events.answers.layers("two", "itm")
    opened = events.answers.models.get("two")
    assert opened is not None
    bad = opened.model
    monkeypatch.setattr(session, "ask", broken)
    values = controls(key, "a red star\n...", "two")
    first, second, *_ = html(events.answer(*values)[2:])
    assert "map of a red star, one" in first
    assert "map of a red star, two" not in first
    assert "weights &lt;b&gt;nan&lt;/b&gt;" in first
    assert second.count("nothing is left of it") == 2
    monkeypatch.setattr(session, "ask", asked)
    assert "map of a red star, two" in events.answer(*values)[2]["value"]


def test_markup_in_phrases_is_text(events: Events) -> None:
    nasty = "<img src=x onerror=alert(1)>\"' red"
    key = events.answers.add_picture(file(), f"{nasty}.jpg").key
    for text in (nasty, f"{nasty}\n<b>...</b>\n\"'<>!?"):
        status, _, *rows = events.answer(*controls(key, text, "broken"))
        _, row = events.choose_word(0, {"word": 4}, *controls(key, "", "two", asked={nasty: 0}))
        shown = "".join([status, *html(rows), row["value"]])
        assert "&lt;img src=x" in shown
        allowed = r"<(?!/?(div|figure|figcaption|img|b|a|button)\b)|<img src=x|onerror=alert\(1\)>"
        assert not re.search(allowed, shown)
    for wrong in (controls(key, "x", model=nasty), controls(key, "x", colormap=nasty), controls(key, nasty * 20)):
        assert "<img src=x" not in "".join(map(str, events.answer(*wrong)))


@pytest.mark.parametrize(("more", "read"), [(0, True), (80, True), (100, False)])
def test_a_jpeg_of_many_scans(more: int, read: bool, counted: Counted) -> None:
    """At 40 megapixels each takes 0.1 s: a file of 10 MB would be decoded for hours."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    content = content[:-2] + last * more + content[-2:]
    if read:
        assert counted.answers.add_picture(content, "up.jpg").image.size == (64, 64)
        return
    with pytest.raises(DataError, match=r"^up\.jpg: a JPEG of more than 100 scans"):
        counted.answers.add_picture(content, "up.jpg")


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 20)])
def test_pictures_of_long_sides(size: tuple[int, int], events: Events) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    picture = events.answers.add_picture(buffer.getvalue(), "long.png")
    assert max(picture.reduced.size) == 640
    shown = events.answer(*controls(picture.key, "a red star"))[2]["value"]
    assert "map of a red star, one" in shown
    assert len(shown) < 200_000


# ---- what is computed, and how often


def test_an_image_is_encoded_once_and_a_phrase_is_asked_once(counted: Counted) -> None:
    key = counted.answers.add_picture(file(), "noise.jpg").key
    first = counted.answers.ask(key, ["a red star", "circle"], "one", "itm", None)
    assert counted.took() == (1, 1, 1)
    assert list(first.seconds) == ["model", "image", "2 phrases"]
    again = counted.answers.ask(key, ["circle", "a red star"], "one", "itm", 1)  # 1 is the config's layer
    assert counted.took() == (0, 0, 0)
    assert again.seconds == {}
    assert again.answers == [first.answers[1], first.answers[0]]
    more = counted.answers.ask(key, ["a red star", "blue"], "one", "itm", 1)
    assert counted.took() == (0, 0, 1)
    assert list(more.seconds) == ["phrase"]
    for mode, layer in (("itm", 2), ("itc", 1), ("itc", 0)):
        counted.answers.ask(key, ["circle"], "one", mode, layer)
        assert counted.took() == (0, 0, 1)
    other = counted.answers.add_picture(file(1), "noise.jpg").key  # the same name, another content
    counted.answers.ask(other, ["circle"], "one", "itm", None)
    assert counted.took() == (0, 1, 1)


def test_answers_are_those_of_ground(counted: Counted, place: Path) -> None:
    picture = counted.answers.add_picture(file(orientation=6), "turned.jpg")
    assert picture.image.size == (20, 30)  # upright, as EXIF says
    opened = open_model(place / "two.pth", text_encoder=str(place), device="cpu")
    for mode in ("itm", "itc"):
        reply = counted.answers.ask(picture.key, ["a red star"], "two", mode, None)
        (found,) = ground_all(opened.explainer(mode), picture.image, ["a red star"])
        (answer,) = reply.answers
        assert isinstance(answer, Answer)
        np.testing.assert_allclose(answer.small, found.small, rtol=1e-5)
        assert answer.match == pytest.approx(found.match)
        assert [word.word for word in answer.words] == (["[CLS]", "a", "red", "star"] if mode == "itm" else [])
    assert reply.model == "two"


def test_settings_reach_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other = (Counted(place, monkeypatch, **keys).answers for keys in ({}, {"resize": resize_bilinear_image}))
    reduced = Counted(place, monkeypatch, precision=torch.bfloat16).answers
    maps = []
    for each in (usual, other, reduced):
        (answer,) = each.ask(each.add_picture(file(), "x.jpg").key, ["circle"], "one", "itm", None).answers
        assert isinstance(answer, Answer)
        maps.append(answer.small)
    for changed in maps[1:]:
        assert 0 < np.abs(changed / changed.max() - maps[0] / maps[0].max()).max() < 0.5


def test_a_word_in_place_of_the_phrase(counted: Counted) -> None:
    key = counted.answers.add_picture(file(), "noise.jpg").key
    (answer,) = counted.answers.ask(key, ["a red star"], "one", "itm", None).answers
    assert isinstance(answer, Answer)
    word = of_word(answer, 2)
    assert (word.text, word.match, word.words) == ("red (in: a red star)", answer.match, answer.words)
    assert word.small is answer.words[2].small


def test_what_is_kept_is_bounded() -> None:
    recent = Recent(10, float)
    for name, value in (("a", 4), ("b", 4)):
        recent.put(name, value)
    assert recent.get("a") == 4  # used again: b is now the oldest
    recent.put("c", 3)
    assert list(recent.values) == ["a", "c"]
    recent.put("c", 6)  # in place of 3, not beside it
    assert recent.values == {"a": 4, "c": 6}
    recent.put("d", 50)  # more than allowed, and still kept: it is what was asked for
    assert list(recent.values) == ["d"]
    assert recent.get("a") is None
    numbers = Recent(2)
    for number in range(5):
        numbers.put(number, "x" * number)
    assert list(numbers.values) == [3, 4]


def test_encodings_and_pictures_are_dropped(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    counted.answers.encodings.most, counted.answers.pictures.most = 2, 3 * 600
    keys = [counted.answers.add_picture(file(seed), "x.jpg").key for seed in range(3)]
    for key in keys:
        counted.answers.ask(key, ["circle"], "one", "itm", None)
    assert counted.took() == (1, 3, 3)
    counted.answers.ask(keys[2], ["star"], "one", "itm", None)
    assert counted.took() == (0, 0, 1)
    counted.answers.ask(keys[0], ["star"], "one", "itm", None)
    assert counted.took() == (0, 1, 1)
    fourth = counted.answers.add_picture(file(3), "x.jpg").key
    assert counted.answers.picture(fourth).key == fourth
    for gone, message in ((keys[1], "no longer kept; choose it again"), ("", "choose a picture first")):
        with pytest.raises(DataError, match=message):
            counted.answers.picture(gone)
    counted.answers.models.most = 1
    counted.answers.layers("two", "itm")
    counted.answers.layers("one", "itm")
    assert counted.took()[0] == 2  # "one" was dropped for "two"


# ---- what cannot be answered


def test_phrases_that_cannot_be_read_leave_the_others(counted: Counted) -> None:
    key = counted.answers.add_picture(file(), "x.jpg").key
    phrases = ["circle", "...", "a red $", "big " * 31]
    reply = counted.answers.ask(key, phrases, "one", "itm", None)
    assert [isinstance(answer, Answer) for answer in reply.answers] == [True, False, True, True]
    assert "nothing is left of it" in str(reply.answers[1])
    assert reply.notes == [
        "a red $: the vocabulary lacks $; the model reads [UNK]",
        f"{'big ' * 15}…: cut to 30 words, as in evaluation",
    ]


def test_models_that_cannot_be_asked(counted: Counted) -> None:
    key = counted.answers.add_picture(file(), "x.jpg").key
    reply = counted.answers.ask(key, ["circle", "star"], "broken", "itm", None)
    assert len(reply.answers) == 2
    assert all("broken.pth" in str(message) for message in reply.answers)
    with pytest.raises(UserError, match=r"broken\.pth"):
        counted.answers.layers("broken", "itm")
    (message,) = counted.answers.ask(key, ["circle"], "two", "itm", 2).answers
    assert message == "two has no layer 2 in mode itm, only 1"
    (message,) = counted.answers.ask(key, ["circle"], "three", "itm", None).answers
    assert "not among those offered: one, two, broken" in str(message)
    (message,) = counted.answers.ask("gone", ["circle"], "one", "itm", None).answers
    assert "no longer kept" in str(message)


def test_answers_that_are_not_numbers_are_messages(counted: Counted) -> None:
    key = counted.answers.add_picture(file(), "noise.jpg").key
    good = counted.answers.ask(key, ["circle"], "one", "itm", None).answers
    opened = counted.answers.models.get("one")
    assert opened is not None
    opened.model.itm_head.weight.fill_(float("nan"))
    reply = counted.answers.ask(key, ["circle", "star", "blue"], "one", "itm", None)
    assert reply.answers[:1] == good  # known before
    assert all("one.pth, itm_head.weight holds NaN or infinity" in str(message) for message in reply.answers[1:])


def test_layers_follow_the_model_and_the_mode(counted: Counted) -> None:
    assert counted.answers.layers("one", "itm") == ((1, 2), 1, False)
    assert counted.answers.layers("one", "itc") == ((0, 1), 1, False)
    assert counted.answers.layers("two", "itm") == ((1,), 1, False)
    assert counted.took() == (2, 0, 0)


def test_a_layer_that_a_model_lacks(counted: Counted) -> None:
    """It is refused at the start if no model has it; if another one has, the page says what it shows in its place."""
    offers = counted.answers.offers
    counted.answers.offers = {name: offers[name] for name in ("two", "one")}
    counted.answers.check_layer("itm", 2)
    counted.answers.check_layer("itc", 0)
    with pytest.raises(LayerError, match=r"^--block_num 9: two has no .* itm, only 1; one has no .* itm, only 1, 2$"):
        counted.answers.check_layer("itm", 9)
    events = Events(counted.answers, [], 2)
    update, said = events.layers("two", NOTHING, "itm", None)
    assert (update["value"], update["choices"]) == (1, [("1 (usual)", 1)])
    assert "two has no layer 2 in mode itm, only 1; 1 was chosen in its place." in said
    assert events.layers("one", NOTHING, "itm", None)[0]["value"] == 2
    for model, layer in (("one", None), ("one", 1), ("two", 1)):
        assert "has no layer" not in events.layers(model, NOTHING, "itm", layer)[1]
    counted.answers.offers = {"broken": offers["broken"], **counted.answers.offers}
    counted.answers.check_layer("itm", 9)  # the page says why the model cannot be opened


def test_remarks_are_made_once() -> None:
    replies = [Reply("one", [], ["a: short", "b: long"], {}), Reply("two", [], ["b: long", "c: cut"], {})]
    assert fragments.remarks(replies) == ["one: a: short", "one and two: b: long", "two: c: cut"]


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, and that holds nothing: decoding it would say so."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content[:41])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * (10 * 2**20 + 1), r"^up\.png: 10\.1 MB, and at most 10 MB are read; save it as JPEG"),
        (png_header(8000, 5001), r"^up\.png: cannot be decoded \(8000 x 5001 pixels, and at most 40 megapixels"),
        (
            png_header(80_000, 50_000),
            r"^up\.png: cannot be decoded \(Image size \(4000000000 pixels\).* make the image",
        ),
        (png_header(8000, 5000), r"^up\.png: cannot be decoded \(.*is the file complete"),
        (png_header(1, 39_000_000), r"^up\.png: cannot be decoded \(1 x 39000000 pixels, and sides of at most 20000"),
        (png_header(20_001, 1), r"^up\.png: cannot be decoded \(20001 x 1 pixels, and sides of at most 20000 are read"),
        (png_header(20_000, 2000), r"^up\.png: cannot be decoded \(.*is the file complete"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"^up\.png: not an image, or of another kind"),
        (b"", r"^up\.png: not an image"),
        (file()[:300], r"^up\.png: cannot be decoded .* is the file complete"),
    ],
    ids=[
        "bytes",
        "pixels",
        "bomb",
        "just small enough",
        "high",
        "wide",
        "just short enough",
        "svg",
        "empty",
        "cut off",
    ],
)
def test_uploads_that_are_refused(content: bytes, message: str, counted: Counted) -> None:
    with pytest.raises(DataError, match=message):
        counted.answers.add_picture(content, "up.png")
    assert not counted.answers.pictures.values


def test_the_same_content_is_one_picture(counted: Counted) -> None:
    first, second = (counted.answers.add_picture(file(), name) for name in ("a.jpg", "b.jpg"))
    assert isinstance(first, Picture)
    assert first.image is second.image
    assert (first.key, counted.answers.picture(first.key).name) == (second.key, "b.jpg")


def test_phrases_of_a_text() -> None:
    assert split_phrases(" the dog \n\n\r\nthe cat\nthe dog\n") == ["the dog", "the cat"]
    assert len(split_phrases("\n".join("abcdef"))) == 6
    assert split_phrases("x" * 300) == ["x" * 300]
    for text, message in (
        (" \n ", "write a phrase"),
        ("\n".join("abcdefg"), "7 phrases, and at most 6"),
        ("x" * 301, "a phrase of 301 characters, and at most 300"),
    ):
        with pytest.raises(PhraseError, match=message):
            split_phrases(text)


# ---- what is offered


def test_checkpoints_of_the_page(tmp_path: Path) -> None:
    stage1 = Offer("stage 1 (before AMC)", SHIPPED, "configs/scenes/Grounding_refcoco.yaml")
    amc = Offer("AMC", SHIPPED_AMC)
    assert offered(demo=tmp_path) == [stage1, amc]
    for name in ("amc/checkpoint_00.pth", "amc/checkpoint_02.pth", "control/checkpoint_01.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    control, trained = tmp_path / "control/checkpoint_01.pth", tmp_path / "amc/checkpoint_02.pth"
    left = [Offer("make demo: control", control), Offer("make demo: AMC", trained)]
    assert offered(demo=tmp_path) == [stage1, amc, *left]
    assert [offer.config for offer in offered(config="my.yaml", demo=tmp_path)] == ["my.yaml"] * 4
    (tmp_path / "amc/checkpoint_01.pth").touch()
    other = tmp_path / "amc/checkpoint_01.pth"
    named = offered([str(control), str(other), str(SHIPPED), str(control)])
    assert named == [
        Offer("control/checkpoint_01.pth", control),
        Offer("amc/checkpoint_01.pth", other),
        Offer("checkpoints/scenes_stage1.safetensors", *stage1[1:]),
    ]
    assert offered([str(SHIPPED)], "my.yaml") == [Offer("scenes_stage1.safetensors", SHIPPED, "my.yaml")]
    with pytest.raises(UserError, match=r"none\.pth: no such checkpoint"):
        offered([str(tmp_path / "none.pth")])


def test_examples(tmp_path: Path) -> None:
    photographs = examples.photograph_examples()
    assert [example.name for example in photographs] == ["astronaut", "coffee", "cat", "rocket"]
    assert all(example.phrases and example.credit for example in photographs)
    texts = {"100000.jpg": ["star", "the big star", "star", "red", "a b"], "100001.jpg": ["x"], "100016.jpg": ["y"]}
    entries = [{"image": name, "text": text} for name, found in texts.items() for text in found]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    for name in ("100000.jpg", "100001.jpg"):
        (tmp_path / name).write_bytes(file())
    (scene,) = scene_examples(tmp_path / "val.json", tmp_path)
    assert scene == ("scene 1", tmp_path / "100000.jpg", ("the big star", "a b", "red"), "")
    assert scene_examples(tmp_path / "none.json", tmp_path) == []
    shipped = scene_examples()
    assert [len(example.phrases) for example in shipped] == [3] * 4
    assert all(example.path.is_file() for example in shipped)


def test_times_are_told() -> None:
    found = Answer("P", "p", 0.5, np.zeros((2, 2), np.float32), ())
    replies = [
        Reply("AMC", [found], [], {"image": 0.8, "phrase": 0.04}),
        Reply("control", ["no words", found], [], {}),
        Reply("broken", ["no checkpoint", "no checkpoint"], [], {}),
    ]
    took = "AMC: image 0.80 s, phrase 0.04 s; control: known already; broken: no answer; pictures 0.30 s"
    assert fragments.times(replies, 0.3) == took
