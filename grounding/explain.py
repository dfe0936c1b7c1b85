"""From images and texts to GradCAM maps and answers: the only path, for evaluation, Python, demo, page and figures.

    explainer = open_model("checkpoint_29.pth").explainer()     # grounding/load.py
    photo = encode(explainer, read_photo(Path("dogs.jpg")))     # dataset/photos.py
    found = ground(explainer, photo, "the dog on the left")
    found.map, found.point, found.boxes[0].box, found.match

An image is encoded once; any number of phrases, layers and modes is asked of it afterwards. Maps and points of `ground`
are those of the published evaluation (docs/method.md, Evaluation).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.expressions import is_text
from dataset.refer import MAX_WORDS
from dataset.text import Tokenizer, Tokens, Word, clean_caption
from dataset.transforms import normalise, resize_bicubic
from grounding.maps import THRESHOLD, ResizedMap, ScoredBox, map_boxes, share_of_maximum
from models.checkpoint import CheckpointError, diverged
from models.interface import ExplainableModel, Explanation
from precision import DTYPES, use
from utils import UserError, upload

# (image, text) pairs in one pass of the fusion layers, by device; each may copy its image's keys and values. A pass
# launches as many kernels whatever its size, and in passes of 32 an H100 waited for its host.
MAX_PAIRS = {"cpu": 32, "cuda": 128}

Resize = Callable[[Image.Image, int], np.ndarray]


class PhraseError(UserError):
    """A phrase that cannot be asked; the message holds it."""


class Explainer(NamedTuple):
    """A model, its tokenizer and device, and which attention to explain.

    Args:
        mode: "itm" explains the match logit by cross-attention of BERT layer `block`; "itc" explains the image-text
            similarity by self-attention of image block `block`.
        precision: a key of `precision.DTYPES`. bf16 and fp16 are of the image encoder up to the part that is explained,
            and everything else is IEEE float32; tf32 is of everything, fp32 of nothing, also on a GPU.
        name: of the checkpoint, for messages.

    Answers that are not numbers raise `CheckpointError` (`finite`).
    """

    model: ExplainableModel
    tokenizer: Tokenizer
    device: torch.device
    mode: str
    block: int
    precision: str = "fp32"
    name: str = "the model"

    def maps(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        """GradCAM maps, one for each text.

        Args:
            images: (N, 3, r, r), normalised.
            index: for each text, its image among the N.

        Returns:
            float32 (len(texts), h, w) on the CPU, at least 0, each up to a positive factor.
        """
        asked = self.mode, self.block
        encoded = self.encode(images, asked)
        # A similarity costs a text one backward pass through what all texts share: splitting them would repeat that.
        size = None if self.mode == "itm" else len(texts)
        with self.arithmetic():
            found = [self.model.explain(encoded, *chunk, *asked).maps for chunk in self.chunks(texts, index, size)]
        return self.finite(torch.cat(found).cpu())  # the one wait for a GPU

    def match_probabilities(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        """The probability that each text matches its image: (len(texts),) on the CPU; arguments as in `maps`."""
        encoded = self.encode(images, ("itm", self.block))
        with self.arithmetic():
            found = [self.model.match(encoded, *chunk) for chunk in self.chunks(texts, index)]
        return self.finite(torch.cat(found).cpu(), "the match probability")

    def answers(self, encoded: Any, texts: list[str]) -> Iterator[tuple[Tokens, Explanation, Tensor, list[float]]]:
        """Explain texts about one encoded image, chunk by chunk.

        Yields:
            tokens (n, T), the explanation, its maps (n, h, w) on the CPU, and n match probabilities.
        """
        for index, tokens in self.chunks(texts):
            with self.arithmetic():
                found = self.model.explain(encoded, index, tokens, self.mode, self.block)
                match = self.model.match(encoded, index, tokens) if found.match is None else found.match
            maps = self.finite(found.maps.cpu())
            yield tokens, found, maps, self.finite(match.cpu(), "the match probability").tolist()

    def encode(self, images: Tensor, only: tuple[str, int] | None = None) -> Any:
        """Images (N, 3, r, r), normalised, as the model keeps them; `only` as in `ExplainableModel.encode`."""
        with self.arithmetic():
            dtype = DTYPES[self.precision]
            return self.model.encode(images.to(self.device, non_blocking=True), dtype, only)

    def arithmetic(self) -> AbstractContextManager[None]:
        """A context: float32 on a GPU is what `precision` says, whatever a training around it has chosen."""
        return use(self.precision, self.device)

    def chunks(
        self, texts: list[str], index: list[int] | None = None, size: int | None = None
    ) -> Iterator[tuple[list[int] | None, Tokens]]:
        """Up to `size` texts (`MAX_PAIRS`) at a time: image index, n numbers or None; tokens (n, T) on the device."""
        size = size or MAX_PAIRS.get(self.device.type, MAX_PAIRS["cpu"])
        for start in range(0, len(texts), size):
            tokens = Tokens(*(upload(tensor, self.device) for tensor in self.tokenizer(texts[start : start + size])))
            yield None if index is None else index[start : start + size], tokens

    def finite(self, answer: Tensor, what: str = "the map") -> Tensor:
        """The answer, on the CPU; raises `CheckpointError` where it holds NaN or infinity, and says why it does."""
        if answer.isfinite().all():
            return answer
        if problem := diverged(self.model.state_dict(), math.inf):
            reason = f"in {self.name}, {problem} (its training diverged); take an earlier checkpoint"
        else:
            largest, key = max((float(p.abs().max()), key) for key, p in self.model.named_parameters() if p.numel())
            reason = (
                f"the weights of {self.name} are finite, but so large that the computation overflows (the largest, of "
                f"{key}, is {largest:.3g}); take an earlier checkpoint"
            )
        raise CheckpointError(f"{what} holds values that are not numbers: {reason}")


# ---- one image, asked by phrases


class EncodedImage(NamedTuple):
    """An image's own size in pixels, and what the model's `encode` made of it, to be asked any number of phrases."""

    height: int
    width: int
    encoded: Any


class WordMap(NamedTuple):
    """A word of the phrase ([CLS] is the first) and its part of the map, before that is averaged over tokens.

    Args:
        word: as it stands in the cleaned phrase.
        pieces: the word pieces that the model read for it.
        small: float32 (h, w), the mean over those pieces; on the same scale for all words of a phrase.
        share: of the whole map's sum, in [0, 1]; the shares of all words add up to 1.
    """

    word: str
    pieces: tuple[str, ...]
    small: np.ndarray
    share: float


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says of a phrase, before it is placed in the image (`place`).

    Args:
        phrase: as it was asked.
        text: as the model read it (`dataset.text.clean_caption`).
        match: the matching head's probability that phrase and image belong together, in [0, 1]; in both modes.
        small: float32 (h, w), the map as the model gives it, at least 0, up to a positive factor.
        words: the average of their maps, weighted by their numbers of pieces, is `small`; empty in mode "itc", whose
            map has no tokens.
    """

    phrase: str
    text: str
    match: float
    small: np.ndarray
    words: tuple[WordMap, ...]


