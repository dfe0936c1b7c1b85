"""What the page of demo.py --web keeps and computes, and what it refuses."""

import io
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.reading import DataError
from dataset.transforms import resize_bilinear_image
from grounding.explain import Answer, PhraseError, ground_all, of_word
from grounding.load import open_model
from grounding.web import session
from grounding.web.session import Answers, Recent, split_phrases
from tests.grounding.web.conftest import Counted, noise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def answers(counted: Counted) -> Answers:
    return counted.answers


@pytest.fixture
def key(answers: Answers) -> str:
    """The key of a picture that was added."""
    return answers.add_picture(noise(), "noise.jpg").key


# ---- what is computed, and how often


def test_an_image_is_encoded_once_and_a_phrase_is_asked_once(counted: Counted, key: str) -> None:
    first = counted.answers.ask(key, ["a red star", "circle"], "one", "itm", None)
    assert counted.took() == (1, 1, 1)
    assert list(first.seconds) == ["model", "image", "2 phrases"]
    again = counted.answers.ask(key, ["circle", "a red star"], "one", "itm", 1)  # 1 is the config's layer
    assert counted.took() == (0, 0, 0)
    assert again.seconds == {}
    assert again.answers == first.answers
    assert list(again.answers) == ["circle", "a red star"]
    more = counted.answers.ask(key, ["a red star", "blue"], "one", "itm", 1)
    assert counted.took() == (0, 0, 1)
    assert list(more.seconds) == ["phrase"]
    for mode, layer in (("itm", 2), ("itc", 1), ("itc", 0)):
        counted.answers.ask(key, ["circle"], "one", mode, layer)
        assert counted.took() == (0, 0, 1)
    other = counted.answers.add_picture(noise(1), "noise.jpg").key  # the same name, another content
    counted.answers.ask(other, ["circle"], "one", "itm", None)
    assert counted.took() == (0, 1, 1)


@pytest.mark.parametrize(("mode", "words"), [("itm", ["[CLS]", "a", "red", "star"]), ("itc", [])], ids=["itm", "itc"])
def test_answers_are_those_of_ground(mode: str, words: list[str], answers: Answers, place: Path) -> None:
    picture = answers.add_picture(noise(orientation=6), "turned.jpg")
    assert picture.image.size == (20, 30)  # upright, as EXIF says
    opened = open_model(place / "two.pth", text_encoder=str(place), device="cpu")
    (found,) = ground_all(opened.explainer(mode), picture.image, ["a red star"])
    (answer,) = answers.ask(picture.key, ["a red star"], "two", mode, None).answers.values()
    assert isinstance(answer, Answer)
    np.testing.assert_allclose(answer.small, found.small, rtol=1e-5)
    assert answer.match == pytest.approx(found.match)
    assert [word.word for word in answer.words] == words
    for number, word in enumerate(answer.words):
        shown = of_word(answer, number)
        assert (shown.text, shown.match, shown.words) == (f"{word.word} (in: a red star)", answer.match, answer.words)
        assert shown.small is word.small


def test_settings_reach_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = []
    for options in ({}, {"resize": resize_bilinear_image}, {"precision": "bf16"}):
        answers = Counted(place, monkeypatch, **options).answers
        (answer,) = answers.ask(
            answers.add_picture(noise(), "x.jpg").key, ["circle"], "one", "itm", None
        ).answers.values()
        assert isinstance(answer, Answer)
        maps.append(answer.small / answer.small.max())
    for changed in maps[1:]:
        assert 0 < np.abs(changed - maps[0]).max() < 0.5


def test_what_is_kept_is_bounded() -> None:
    recent = Recent(10, float)
    for name, value in (("a", 4), ("b", 4)):
        recent.put(name, value)
    assert recent.get("a") == 4  # used again: b is now the oldest
    recent.put("c", 3)
    assert list(recent.values) == ["a", "c"]
    recent.put("c", 6)  # in place of 3, not beside it
    assert recent.values == {"a": 4, "c": 6}
    recent.get("d", lambda: 50)  # more than allowed, and still kept: it is what was asked for
    assert recent.values == {"d": 50}
    assert recent.get("a") is None


def test_encodings_and_pictures_are_dropped(counted: Counted) -> None:
    answers = counted.answers
    answers.encodings.most, answers.pictures.most = 2, 3 * 600
    keys = [answers.add_picture(noise(seed), "x.jpg").key for seed in range(3)]
    for key in keys:
        answers.ask(key, ["circle"], "one", "itm", None)
    assert counted.took() == (1, 3, 3)
    answers.ask(keys[2], ["star"], "one", "itm", None)
    assert counted.took() == (0, 0, 1)
    answers.ask(keys[0], ["star"], "one", "itm", None)
    assert counted.took() == (0, 1, 1)
    fourth = answers.add_picture(noise(3), "x.jpg").key
    assert answers.picture(fourth).key == fourth
    for gone, message in ((keys[1], "no longer kept; choose it again"), ("", "choose a picture first")):
        with pytest.raises(DataError, match=message):
            answers.picture(gone)
    answers.models.most = 1
    answers.opened("two")
    answers.opened("one")
    assert counted.took()[0] == 2  # "one" was dropped for "two"


