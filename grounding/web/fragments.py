"""What the page shows of pictures and answers, as the HTML of fragments.html."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dataset.photos import read_photo
from grounding.explain import Answer, of_word, place
from grounding.pictures.overlay import overlay, slug
from grounding.pictures.render import data_uri, png
from grounding.web.session import Picture, Reply
from utils import UserError

SIDE = 4.5  # inches of a picture's longer side: text stays legible with three pictures beside each other
FAST = 1  # of PNG's compression
THUMBNAIL = 160  # pixels


def thumbnail(path: Path) -> Image.Image:
    """A photograph, reduced."""
    image = read_photo(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def address(image: Image.Image, kind: str) -> str:
    """An image as the address of its own content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"thumbnail": thumbnail, "address": address}
HTML: Any = ENVIRONMENT.get_template("fragments.html").module  # its macros


def row(
    picture: Picture, phrase: str, replies: Sequence[Reply], word: Any, threshold: float, colormap: str
) -> tuple[int, str]:
    """A phrase's row: its words to choose from, the picture, then each model's map.

    Args:
        word: 0 for the whole phrase's map, then the words that the first model read; 0 is taken for anything else.

    Returns:
        the word that was taken, and the HTML.
    """
    answers = {reply.model: reply.answers[phrase] for reply in replies}
    read = next((answer.words for answer in answers.values() if isinstance(answer, Answer)), ())
    names = ["whole phrase", *(each.word for each in read)]
    choice = word if isinstance(word, int) and word in range(len(names)) else 0
    # A word is counted from the end: the map of one model is of [CLS] too, of another it is not.
    look = choice and choice - len(names), names[choice], threshold, colormap
    figures = [_figure(picture, model, answer, *look) for model, answer in answers.items()]
    return choice, HTML.row(picture, phrase, names, choice, figures)


def _figure(
    picture: Picture, model: str, answer: Answer | str, index: int, word: str, threshold: float, colormap: str
) -> dict[str, Any]:
    """What a row's figure is filled with: a map, or the message why there is none."""
    try:
        if not isinstance(answer, Answer):
            raise UserError(answer)
        parts, shown = [Path(picture.name).stem, answer.text, model], answer
        if index:
            if [each.word for each in answer.words[index:][:1]] != [word]:
                raise UserError(f"this model has no map of {word!r} in {answer.text!r}")
            parts.insert(2, word)
            shown = of_word(answer, index)
        found = place(shown, picture.image.height, picture.image.width, threshold)
        content = png(overlay(picture.reduced, found, colormap=colormap, side=SIDE), FAST)
    except UserError as error:
        return {"model": model, "error": str(error)}
    source, file = data_uri("image/png", content), "_".join(map(slug, parts)) + ".png"
    return {"model": model, "error": "", "found": found, "source": source, "file": file}


def times(replies: Sequence[Reply], drawing: float) -> str:
    """How long an answer took, by its parts: "AMC: image 0.80 s, phrase 0.04 s; pictures 0.30 s"."""
    parts = []
    for reply in replies:
        took = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in reply.seconds.items())
        known = "known already" if any(isinstance(answer, Answer) for answer in reply.answers.values()) else "no answer"
        parts.append(f"{reply.model}: {took or known}")
    return "; ".join([*parts, f"pictures {drawing:.2f} s"])


def remarks(replies: Sequence[Reply]) -> list[str]:
    """Notes on how phrases are read, each once: "one and two: cut to 30 words, as in evaluation"."""
    models: dict[str, list[str]] = {}
    for reply in replies:
        for remark in reply.notes:
            models.setdefault(remark, []).append(reply.model)
    return [f"{' and '.join(names)}: {remark}" for remark, names in models.items()]
