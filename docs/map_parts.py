"""The numbers that docs/figures.py draws: the parts of a GradCAM map, and AMC's loss on it, of one image and phrase.

The formulas are those of `models.amc`; docs/gradcam.md explains them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import AMCConfig, AugmentConfig, PretrainConfig
from dataset.transforms import augment_for_amc, resize_bilinear_image
from dataset.vg import clip_box
from grounding.explain import EncodedImage, Explainer, clean_phrase, encode
from models import amc
from models.interface import Explanation

AS_IT_IS = AugmentConfig(flip_prob=0, grayscale_prob=0, jitter_prob=0)


class Parts(NamedTuple):
    """What a map is made of, each (h, w): means over heads and tokens of A, of G, of max(G, 0) and of A * max(G, 0)."""

    attention: Tensor
    gradient: Tensor
    positive: Tensor
    product: Tensor


def parts(seen: Explanation) -> Parts:
    """The parts of the one phrase in `seen`."""

    def average(x: Tensor) -> Tensor:
        return x[0].mean(dim=(0, 1)).unflatten(-1, seen.grid).cpu()

    return Parts(
        average(seen.attention), average(seen.gradient), average(seen.gradient.clamp(min=0)), seen.maps[0].cpu()
    )


class Training(NamedTuple):
    """A pair as AMC's loss sees it, unflipped and in its own colours.

    image: uint8 (r, r, 3); cam: (s, s), normalised and resized; mask: (s, s) of 0 and 1.
    """

    image: np.ndarray
    cam: Tensor
    mask: Tensor


def training_view(
    explainer: Explainer, image: Image.Image, phrase: str, boxes: Sequence[Sequence[float]], config: PretrainConfig
) -> Training:
    """Map and mask of a phrase with its boxes [x, y, w, h], by the steps of training."""
    covered = np.zeros((image.height, image.width), np.uint8)
    for x, y, w, h in boxes:
        if (box := clip_box([x, y, x + w, y + h], image.height, image.width)) is not None:
            covered[box[1] : box[3], box[0] : box[2]] = 1
    rng, side = np.random.default_rng(0), explainer.model.image_res
    pixels, mask, _ = augment_for_amc(np.asarray(image), covered, phrase, AS_IT_IS, side, config.mask_size, rng)
    encoded = encode(explainer, Image.fromarray(pixels), resize_bilinear_image)
    cam = look(explainer._replace(block=config.amc.layer), encoded, phrase).maps.cpu()
    return Training(pixels, amc.resize(amc.normalise_map(cam), config.mask_size)[0], torch.from_numpy(mask).float())


class Terms(NamedTuple):
    """AMC's two terms of one pair before their weights, and the values that they compare (docs/method.md, Losses)."""

    mean_inside: float
    mean_outside: float
    mean_term: float
    max_inside: float
    max_outside: float
    max_term: float


def terms(cam: Tensor, mask: Tensor, options: AMCConfig) -> Terms:
    """The terms of one map (s, s) and mask (s, s), by `models.amc`."""
    pair = cam[None], mask[None], torch.ones(1)
    outside = 1 - mask
    return Terms(
        mean_inside=float((cam * mask).sum() / mask.sum()),
        mean_outside=float((cam * outside).sum() / outside.sum()),
        mean_term=float(amc.mean_margin_loss(*pair, options.margin_mean, options.mean_over)),
        max_inside=float((cam * mask).max()),
        max_outside=float((cam * outside).max()),
        max_term=float(amc.max_margin_loss(*pair, options.margin_max)),
    )


def look(explainer: Explainer, image: EncodedImage, phrase: str) -> Explanation:
    """Attention and gradient of one phrase by the explainer's mode and layer."""
    ((_, seen, _, _),) = explainer.answers(image.encoded, [clean_phrase(explainer, phrase)])
    return seen
