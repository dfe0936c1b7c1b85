"""Ground phrases in an image, from Python: maps, points, boxes, match probability, a map per word.

    explainer = open_model("checkpoint_29.pth").explainer()     # grounding/load.py
    photo = encode(explainer, read_photo(Path("dogs.jpg")))     # dataset/photos.py
    found = ground(explainer, photo, "the dog on the left")
    found.map, found.point, found.boxes[0].box, found.match

The image is encoded once; any number of phrases, layers and modes is asked of it afterwards. Maps and points are those
of the published evaluation (SPEC section 3): its resize to the model's size, its GradCAM, its resize back.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.expressions import is_text
from dataset.refer import MAX_WORDS
from dataset.text import Word, clean_caption
from dataset.transforms import normalise, resize_bicubic
from grounding.maps import THRESHOLD, ResizedMap, ScoredBox, map_boxes, share_of_maximum
from grounding.predict import MAX_PAIRS, Explainer, Resize
from models.amc import gradcam, token_gradcam
from models.xbert import KeyValue
from utils import UserError


class PhraseError(UserError):
    """A phrase that cannot be asked; the message holds it."""


class EncodedImage(NamedTuple):
    """An image as the model has seen it, to be asked any number of phrases.

    Args:
        height, width: of the image itself, in pixels.
        keys_values: for each fusion layer, of this one image.
        block_inputs: (1, S, W) for each block of the image encoder.
    """

    height: int
    width: int
    keys_values: list[KeyValue]
    block_inputs: list[Tensor]


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


class Answer(NamedTuple):
    """What the model itself says of a phrase: small, and all that `place` needs.

    Args:
        phrase, text, match, small, words: as in `Grounding`.
    """

    phrase: str
    text: str
    match: float
    small: np.ndarray
    words: tuple[WordMap, ...]


class Grounding(NamedTuple):
    """What the model makes of a phrase, in the image.

    Args:
        phrase: as it was asked.
        text: as the model read it (`dataset.text.clean_caption`).
        match: the matching head's probability that phrase and image belong together, in [0, 1]; in both modes.
        small: float32 (h, w), the map as the model gives it, at least 0, up to a positive factor.
        map: float32 (height, width) of the image, the share of the map's maximum in [0, 1].
        point: (x, y) of the maximum, in pixels of the image.
        boxes: from the map alone, the best first; empty when the map is 0 everywhere.
        words: the average of their maps, weighted by their numbers of pieces, is `small`; empty in mode "itc", whose
            map has no tokens.
    """

    phrase: str
    text: str
    match: float
    small: np.ndarray
    map: np.ndarray
    point: tuple[int, int]
    boxes: tuple[ScoredBox, ...]
    words: tuple[WordMap, ...]


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
        CheckpointError: the model answers with what is not a number.
    """
    encoded = image if isinstance(image, EncodedImage) else encode(explainer, image)
    answers = ask(explainer, encoded, phrases, max_words)
    return [place(answer, encoded.height, encoded.width, threshold) for answer in answers]


def ask(
    explainer: Explainer, encoded: EncodedImage, phrases: Sequence[str], max_words: int = MAX_WORDS
) -> list[Answer]:
    """The model's part of `ground_all`; arguments and errors as there."""
    texts = [clean_phrase(explainer, phrase, max_words) for phrase in phrases]
    found = []
    for start in range(0, len(texts), MAX_PAIRS):
        chunk = texts[start : start + MAX_PAIRS]
        raw = (_match_answers if explainer.mode == "itm" else _contrast_answers)(explainer, encoded, chunk)
        for phrase, text, (small, match, words) in zip(phrases[start:], chunk, raw, strict=False):
            found.append(Answer(phrase, text, match, small.numpy(), words))
    return found


def place(answer: Answer, height: int, width: int, threshold: float = THRESHOLD) -> Grounding:
    """The image's part of `ground_all`, which asks the model nothing: the map in the image, its point and boxes."""
    cam = ResizedMap(torch.from_numpy(answer.small), height, width)
    shares = share_of_maximum(cam)
    boxes = map_boxes(cam, shares, threshold)
    y, x = divmod(int(cam.pixels.numpy().argmax()), width)  # cam.point(), from pixels that are there already
    return Grounding(answer.phrase, answer.text, answer.match, answer.small, shares, (x, y), boxes, answer.words)


def of_word(answer: Answer, index: int) -> Answer:
    """An answer whose map is that of one of its words; phrase, match and words stay those of the phrase."""
    word = answer.words[index]
    return answer._replace(text=f"{word.word} (in: {answer.text})", small=word.small)