@dataclass(frozen=True, eq=False)
class Grounding(Answer):
    """An answer in its image.

    Args:
        map: float32 (height, width) of the image, the share of the map's maximum in [0, 1].
        point: (x, y) of the maximum, in pixels of the image.
        boxes: from the map alone, the best first; empty when the map is 0 everywhere.
    """

    map: np.ndarray
    point: tuple[int, int]
    boxes: tuple[ScoredBox, ...]


def encode(explainer: Explainer, image: Image.Image, resize: Resize = resize_bicubic) -> EncodedImage:
    """Encode an image once for all phrases, layers and modes.

    Args:
        image: RGB and upright (`dataset.photos.read_photo`).
        resize: to the model's size; PIL's bicubic, antialiased, as for RefCOCO+ and RefCLEF. Flickr30k's evaluation
            takes `dataset.transforms.resize_bilinear_image`.
    """
    pixels = normalise(resize(image, explainer.model.image_res))[None]
    return EncodedImage(image.height, image.width, explainer.encode(pixels))


def ground(
    explainer: Explainer,
    image: Image.Image | EncodedImage,
    phrase: str,
    threshold: float = THRESHOLD,
    max_words: int = MAX_WORDS,
) -> Grounding:
    """Ground one phrase; arguments and errors as in `ground_all`."""
    (found,) = ground_all(explainer, image, [phrase], threshold, max_words)
    return found


