"""Pictures, models and answers that the page of `demo.py --web` keeps, so that each is computed once.

An image is encoded once per model, a phrase is asked once per model, mode and layer. Threshold, words and colours ask
the model nothing (`grounding.explain.place`). What is kept is bounded in number and in size.
"""

import hashlib
import io
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from dataset.photos import read_photo
from dataset.reading import DataError
from dataset.transforms import resize_bicubic
from grounding.explain import Answer, EncodedImage, PhraseError, Resize, ask, encode, notes
from grounding.load import OpenedModel
from grounding.web.examples import Offer
from models.interface import LayerError
from utils import UserError

MOST_MEGABYTES = 10  # of an uploaded file
MOST_BYTES = MOST_MEGABYTES * 2**20
TOO_LARGE = f"MB, and at most {MOST_MEGABYTES} MB are read; save it as JPEG or with fewer pixels"
MOST_PIXELS, LONGEST_SIDE = 40_000_000, 20_000
MOST_SCANS = 100  # of a JPEG: each goes over all pixels again, and 80 bytes are enough for one; programs write about 10
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")
LONGEST_FILE_NAME = 100  # characters
MOST_PHRASES, LONGEST_PHRASE = 6, 300  # phrases at a time; characters
LONGEST_NAMED = 60  # characters of a phrase in a remark on it
LONGEST_SHOWN = 640  # pixels of the longer side of a picture that is shown without a map
KEPT_MODELS, KEPT_ENCODINGS, KEPT_ANSWERS = 3, 8, 512
KEPT_PIXELS = 120_000_000  # of all pictures together


class Recent:
    """The values used last, whose sizes (by default 1) add up to at most `most`; always the newest."""

    def __init__(self, most: float, size: Callable[[Any], float] = lambda value: 1) -> None:
        self.most, self.size = most, size
        self.values: dict[Any, Any] = {}  # the one used last comes last

    def get(self, key: Any, compute: Callable[[], Any] | None = None) -> Any:
        """The value of a key; where it is not kept, the one that is computed, or None."""
        if key in self.values:
            return self.put(key, self.values[key])
        return self.put(key, compute()) if compute else None

    def put(self, key: Any, value: Any) -> Any:
        self.values.pop(key, None)
        self.values[key] = value
        while len(self.values) > 1 and sum(map(self.size, self.values.values())) > self.most:
            del self.values[next(iter(self.values))]
        return value


class Picture(NamedTuple):
    """A picture, upright and RGB; `key` is the digest of its file, `reduced` a small copy to show without a map."""

    key: str
    name: str
    image: Image.Image
    reduced: Image.Image


class Reply(NamedTuple):
    """What one model says of a picture."""

    model: str
    answers: dict[str, Answer | str]  # by phrase; or the message why there is none
    notes: list[str]  # on how phrases are read
    seconds: dict[str, float]  # for what was computed ("model", "image", "phrase"); empty when all was known