@torch.no_grad()
def encode(explainer: Explainer, image: Image.Image, resize: Resize = resize_bicubic) -> EncodedImage:
    """Encode an image once for all phrases, layers and modes.

    Args:
        image: RGB and upright (`dataset.photos.read_photo`).
        resize: to the model's size; PIL's bicubic, antialiased, as for RefCOCO+ and RefCLEF. Flickr30k's evaluation
            takes `dataset.transforms.resize_bilinear_image`.
    """
    model = explainer.model
    side = model.visual_encoder.patch_embed.img_size[0]
    pixels = normalise(resize(image, side))[None].to(explainer.device)
    with explainer.reduced_precision():
        *block_inputs, tokens = model.visual_encoder.block_inputs(pixels)
    keys_values = model.text_encoder.image_keys_values(tokens.float())
    return EncodedImage(image.height, image.width, keys_values, [tokens.float() for tokens in block_inputs])


def notes(explainer: Explainer, phrase: str) -> list[str]:
    """What a user should know of how a phrase is read; errors as in `clean_phrase`."""
    text = clean_phrase(explainer, phrase)
    found = []
    if text != clean_caption(phrase, len(phrase)):
        found.append(f"cut to {MAX_WORDS} words, as in evaluation")
    if unknown := [word.text for word in explainer.tokenizer.split(text) if "[UNK]" in word.pieces]:
        found.append(f"the vocabulary lacks {', '.join(unknown)}; the model reads [UNK]")
    return found


def clean_phrase(explainer: Explainer, phrase: str, max_words: int = MAX_WORDS) -> str:
    """A phrase as the model reads it; raises `PhraseError` as `ground_all` does."""
    if not is_text(phrase):  # bytes of another encoding on the command line, say
        raise PhraseError(f"phrase {phrase!r}: holds characters that are no text; is it in your terminal's encoding?")
    text = clean_caption(phrase, max_words)
    longest = explainer.model.text_encoder.config.max_position_embeddings
    tokens = sum(len(word.pieces) for word in explainer.tokenizer.split(text))
    if tokens == 1:
        raise PhraseError(f"phrase {phrase!r}: nothing is left of it for the model to read; write words")
    if tokens > longest:
        raise PhraseError(f"phrase {phrase!r}: {tokens} word pieces, and this model reads at most {longest}")
    return text


Raw = tuple[Tensor, float, tuple[WordMap, ...]]  # small map (h, w) on the CPU, match probability, maps of words


def _match_answers(explainer: Explainer, image: EncodedImage, texts: list[str]) -> Iterator[Raw]:
    ids, mask = (tensor.to(explainer.device) for tensor in explainer.tokenizer(texts))
    model = explainer.model
    seen = model.match_attention(image.keys_values, ids, mask, explainer.block)
    arguments = (seen.attention, seen.gradient, mask, model.visual_encoder.grid)
    smalls, token_maps = explainer.finite(gradcam(*arguments).cpu()), token_gradcam(*arguments).cpu()
    matches = _matches(explainer, seen.logits)
    for row, text in enumerate(texts):
        count = int(mask[row].sum())
        small = smalls[row] * (mask.shape[1] / count)  # a mean over its own tokens, whatever it was padded to
        yield small, matches[row], word_maps(explainer.tokenizer.split(text), token_maps[row, :count])


def _contrast_answers(explainer: Explainer, image: EncodedImage, texts: list[str]) -> Iterator[Raw]:
    ids, mask = (tensor.to(explainer.device) for tensor in explainer.tokenizer(texts))
    model = explainer.model
    with torch.no_grad():
        fused = model.text_encoder.fuse(model.encode_text(ids, mask), mask, image.keys_values, cls_only=True)
        matches = _matches(explainer, model.match_logits(fused.tokens))
    only_image = torch.zeros(len(texts), dtype=torch.long, device=explainer.device)
    cams, _ = model.contrast_gradcam(image.block_inputs[explainer.block], ids, mask, explainer.block, only_image)
    for small, match in zip(explainer.finite(cams.cpu()), matches, strict=True):
        yield small, match, ()


def _matches(explainer: Explainer, logits: Tensor) -> list[float]:
    return explainer.finite(logits.softmax(dim=1)[:, 1].cpu(), "the match probability").tolist()


def word_maps(words: Sequence[Word], token_maps: Tensor) -> tuple[WordMap, ...]:
    """Merge the maps of word pieces, (T, h, w) in the order of the words' pieces, into one a word, by their mean."""
    total = float(token_maps.sum())
    merged = []
    for word, maps in zip(words, token_maps.split([len(word.pieces) for word in words]), strict=True):
        share = float(maps.sum()) / total if total > 0 else 0.0
        merged.append(WordMap(word.text, word.pieces, maps.mean(dim=0).numpy(), share))
    return tuple(merged)
