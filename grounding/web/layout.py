"""The layout of the page of `demo.py --web`, and what its controls call. Needs Gradio."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from grounding.load import of_scenes
from grounding.web import fragments
from grounding.web.examples import Example, Start
from grounding.web.fragments import HTML
from grounding.web.session import (
    MOST_BYTES,
    MOST_MEGABYTES,
    MOST_PHRASES,
    TOO_LARGE,
    Answers,
    Reply,
    lacks,
    split_phrases,
)
from utils import UserError

TITLE = "Where a model looks"
MODES = ("itm", "itc")
COLORMAPS = ("viridis", "jet", "magma")
NOTHING = "nothing"  # to compare with
ABOUT_SCENES = (
    "{models}: trained on small drawings of coloured shapes (the scenes). Such a model knows words like red, star, "
    "small or biggest, and nothing of photographs: its map of one means nothing."
)
CSS, CHOOSE, WORDS = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "choose.js", "words.js")
)


class Question(NamedTuple):
    """What the page's controls hold when an answer is wanted, in the order that Gradio hands it over."""

    key: str  # of the picture
    text: str  # the phrases, one a line
    model: str
    other: str  # the second model, or `NOTHING`
    mode: str
    layer: int | None
    threshold: float
    colormap: str
    asked: dict[str, int]  # the phrases that the rows show, each with the index of its chosen word


def build(answers: Answers, examples: Sequence[Example], start: Start) -> gr.Blocks:
    """The page as Gradio's blocks."""
    names = list(answers.offers)
    events = Events(answers, examples, start.layer)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        key, asked = gr.State(""), gr.State({})
        gr.HTML(f"<h1>{TITLE}</h1>{HTML.note('Heat maps of phrases in a picture, as the model itself explains them.')}")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                shown = gr.HTML(HTML.note("Choose an example, or upload a picture."))
                box = HTML.upload_box(MOST_MEGABYTES)
                upload = gr.HTML(box, js_on_load=CHOOSE, most=MOST_BYTES, too_large=TOO_LARGE)
            with gr.Column(scale=4, min_width=320):
                gallery = gr.HTML(HTML.example_buttons(examples), js_on_load=CHOOSE, visible=bool(examples))
                text = gr.Textbox(label="Phrases, one a line", lines=3, max_lines=MOST_PHRASES)
                button = gr.Button("Show", variant="primary")
            with gr.Column(scale=4, min_width=320):
                model = gr.Dropdown(names, value=names[0], label="Model")
                second = names[-1] if len(names) > 1 else NOTHING
                other = gr.Dropdown([NOTHING, *names], value=second, label="Compare with")
                with gr.Row():
                    mode = gr.Radio(MODES, value=start.mode, label="Explained", min_width=140)
                    layer = gr.Dropdown([], label="Layer", min_width=140)
                with gr.Row():
                    lowest = min(0.05, start.threshold)
                    threshold = gr.Slider(lowest, 1, start.threshold, step=0.05, label="Threshold", min_width=140)
                    colormaps = list(dict.fromkeys([*COLORMAPS, start.colormap]))
                    colormap = gr.Dropdown(colormaps, value=start.colormap, label="Colours", min_width=140)
        about, status = gr.HTML(), gr.HTML()
        rows = [gr.HTML(js_on_load=WORDS, visible=False) for _ in range(MOST_PHRASES)]
        credits = [f"{example.name}: {example.credit}" for example in examples if example.credit]
        gr.HTML(HTML.note(f"Photographs from scikit-image; {'; '.join(credits)}.") if credits else "")

        question: list[Any] = [key, text, model, other, mode, layer, threshold, colormap, asked]  # see `Question`
        usual: dict[str, Any] = {"concurrency_id": "answers", "concurrency_limit": 1, "api_visibility": "private"}
        # Unless told otherwise, Gradio drops what is pressed while the same event is under way. A change of a control
        # is answered once more at the end, by what the controls hold then; pictures and words come with each event.
        last, each = {**usual, "trigger_mode": "always_last"}, {**usual, "trigger_mode": "multiple"}
        layers = last | {"fn": events.layers, "inputs": [model, other, mode, layer], "outputs": [layer, about]}
        answer = last | {"fn": events.answer, "inputs": question, "outputs": [status, asked, *rows]}
        page.load(**layers)
        for pictures in (upload, gallery):
            pictures.select(events.choose, None, [key, shown, text], **each).then(**answer)
        for control in (model, other, mode):
            control.input(**layers).then(**answer)
        for event in (button.click, text.submit, layer.input, colormap.input):
            event(**answer)
        threshold.input(**answer, show_progress="hidden")  # while it is dragged, or typed
        for row in rows:
            show: Any = {"show_progress_on": [status], **each}  # the other rows stay pressable
            row.input(events.choose_word, question, [asked, row], **show)
    return page