class Answers:
    """The pictures, models, encoded images and answers that are kept.

    Args:
        open_offer: a `UserError` becomes the reply's message, and the next question tries again.
        resize: to the model's size.
        explain: settings of every explainer, such as `precision`.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        open_offer: Callable[[Offer], OpenedModel],
        resize: Resize = resize_bicubic,
        **explain: Any,
    ) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.open_offer, self.resize, self.explain = open_offer, resize, explain
        self.models = Recent(KEPT_MODELS)  # by name
        self.pictures = Recent(KEPT_PIXELS, lambda kept: kept.image.width * kept.image.height)
        self.encodings = Recent(KEPT_ENCODINGS)  # by picture and model
        self.answers = Recent(KEPT_ANSWERS)  # by picture, model, mode, layer and phrase
        # One answer at a time, for an explanation goes back through the model's gradients; and one picture at a time,
        # for decoding one takes far more memory than its file.
        self.lock = threading.RLock()

    def add_picture(self, content: bytes, name: str) -> Picture:
        """Decode an image file and keep it; raises `DataError` when it is too large or no image."""
        name = name[-LONGEST_FILE_NAME:] or "picture"
        if len(content) > MOST_BYTES:
            raise DataError(f"{name}: {math.ceil(len(content) / 2**20 * 10) / 10:.1f} {TOO_LARGE}")
        if len(SCAN.findall(content)) > MOST_SCANS:
            raise DataError(f"{name}: a JPEG of more than {MOST_SCANS} scans; save it again as a usual one")
        key = hashlib.sha256(content).hexdigest()

        def decode() -> Picture:
            image = read_photo(io.BytesIO(content), name, MOST_PIXELS, LONGEST_SIDE)
            return Picture(key, name, image, reduced(image))

        with self.lock:
            return self.pictures.put(key, self.pictures.get(key, decode)._replace(name=name))

    def picture(self, key: str) -> Picture:
        """A picture that was added; raises `DataError` when it is no longer kept."""

        def gone() -> Picture:
            raise DataError("the picture is no longer kept; choose it again" if key else "choose a picture first")

        with self.lock:
            return self.pictures.get(key, gone)

    def opened(self, model: str, seconds: dict[str, float] | None = None) -> OpenedModel:
        """A model that is offered; raises `UserError` when it cannot be opened."""
        if model not in self.offers:
            raise UserError(f"model {model!r}: not among those offered: {', '.join(self.offers)}")
        took = {} if seconds is None else seconds
        with self.lock:
            return self.models.get(model, lambda: _timed(took, "model", self.open_offer, self.offers[model]))

    def check_layer(self, mode: str, layer: int) -> None:
        """Raise `LayerError` when no model has a layer; models are opened in their order until one has it."""
        lacking = []
        for model in self.offers:
            try:
                found = self.opened(model)
            except UserError:
                return  # the page says what is wrong with it
            if layer in found.model.layers(mode):
                return
            lacking.append(lacks(model, found, mode, layer))
        raise LayerError(f"--block_num {layer}: {'; '.join(lacking)}")

    def ask(self, key: str, phrases: Sequence[str], model: str, mode: str, layer: int | None) -> Reply:
        """Ask a model about a picture; every `UserError` becomes a message in the reply.

        `key` is the picture's; no phrase comes twice; layer None is the config's.
        """
        seconds: dict[str, float] = {}
        remarks: list[str] = []
        found: dict[str, Answer | str | None] = {}

        def encoded() -> EncodedImage:
            return _timed(seconds, "image", encode, explainer, self.picture(key).image, self.resize)

        with self.lock:
            try:
                opened = self.opened(model, seconds)
                if layer is not None and layer not in opened.model.layers(mode):
                    raise LayerError(lacks(model, opened, mode, layer))
                explainer = opened.explainer(mode, layer, **self.explain)
                image = self.encodings.get((key, model), encoded)
            except UserError as error:
                return Reply(model, dict.fromkeys(phrases, str(error)), [], seconds)
            questions = {phrase: (key, model, mode, explainer.block, phrase) for phrase in phrases}
            for phrase, question in questions.items():
                try:
                    start_of_it = phrase if len(phrase) <= LONGEST_NAMED else f"{phrase[:LONGEST_NAMED]}…"
                    remarks += [f"{start_of_it}: {note}" for note in notes(explainer, phrase)]
                    found[phrase] = self.answers.get(question)
                except PhraseError as error:
                    found[phrase] = str(error)
            if new := [phrase for phrase in phrases if found[phrase] is None]:
                what = "phrase" if len(new) == 1 else f"{len(new)} phrases"
                try:
                    for answer in _timed(seconds, what, ask, explainer, image, new):
                        found[answer.phrase] = self.answers.put(questions[answer.phrase], answer)
                except UserError as error:  # weights that are not numbers
                    found |= dict.fromkeys(new, str(error))
        return Reply(model, {phrase: answer for phrase, answer in found.items() if answer}, remarks, seconds)


def _timed(seconds: dict[str, float], what: str, function: Callable[..., Any], *given: Any) -> Any:
    start = time.perf_counter()
    value = function(*given)
    seconds[what] = time.perf_counter() - start
    return value


def lacks(model: str, opened: OpenedModel, mode: str, layer: int) -> str:
    """The message that a model has no such layer."""
    return f"{model} has no layer {layer} in mode {mode}, only {', '.join(map(str, opened.model.layers(mode)))}"


def reduced(image: Image.Image) -> Image.Image:
    """A copy of an image with a longer side of at most `LONGEST_SHOWN`."""
    copy = image.reduce(max(1, max(image.size) // LONGEST_SHOWN))
    copy.thumbnail((LONGEST_SHOWN, LONGEST_SHOWN))
    return copy


def split_phrases(text: str) -> list[str]:
    """The phrases of a text, one a line, none twice.

    Raises:
        PhraseError: there is none, there are too many, or one is too long.
    """
    phrases = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not phrases:
        raise PhraseError("write a phrase, one a line")
    if len(phrases) > MOST_PHRASES:
        raise PhraseError(f"{len(phrases)} phrases, and at most {MOST_PHRASES} are asked at a time; take some out")
    if long := [phrase for phrase in phrases if len(phrase) > LONGEST_PHRASE]:
        raise PhraseError(f"a phrase of {len(long[0])} characters, and at most {LONGEST_PHRASE} are read; shorten it")
    return phrases