def ground_all(
    explainer: Explainer,
    image: Image.Image | EncodedImage,
    phrases: Sequence[str],
    threshold: float = THRESHOLD,
    max_words: int = MAX_WORDS,
) -> list[Grounding]:
    """Ground phrases in one image; each comes out as if it were the only one.

    Args:
        explainer: the model, and which attention is explained; `explainer._replace(mode=..., block=...)` asks another
            one of the same encoded image.
        image: RGB and upright (`dataset.photos.read_photo`), or what `encode` made of it.
        threshold: of the boxes, a share of the map's maximum.
        max_words: a longer phrase is cut, as evaluation cuts it.

    Raises:
        PhraseError: nothing is left of a phrase after cleaning, or it is longer than the model can read.
        LayerError: the model has no such layer in this mode.
        CheckpointError: the model answers with what is not a number.
    """
    encoded = image if isinstance(image, EncodedImage) else encode(explainer, image)
    answers = ask(explainer, encoded, phrases, max_words)
    return [place(answer, encoded.height, encoded.width, threshold) for answer in answers]


def ask(explainer: Explainer, image: EncodedImage, phrases: Sequence[str], max_words: int = MAX_WORDS) -> list[Answer]:
    """The model's part of `ground_all`; arguments and errors as there."""
    texts = [clean_phrase(explainer, phrase, max_words) for phrase in phrases]
    answers: list[Answer] = []
    for tokens, found, maps, matches in explainer.answers(image.encoded, texts):
        token_maps = found.token_maps
        for row, (small, match) in enumerate(zip(maps, matches, strict=True)):
            phrase, text = phrases[len(answers)], texts[len(answers)]
            words: tuple[WordMap, ...] = ()
            if token_maps is not None:
                count = int(tokens.attention_mask[row].sum())
                small = small * (len(tokens.attention_mask[row]) / count)  # the mean over its own tokens, not padding
                words = word_maps(explainer.tokenizer.split(text), token_maps[row, :count].cpu())
            answers.append(Answer(phrase, text, match, small.numpy(), words))
    return answers


def place(answer: Answer, height: int, width: int, threshold: float = THRESHOLD) -> Grounding:
    """The image's part of `ground_all`, which asks the model nothing: the map in the image, its point and boxes."""
    cam = ResizedMap(torch.from_numpy(answer.small), height, width)
    shares = share_of_maximum(cam)
    boxes = map_boxes(cam, shares, threshold)
    y, x = divmod(int(cam.pixels.numpy().argmax()), width)  # cam.point(), from pixels that are there already
    return Grounding(**vars(answer), map=shares, point=(x, y), boxes=boxes)


def of_word(answer: Answer, index: int) -> Answer:
    """An answer whose map is that of one of its words; phrase, match and words stay those of the phrase."""
    word = answer.words[index]
    return replace(answer, text=f"{word.word} (in: {answer.text})", small=word.small)


def word_maps(words: Sequence[Word], token_maps: Tensor) -> tuple[WordMap, ...]:
    """Merge the maps of word pieces, (T, h, w) in the order of the words' pieces, into one per word, by their mean."""
    total = float(token_maps.sum())
    merged = []
    for word, maps in zip(words, token_maps.split([len(word.pieces) for word in words]), strict=True):
        share = float(maps.sum()) / total if total > 0 else 0.0
        merged.append(WordMap(word.text, word.pieces, maps.mean(dim=0).numpy(), share))
    return tuple(merged)


# ---- what a phrase becomes


def clean_phrase(explainer: Explainer, phrase: str, max_words: int = MAX_WORDS) -> str:
    """A phrase as the model reads it; raises `PhraseError` as `ground_all` does."""
    if not is_text(phrase):  # bytes of another encoding on the command line, say
        raise PhraseError(f"phrase {phrase!r}: holds characters that are no text; is it in your terminal's encoding?")
    text = clean_caption(phrase, max_words)
    longest = explainer.model.max_tokens
    tokens = sum(len(word.pieces) for word in explainer.tokenizer.split(text))
    if tokens == 1:
        raise PhraseError(f"phrase {phrase!r}: nothing is left of it for the model to read; write words")
    if tokens > longest:
        raise PhraseError(f"phrase {phrase!r}: {tokens} word pieces, and this model reads at most {longest}")
    return text


def notes(explainer: Explainer, phrase: str) -> list[str]:
    """What a user should know about how a phrase is read; errors as in `clean_phrase`."""
    text = clean_phrase(explainer, phrase)
    found = []
    if text != clean_caption(phrase, len(phrase)):
        found.append(f"cut to {MAX_WORDS} words, as in evaluation")
    if unknown := [word.text for word in explainer.tokenizer.split(text) if "[UNK]" in word.pieces]:
        found.append(f"the vocabulary lacks {', '.join(unknown)}; the model reads [UNK]")
    return found
