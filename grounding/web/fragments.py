"""What the page shows of pictures and answers, as the HTML of fragments.html."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dataset.photos import read_photo
from grounding.explain import Answer, Grounding, of_word, place
from grounding.pictures.overlay import overlay, slug
from grounding.pictures.render import data_uri, png
from grounding.web.examples import Example
from grounding.web.session import Picture, Reply
from utils import UserError

SIDE = 4.5  # inches of a picture's longer side: text stays legible with three pictures beside each other
SMALL_SHOWN = 256  # pixels of a longer side; up to this many are sent as PNG and shown pixel by pixel
BOXES_SHOWN = 3
FAST = 1  # of PNG's compression
THUMBNAIL = 160  # pixels

HTML: Any = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("fragments.html")
message, note, upload_box = (getattr(HTML.module, name) for name in ("message", "note", "upload_box"))


def example_buttons(examples: Sequence[Example]) -> str:
    """A small picture to press for each example."""
    buttons = []
    for example in examples:
        image = read_photo(example.path)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buttons.append((example.name, _data(image, "JPEG")))
    return HTML.module.example_buttons(buttons)


def shown_picture(picture: Picture, credit: str = "") -> str:
    """The chosen picture as it was read, with its name and size."""
    return HTML.module.shown_picture(_plain(picture, credit))


def map_names(replies: Sequence[Reply], number: int) -> list[str]:
    """The names of the maps that a phrase has: the whole phrase, then the words that the first model read."""
    answers = (reply.answers[number] for reply in replies)
    found = next((answer.words for answer in answers if isinstance(answer, Answer)), ())
    return ["whole phrase", *(word.word for word in found)]


def row(
    picture: Picture, phrase: str, replies: Sequence[Reply], number: int, choice: int, threshold: float, colormap: str
) -> str:
    """A phrase's row: its words to choose from, the picture, then each model's map.

    Args:
        number: of the phrase among those asked.
        choice: an index of `map_names`.
    """
    names, figures = map_names(replies, number), []
    for reply in replies:
        figures.append({"model": reply.model, "error": ""})
        try:
            figures[-1] |= _figure(picture, reply, number, choice, names[choice], threshold, colormap)
        except UserError as error:
            figures[-1]["error"] = str(error)
    return HTML.module.row(_plain(picture), phrase, names, choice, figures)


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
) -> dict[str, Any]:
    """What a row's figure is filled with; raises `UserError` where there is no map."""
    answer = reply.answers[number]
    if not isinstance(answer, Answer):
        raise UserError(answer)
    shown, share = answer, []
    if choice:
        if len(answer.words) < choice or answer.words[choice - 1].word != word:
            raise UserError(f"this model has no map of {word!r} in {answer.text!r}")
        shown, share = of_word(answer, choice - 1), [f"{100 * answer.words[choice - 1].share:.0f}% of the phrase's map"]
    found = place(shown, picture.image.height, picture.image.width, threshold)
    content = png(overlay(picture.reduced, found, colormap=colormap, side=SIDE), FAST)
    parts = [picture.name.rpartition(".")[0] or picture.name, answer.text, *([word] if choice else []), reply.model]
    point = f"point {found.point[0]}, {found.point[1]}"
    return {
        "source": data_uri("image/png", content),
        "alt": f"map of {shown.text}, {reply.model}",
        "facts": [f"match probability {found.match:.3f}", point, _boxes(found), *share],
        "file": "_".join(map(slug, parts)) + ".png",
    }


def _boxes(found: Grounding) -> str:
    if not found.boxes:
        return "no box: the map is 0 everywhere"
    first, *others = [str(list(box.box)) for box in found.boxes[:BOXES_SHOWN]]
    more = len(found.boxes) - BOXES_SHOWN
    return f"best box {first}" + f"; others {' '.join(others)}" * bool(others) + f" and {more} more" * (more > 0)


def _plain(picture: Picture, credit: str = "") -> dict[str, Any]:
    """What a picture without a map is filled with."""
    small = max(picture.reduced.size) <= SMALL_SHOWN
    facts = [picture.name, f"{picture.image.width} x {picture.image.height} pixels", *([credit] if credit else [])]
    source = _data(picture.reduced, "PNG" if small else "JPEG")
    return {"name": picture.name, "facts": facts, "source": source, "small": small}


def _data(image: Image.Image, kind: str) -> str:
    """An image as the address of its own content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())