# ---- what cannot be answered


def test_phrases_that_cannot_be_read_leave_the_others(answers: Answers, key: str) -> None:
    reply = answers.ask(key, ["circle", "...", "a red $", "big " * 31], "one", "itm", None)
    assert [isinstance(answer, Answer) for answer in reply.answers.values()] == [True, False, True, True]
    assert "nothing is left of it" in str(reply.answers["..."])
    assert reply.notes == [
        "a red $: the vocabulary lacks $; the model reads [UNK]",
        f"{'big ' * 15}…: cut to 30 words, as in evaluation",
    ]


@pytest.mark.parametrize(
    ("model", "layer", "picture", "message"),
    [
        ("broken", None, True, "broken.pth"),
        ("two", 2, True, "two has no layer 2 in mode itm, only 1"),
        ("three", None, True, "not among those offered: one, two, broken"),
        ("one", None, False, "no longer kept"),
    ],
)
def test_models_that_cannot_be_asked(
    model: str, layer: int | None, picture: bool, message: str, answers: Answers, key: str
) -> None:
    found = answers.ask(key if picture else "gone", ["circle", "star"], model, "itm", layer).answers
    assert [message in str(answer) for answer in found.values()] == [True, True]


def test_answers_that_are_not_numbers_are_messages(answers: Answers, key: str) -> None:
    """Messages are not kept: the next try is new."""
    (good,) = answers.ask(key, ["circle"], "one", "itm", None).answers.values()
    weight = answers.opened("one").model.itm_head.weight  # type: ignore[attr-defined]
    before = weight.clone()
    weight.fill_(float("nan"))
    known, *new = answers.ask(key, ["circle", "star", "blue"], "one", "itm", None).answers.values()
    assert known is good
    assert all("one.pth, itm_head.weight holds NaN or infinity" in str(message) for message in new)
    weight.copy_(before)
    assert isinstance(answers.ask(key, ["star"], "one", "itm", None).answers["star"], Answer)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, and that holds nothing: decoding it would say so."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content[:41])


def jpeg_of_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan is repeated; of 40 megapixels, each would take 0.1 s."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * more + content[-2:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"x" * (10 * 2**20 + 1), "10.1 MB, and at most 10 MB are read; save it as JPEG", id="bytes"),
        pytest.param(png_header(8000, 5001), ".*8000 x 5001 pixels, and at most 40 megapixels", id="pixels"),
        pytest.param(png_header(80_000, 50_000), ".*Image size .4000000000 pixels.* make the image", id="bomb"),
        pytest.param(png_header(8000, 5000), ".*is the file complete", id="just small enough"),
        pytest.param(png_header(1, 39_000_000), ".*1 x 39000000 pixels, and sides of at most 20000", id="high"),
        pytest.param(png_header(20_001, 1), ".*20001 x 1 pixels, and sides of at most 20000 are read", id="wide"),
        pytest.param(png_header(20_000, 2000), ".*is the file complete", id="just short enough"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image, or of another kind", id="svg"),
        pytest.param(b"", "not an image", id="empty"),
        pytest.param(noise()[:300], "cannot be decoded .* is the file complete", id="cut off"),
        pytest.param(jpeg_of_scans(100), "a JPEG of more than 100 scans", id="scans"),
    ],
)
def test_uploads_that_are_refused(content: bytes, message: str, answers: Answers) -> None:
    with pytest.raises(DataError, match=rf"^up\.png: {message}"):
        answers.add_picture(content, "up.png")
    assert not answers.pictures.values


@pytest.mark.parametrize("more", [0, 80])
def test_a_jpeg_of_some_scans_is_read(more: int, answers: Answers) -> None:
    assert answers.add_picture(jpeg_of_scans(more), "up.jpg").image.size == (64, 64)


def test_uploads_are_decoded_one_at_a_time(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = [], []

    def read_photo(*given: object) -> Image.Image:
        now.append(given)
        most.append(len(now))
        time.sleep(0.05)
        now.pop()
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(session, "read_photo", read_photo)
    threads = [threading.Thread(target=answers.add_picture, args=(bytes([n]), "a.png")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_the_same_content_is_one_picture(answers: Answers) -> None:
    first, second = (answers.add_picture(noise(), name) for name in ("a.jpg", "b.jpg"))
    assert first.image is second.image
    assert (first.key, answers.picture(first.key).name) == (second.key, "b.jpg")


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
