"""The page's HTML: pictures (inside it, as data: no file is served), captions, messages."""

import html
import io
from collections.abc import Sequence

from PIL import Image

from dataset.photos import read_photo
from grounding.explain import Answer, Grounding, of_word, place
from grounding.pictures.overlay import overlay, slug
from grounding.pictures.render import data_uri, png
from grounding.web.examples import Example
from grounding.web.session import MOST_BYTES, Picture, Reply
from utils import UserError

SIDE = 4.5  # inches of a picture's longer side: text stays legible with three pictures beside each other
SMALL_SHOWN = 256  # pixels of a longer side; up to this many are sent as PNG and shown pixel by pixel
BOXES_SHOWN = 3
FAST = 1  # of PNG's compression
THUMBNAIL = 160  # pixels
WHOLE = "whole phrase"
SAVE = "this.href = this.closest('figure').querySelector('img').src"  # the picture is sent once, not again for this


def message(text: str) -> str:
    """An error message; nothing where there is none."""
    return f'<div class="amc-error" role="alert">{html.escape(text)}</div>' if text else ""


def note(*lines: str) -> str:
    """Lines of plain text."""
    return "".join(f'<div class="amc-note">{html.escape(line)}</div>' for line in lines)


def upload_box() -> str:
    """Where a picture is dropped or chosen, and where choose.js says why one is refused."""
    text = f"Drop a picture here, or click to upload one of up to {MOST_BYTES / 2**20:g} MB"
    box = f'<label class="amc-upload"><input type="file" accept="image/*">{text}</label>'
    return f'{box}<div class="amc-error" role="alert" id="amc-refused"></div>'


def example_buttons(examples: Sequence[Example]) -> str:
    """A small picture to press for each example."""
    buttons = []
    for number, example in enumerate(examples):
        image, name = read_photo(example.path), html.escape(example.name)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buttons.append(f'<button data-example="{number}"><img src="{_data(image, "JPEG")}" alt="">')
        buttons.append(f"<span>{name}</span></button>")
    return f'<div class="amc-examples">{"".join(buttons)}</div>'


def shown_picture(picture: Picture, credit: str = "") -> str:
    """The chosen picture as it was read, with its name and size."""
    return f'<div class="amc-picture">{_plain(picture, credit)}</div>'


def words(replies: Sequence[Reply], number: int) -> list[str]:
    """The names of the maps that a phrase has: the whole phrase, then the words that the first model read."""
    answers = (reply.answers[number] for reply in replies)
    found = next((answer for answer in answers if isinstance(answer, Answer)), None)
    return [WHOLE, *(word.word for word in found.words)] if found else [WHOLE]


def row(
    picture: Picture, phrase: str, replies: Sequence[Reply], number: int, choice: int, threshold: float, colormap: str
) -> str:
    """A phrase's row: its words to choose from, the picture, then each model's map.

    Args:
        number: of the phrase among those asked.
        choice: an index of `words`.
    """
    names = words(replies, number)
    buttons = "".join(
        f'<button role="radio" data-word="{index}" aria-checked="{str(index == choice).lower()}">{html.escape(name)}'
        "</button>"
        for index, name in enumerate(names)
    )
    figures = [_figure(picture, reply, number, choice, names[choice], threshold, colormap) for reply in replies]
    return (
        f'<div class="amc-words" role="radiogroup"><div>{html.escape(phrase)}</div>{buttons}</div>'
        f'<div class="amc-row">{_plain(picture)}{"".join(figures)}</div>'
    )


def times(replies: Sequence[Reply], drawing: float) -> str:
    """How long an answer took, by its parts: "AMC: image 0.80 s, phrase 0.04 s; pictures 0.30 s"."""
    parts = []
    for reply in replies:
        took = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in reply.seconds.items())
        known = "known already" if any(isinstance(answer, Answer) for answer in reply.answers) else "no answer"
        parts.append(f"{reply.model}: {took or known}")
    return "; ".join([*parts, f"pictures {drawing:.2f} s"])


def remarks(replies: Sequence[Reply]) -> list[str]:
    """Notes on how phrases are read, each once: "one and two: cut to 30 words, as in evaluation"."""
    models: dict[str, list[str]] = {}
    for reply in replies:
        for remark in reply.notes:
            models.setdefault(remark, []).append(reply.model)
    return [f"{' and '.join(names)}: {remark}" for remark, names in models.items()]


def _figure(
    picture: Picture, reply: Reply, number: int, choice: int, word: str, threshold: float, colormap: str
) -> str:
    name, answer = f"<b>{html.escape(reply.model)}</b>", reply.answers[number]
    try:
        if not isinstance(answer, Answer):
            raise UserError(answer)
        if choice:
            if len(answer.words) < choice or answer.words[choice - 1].word != word:
                raise UserError(f"this model has no map of {word!r} in {answer.text!r}")
            shown = of_word(answer, choice - 1)
        else:
            shown = answer
        found = place(shown, picture.image.height, picture.image.width, threshold)
        content = png(overlay(picture.reduced, found, colormap=colormap, side=SIDE), FAST)
    except UserError as error:
        return f"<figure>{message(str(error))}<figcaption>{name}</figcaption></figure>"
    source = data_uri("image/png", content)
    file = "_".join([slug(picture.name.rpartition(".")[0] or picture.name), slug(answer.text)])
    file += f"_{slug(word)}" * bool(choice) + f"_{slug(reply.model)}.png"
    alt = html.escape(f"map of {shown.text}, {reply.model}", quote=True)
    facts = [f"match probability {found.match:.3f}", f"point {found.point[0]}, {found.point[1]}", *_boxes(found)]
    if choice:
        facts.append(f"{100 * answer.words[choice - 1].share:.0f}% of the phrase's map")
    link = f'<div><a href="#" download="{file}" onclick="{SAVE}">download PNG</a></div>'
    return (
        f'<figure><img src="{source}" alt="{alt}"><figcaption>{name}: {" · ".join(facts)}{link}</figcaption></figure>'
    )


def _boxes(found: Grounding) -> list[str]:
    if not found.boxes:
        return ["no box: the map is 0 everywhere"]
    first, *others = ["[" + ", ".join(map(str, box.box)) + "]" for box in found.boxes[:BOXES_SHOWN]]
    more = len(found.boxes) - BOXES_SHOWN
    rest = f"; others {' '.join(others)}{f' and {more} more' if more > 0 else ''}" if others else ""
    return [f"best box {first}{rest}"]


def _plain(picture: Picture, credit: str = "") -> str:
    """The picture without a map, reduced if it is large."""
    small = max(picture.reduced.size) <= SMALL_SHOWN
    name, source = html.escape(picture.name, quote=True), _data(picture.reduced, "PNG" if small else "JPEG")
    facts = [name, f"{picture.image.width} x {picture.image.height} pixels", *filter(None, [html.escape(credit)])]
    shown = f'<img {"class=amc-pixels " * small}src="{source}" alt="{name}">'
    return f'<figure class="amc-plain">{shown}<figcaption>{" · ".join(facts)}</figcaption></figure>'


def _data(image: Image.Image, kind: str) -> str:
    """An image as the address of its own content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())