class Events:
    """What the page's controls call; each `UserError` becomes a message on the page."""

    def __init__(self, answers: Answers, examples: Sequence[Example], first_layer: int | None = None) -> None:
        self.answers, self.examples, self.first_layer = answers, examples, first_layer

    def choose(self, event: gr.EventData) -> list[Any]:  # Gradio hands it over because of this annotation
        """Take {"example": number} or {"picture": key of an upload}; outputs: key, picture, phrases."""
        chosen = event._data or {}
        number = chosen.get("example")
        try:
            if "picture" in chosen:
                picture = self.answers.picture(chosen["picture"])
                return [picture.key, HTML.shown_picture(picture), gr.skip()]
            if not isinstance(number, int) or number not in range(len(self.examples)):
                raise UserError("there is no such example")
            example = self.examples[number]
            picture = self.answers.add_picture(example.path.read_bytes(), example.path.name)
            return [picture.key, HTML.shown_picture(picture, example.credit), "\n".join(example.phrases)]
        except UserError as error:
            return ["", HTML.message(str(error)), gr.skip()]

    def layers(self, model: str, other: str, mode: str, layer: int | None) -> tuple[Any, str]:
        """The layers of the first model, the chosen one kept if it has it; outputs: layer, remarks on the models."""
        try:
            opened = self.answers.opened(model)
        except UserError as error:
            return gr.update(choices=[], value=None), HTML.message(f"{model}: {error}")
        known, usual = opened.model.layers(mode), opened.config.block_num
        wanted = self.first_layer if layer is None else layer
        value = next((number for number in (wanted, usual) if number in known), known[-1])
        choices = [(f"{number} (usual)" if number == usual else str(number), number) for number in known]
        names = [model] if of_scenes(opened.config) else []
        with contextlib.suppress(UserError):  # it is said where its maps would stand
            if other not in (NOTHING, model) and of_scenes(self.answers.opened(other).config):
                names.append(other)
        remarks = [ABOUT_SCENES.format(models=" and ".join(names))] if names else []
        if wanted not in (None, value):
            remarks.append(f"{lacks(model, opened, mode, wanted)}; {value} was chosen in its place.")
        return gr.update(choices=choices, value=value), HTML.note(*remarks)

    def ask(self, question: Question, phrases: Sequence[str]) -> list[Reply]:
        """The replies of the chosen models."""
        models = [name for name in dict.fromkeys([question.model, question.other]) if name != NOTHING]
        return [self.answers.ask(question.key, phrases, name, question.mode, question.layer) for name in models]

    def answer(self, *values: Any) -> list[Any]:
        """Answer a `Question`; outputs: status, the phrases asked with their words, and the rows."""
        question, rows = Question(*values), [gr.update(value="", visible=False)] * MOST_PHRASES
        try:
            picture = self.answers.picture(question.key)
            phrases = split_phrases(question.text)
            replies = self.ask(question, phrases)
        except UserError as error:
            return [HTML.message(str(error)), {}, *rows]
        start, asked, view = time.perf_counter(), {}, (question.threshold, question.colormap)
        for number, phrase in enumerate(phrases):
            asked[phrase], html = fragments.row(picture, phrase, replies, question.asked.get(phrase), *view)
            rows[number] = gr.update(value=html, visible=True)
        status = HTML.note(fragments.times(replies, time.perf_counter() - start), *fragments.remarks(replies))
        return [status, asked, *rows]

    def choose_word(self, event: gr.EventData, *values: Any) -> list[Any]:
        """Take {"phrase": one of those asked, whatever the box holds by now, "word": number}; outputs: asked, row."""
        question, chosen = Question(*values), event._data or {}
        asked, phrase, view = dict(question.asked), chosen.get("phrase"), (question.threshold, question.colormap)
        try:
            if phrase not in asked:
                raise UserError("this phrase was not asked")
            picture, replies = self.answers.picture(question.key), self.ask(question, [phrase])
            asked[phrase], html = fragments.row(picture, phrase, replies, chosen.get("word"), *view)
        except UserError as error:
            html = HTML.message(str(error))
        return [asked, gr.update(value=html, visible=True)]
