"""The page's pictures and sentences as HTML; pictures are inside it, so that none is left on the server."""

import html
import io
from collections.abc import Sequence

from grounding.explain import Answer, Grounding, of_word, place
from grounding.pictures import overlay
from grounding.pictures.overlay import data_uri
from grounding.web.session import MOST_BYTES, TOO_LARGE, Picture, Reply
from utils import UserError

SIDE = 4.5  # inches of a picture's longer side: text stays legible with three pictures beside each other
SMALL_SHOWN = 256  # pixels of a longer side; up to this many are sent as PNG and shown pixel by pixel
BOXES_SHOWN = 3
FAST = 1  # of PNG's compression
WHOLE = "whole phrase"
SAVE = "this.href = this.closest('figure').querySelector('img').src"  # the picture is sent once, not again for this

REFUSED = '<div id="amc-refused"></div>'  # where `SCRIPT` writes
SCRIPT = f"""<script>
// A file that is too large is refused before it is sent; Gradio would leave "Error" where its box was.
const refused = (event, files, clear) => {{
    const place = document.getElementById("amc-refused");
    const large = Array.from(files ?? []).find((file) => file.size > {MOST_BYTES});
    if (!place) return;
    place.replaceChildren();
    if (!large) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    clear();
    const said = document.createElement("div");
    said.className = "amc-error";
    said.role = "alert";
    said.textContent = large.name + ": " + (Math.ceil(large.size / 2 ** 20 * 10) / 10).toFixed(1) + " {TOO_LARGE}";
    place.append(said);
}};
window.addEventListener("change", (event) => {{
    const box = event.target;
    if (box.type === "file") refused(event, box.files, () => {{ box.value = ""; }});
}}, true);
window.addEventListener("drop", (event) => {{
    const leave = () => event.target.dispatchEvent(new DragEvent("dragleave", {{bubbles: true, cancelable: true}}));
    refused(event, event.dataTransfer?.files, leave);
}}, true);
window.addEventListener("click", (event) => {{
    if (event.target.closest("#amc-examples")) document.getElementById("amc-refused")?.replaceChildren();
}}, true);
</script>"""

STYLE = """
.amc-row {display: grid; gap: 12px; align-items: start; grid-template-columns: minmax(0, 2fr) repeat(2, minmax(0, 3fr))}
.amc-row figure, .amc-picture figure {margin: 0; min-width: 0}
.amc-row img, .amc-picture img {display: block; border-radius: 4px; object-fit: contain}
.amc-row img {width: 100%; max-width: 640px; height: auto}
.amc-row a {margin: 0; padding: 0}
.amc-row .amc-plain {margin-top: 8%}
.amc-row .amc-plain img {max-height: 800px; object-position: left top}
.amc-picture img {max-width: 100%; max-height: 240px; min-height: 120px; margin: 0 auto}
.amc-row figcaption, .amc-picture figcaption {font-size: 14px; line-height: 1.4; margin-top: 4px}
.amc-row figcaption, .amc-picture figcaption, .amc-error, .amc-note {overflow-wrap: anywhere}
.amc-picture figcaption {text-align: center}
.amc-pixels {image-rendering: pixelated}
.amc-error {border-left: 4px solid #c62828; padding: 6px 10px}
.amc-note {font-size: 14px; opacity: 0.85}
body:has(#amc-refused > *) #amc-said {display: none}
.amc-words, .amc-words label {overflow-wrap: anywhere}
#amc-examples, #amc-examples .grid-wrap {height: auto !important; min-height: 0 !important}
#amc-examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px; padding: 6px}
#amc-examples .thumbnail-item {width: 100%; height: auto; aspect-ratio: 1}
#amc-examples .caption-label {font-size: 11px; padding: 1px 5px}
@media (max-width: 760px) {
  .amc-row {grid-template-columns: minmax(0, 1fr)}
  .amc-row .amc-plain {margin-top: 0}
  .amc-row .amc-plain img {width: auto; height: 160px; max-width: 100%}
}
"""


def message(text: str) -> str:
    """An error of ours, for everyone to read."""
    return f'<div class="amc-error" role="alert">{html.escape(text)}</div>' if text else ""


def note(*lines: str) -> str:
    """Lines of plain text."""
    return "".join(f'<div class="amc-note">{html.escape(line)}</div>' for line in lines)


def shown_picture(picture: Picture, credit: str = "") -> str:
    """The chosen picture as it was read, with its name and size."""
    return f'<div class="amc-picture">{_plain(picture, credit)}</div>'


def word_choices(replies: Sequence[Reply], number: int) -> list[tuple[str, int]]:
    """(name, index) of the maps that a phrase has: 0 the whole phrase, then the words that the first model read."""
    for reply in replies:
        answer = reply.answers[number]
        if isinstance(answer, Answer):
            return [(WHOLE, 0), *((word.word, index) for index, word in enumerate(answer.words, start=1))]
    return [(WHOLE, 0)]


def row(picture: Picture, replies: Sequence[Reply], number: int, choice: int, threshold: float, colormap: str) -> str:
    """A phrase's row: the picture, then each model's map of it.

    Args:
        number: of the phrase among those asked.
        choice: of `word_choices`.
    """
    word = {index: name for name, index in word_choices(replies, number)}.get(choice, WHOLE)
    figures = [_figure(picture, reply, number, choice, word, threshold, colormap) for reply in replies]
    return f'<div class="amc-row">{_plain(picture)}{"".join(figures)}</div>'


def times(replies: Sequence[Reply], drawing: float) -> str:
    """How long an answer took, by its parts: "AMC: image 0.80 s, phrase 0.04 s; pictures 0.30 s"."""
    parts = []
    for reply in replies:
        took = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in reply.seconds.items())
        known = "known already" if any(isinstance(answer, Answer) for answer in reply.answers) else "no answer"
        parts.append(f"{reply.model}: {took or known}")
    return "; ".join([*parts, f"pictures {drawing:.2f} s"])


def remarks(replies: Sequence[Reply]) -> list[str]:
    """What is to be known of how phrases are read, each once: "one and two: cut to 30 words, as in evaluation"."""
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
        content = overlay.png(overlay.overlay(picture.reduced, found, colormap=colormap, side=SIDE), FAST)
    except UserError as error:
        return f"<figure>{message(str(error))}<figcaption>{name}</figcaption></figure>"
    source = data_uri("image/png", content)
    file = "_".join([overlay.slug(picture.name.rpartition(".")[0] or picture.name), overlay.slug(answer.text)])
    file += f"_{overlay.slug(word)}" * bool(choice) + f"_{overlay.slug(reply.model)}.png"
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
    image, buffer = picture.reduced, io.BytesIO()
    small = max(image.size) <= SMALL_SHOWN
    image.save(buffer, "PNG" if small else "JPEG", quality=90)
    look, kind = ('class="amc-pixels" ', "image/png") if small else ("", "image/jpeg")
    name = html.escape(picture.name, quote=True)
    facts = [name, f"{picture.image.width} x {picture.image.height} pixels", *filter(None, [html.escape(credit)])]
    shown = f'<img {look}src="{data_uri(kind, buffer.getvalue())}" alt="{name}">'
    return f'<figure class="amc-plain">{shown}<figcaption>{" · ".join(facts)}</figcaption></figure>'
