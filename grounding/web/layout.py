"""The page of `demo.py --web`: its layout, and what its controls call; `session` and `fragments` hold what it says."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dataset.photos import read_photo
from dataset.reading import DataError
from grounding.maps import THRESHOLD
from grounding.pictures import overlay
from grounding.web import fragments
from grounding.web.examples import Example
from grounding.web.fragments import message, note
from grounding.web.session import MOST_BYTES, MOST_PHRASES, Answers, Reply, split_phrases
from utils import UserError

TITLE = "Where a model looks"
MODES = ("itm", "itc")
COLORMAPS = ("viridis", "jet", "magma")
NOTHING = "nothing"  # to compare with
THUMBNAIL = 160  # pixels
ABOUT_SCENES = (
    "{models}: trained on small drawings of coloured shapes (the scenes). Such a model knows words like red, star, "
    "small or biggest, and nothing of photographs: its map of one means nothing."
)


class Start(NamedTuple):
    """What the page shows at first."""

    mode: str = "itm"
    layer: int | None = None
    threshold: float = THRESHOLD
    colormap: str = overlay.COLORMAP
    hint: str = ""


class Question(NamedTuple):
    """What the page's controls hold when an answer is wanted, in the order that Gradio hands it over.

    Args:
        key: of the picture.
        text: the box of phrases; `asked` are those that the rows show.
        other: the second model, or `NOTHING`.
    """

    key: str
    text: str
    model: str
    other: str
    mode: str
    layer: int | None
    threshold: float
    colormap: str
    asked: tuple[str, ...]

    @classmethod
    def split(cls, values: Sequence[Any]) -> tuple["Question", Sequence[int | None]]:
        """A question, and the words chosen that follow it."""
        count = len(cls._fields)
        return cls(*values[:count]), values[count:]


# ---- layout


def build(gr: Any, answers: Answers, examples: Sequence[Example], start: Start, uploads: Path) -> Any:
    """The page as Gradio's blocks; `uploads` as in `Events`."""
    names = list(answers.offers)
    colormaps = list(dict.fromkeys([*COLORMAPS, start.colormap]))
    events = Events(gr, answers, examples, start.layer, uploads)

    def example(event: gr.SelectData) -> tuple[Any, ...]:  # Gradio fills it in by this annotation
        return events.example(event.index)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        key, asked = gr.State(""), gr.State(())
        gr.HTML(
            f"<h1>{TITLE}</h1>"
            + note("Heat maps of phrases in a picture, as the model itself explains them.", start.hint)
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                shown = gr.HTML(note(f"Choose an example, or upload a picture of up to {MOST_BYTES / 2**20:g} MB."))
                file = gr.File(label="Upload a picture", file_types=["image"], height=130)
                gr.HTML(fragments.REFUSED)
                said = gr.HTML(elem_id="amc-said")
            with gr.Column(scale=4, min_width=320):
                gallery = gr.Gallery(
                    [(_thumbnail(example), example.name) for example in examples],
                    show_label=False,
                    columns=4,
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=bool(examples),
                    elem_id="amc-examples",
                )
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
                    colormap = gr.Dropdown(colormaps, value=start.colormap, label="Colours", min_width=140)
        about, status = gr.HTML(), gr.HTML()
        rows = []
        for _ in range(MOST_PHRASES):
            with gr.Column(visible=False) as column:
                rows.append((column, gr.Radio([], label="phrase", elem_classes="amc-words"), gr.HTML()))
        credits = [f"{example.name}: {example.credit}" for example in examples if example.credit]
        gr.HTML(note(f"Photographs from scikit-image; {'; '.join(credits)}.") if credits else "")

        question = list(Question(key, text, model, other, mode, layer, threshold, colormap, asked))
        asking = [*question, *(word for _, word, _ in rows)]
        everything = [status, asked, *(part for parts in rows for part in parts)]
        usual = {"concurrency_id": "answers", "concurrency_limit": 1, "api_visibility": "private"}
        # Unless told otherwise, Gradio drops what is pressed while the same event is under way. A change of a control
        # is answered once more at the end, by what the controls hold then; of pictures, each event brings its own.
        last, each = {**usual, "trigger_mode": "always_last"}, {**usual, "trigger_mode": "multiple"}
        answer = {"fn": events.answer, "inputs": asking, "outputs": everything, **last}
        layers = {"fn": events.layers, "inputs": [model, other, mode, layer], "outputs": [layer, about], **last}
        page.load(**layers)
        upload = {"fn": events.upload, "inputs": [file, key], "outputs": [key, shown, file, said], "preprocess": False}
        file.upload(**upload, **each).then(**answer)
        gallery.select(example, None, [key, shown, said, text], **each).then(**answer)
        for component in (model, other, mode):
            component.input(**layers).then(**answer)
        for event in (button.click, text.submit, layer.input, colormap.input):
            event(**answer)
        threshold.input(**answer, show_progress="hidden")  # while it is dragged, or typed
        for number, (_, word, html) in enumerate(rows):
            word.input(lambda *values, number=number: events.row(number, *values), [*question, word], html, **last)
    return page


def _thumbnail(example: Example) -> Image.Image:
    image = read_photo(example.path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


# ---- events


class Events:
    """What the page's controls call; errors of ours come back as messages on the page.

    Args:
        uploads: where the server writes uploads, each in a folder of its own; nothing else is read or deleted.
    """

    def __init__(
        self,
        gr: Any,
        answers: Answers,
        examples: Sequence[Example],
        first_layer: int | None = None,
        uploads: Path = Path("no uploads"),
    ) -> None:
        self.gr, self.answers, self.examples = gr, answers, examples
        self.first_layer, self.uploads = first_layer, uploads

    def upload(self, file: Any, key: str) -> tuple[Any, ...]:
        """Read an upload, Gradio's {"path", ...}, and delete it; outputs: key, picture, file, message."""
        if file is None:
            return key, self.gr.skip(), None, ""
        try:
            content, name = self.taken(file)
            picture = self.answers.add_picture(content, name)
        except UserError as error:
            return key, self.gr.skip(), None, message(str(error))
        return picture.key, fragments.shown_picture(picture), None, ""

    def taken(self, file: Any) -> tuple[bytes, str]:
        """The content and the name of an upload, which is deleted; raises `DataError` for any other file."""
        path = Path(file["path"]).resolve() if isinstance(file, dict) else Path()
        if path.parent.parent.parent != self.uploads:
            raise DataError("only uploads of this page are read")
        place = path.parent.parent
        try:
            found = min(path.parent.iterdir())  # `path` itself, but for what the gate takes out of names
            return found.read_bytes(), found.name
        except (OSError, ValueError):
            raise DataError("the upload is no longer kept; upload it again") from None
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def example(self, index: int) -> tuple[Any, ...]:
        """Outputs: key, picture, message, phrases."""
        if not isinstance(index, int) or index not in range(len(self.examples)):
            return "", self.gr.skip(), message("there is no such example"), self.gr.skip()
        example = self.examples[index]
        picture = self.answers.add_picture(example.path.read_bytes(), example.path.name)
        return picture.key, fragments.shown_picture(picture, example.credit), "", "\n".join(example.phrases)

    def layers(self, model: str, other: str, mode: str, layer: int | None) -> tuple[Any, str]:
        """The layers of the first model, the chosen one kept if it has it; outputs: layer, remarks on the models."""
        try:
            found = self.answers.layers(model, mode)
        except UserError as error:
            return self.gr.update(choices=[], value=None), message(f"{model}: {error}")
        wanted = self.first_layer if layer is None else layer
        value = next((number for number in (wanted, found.usual) if number in found.choices), found.choices[-1])
        choices = [(f"{number} (usual)" if number == found.usual else str(number), number) for number in found.choices]
        small = [model] if found.of_scenes else []
        with contextlib.suppress(UserError):  # it is said where its maps would stand
            if other != NOTHING and self.answers.layers(other, mode).of_scenes:
                small.append(other)
        models = " and ".join(dict.fromkeys(small))
        remarks = [ABOUT_SCENES.format(models=models)] if small else []
        if wanted not in (None, value):
            remarks.append(f"{found.lacks(model, mode, wanted)}; {value} was chosen in its place.")
        return self.gr.update(choices=choices, value=value), note(*remarks)

    def ask(self, question: Question, text: str) -> list[Reply]:
        """The replies of the chosen models; raises `UserError` when there is nothing to ask."""
        self.answers.picture(question.key)
        phrases = split_phrases(text)
        models = list(dict.fromkeys([question.model, question.other]))
        return [
            self.answers.ask(question.key, phrases, name, question.mode, question.layer)
            for name in models
            if name != NOTHING
        ]

    def answer(self, *values: Any) -> list[Any]:
        """Answer a `Question`, its values followed by the word chosen in each row.

        Outputs: status, the phrases asked, and for each row its column, its words and its pictures.
        """
        question, words = Question.split(values)
        hidden = [self.gr.update(visible=False), self.gr.skip(), ""]
        try:
            replies = self.ask(question, question.text)
        except UserError as error:
            return [message(str(error)), (), *hidden * MOST_PHRASES]
        start, rows = time.perf_counter(), []
        phrases, picture = split_phrases(question.text), self.answers.picture(question.key)
        for number, phrase in enumerate(phrases):
            choices = fragments.word_choices(replies, number)
            same = tuple(question.asked[number : number + 1]) == (phrase,) and (words[number] or 0) < len(choices)
            choice = (words[number] or 0) if same else 0
            html = fragments.row(picture, replies, number, choice, question.threshold, question.colormap)
            rows += [self.gr.update(visible=True), self.gr.update(choices=choices, value=choice, label=phrase), html]
        rows += hidden * (MOST_PHRASES - len(phrases))
        status = note(fragments.times(replies, time.perf_counter() - start), *fragments.remarks(replies))
        return [status, tuple(phrases), *rows]

    def row(self, number: int, *values: Any) -> str:
        """The pictures of one row, for another of its words; of the phrases asked, whatever the box holds by now."""
        question, (word,) = Question.split(values)
        try:
            replies, picture = self.ask(question, "\n".join(question.asked)), self.answers.picture(question.key)
            return fragments.row(picture, replies, number, word or 0, question.threshold, question.colormap)
        except UserError as error:
            return message(str(error))
