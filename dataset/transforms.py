"""Image transforms: training augmentation (the release's for AMC, ALBEF's without it) and evaluation resizing.

Images are RGB uint8 arrays (h, w, 3); masks uint8 arrays (h, w) of 0 and 1. Every random choice comes from the
generator passed in, so that a sample depends on its seed alone and not on worker or process.
"""

import functools
import math

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from config import AugmentConfig
from dataset.text import swap_left_right

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in ALBEF
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w) float32 with CLIP's mean and standard deviation."""
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255)
    return F.normalize(tensor, MEAN, STD)


def normalise_batch(images: Tensor) -> Tensor:
    """(B, 3, h, w) uint8 -> float32 on the images' device: the very numbers of `normalise`, from a table of them."""
    batch, _, *size = images.shape
    channels = [
        levels.index_select(0, images[:, channel].flatten().int()).view(batch, *size)
        for channel, levels in enumerate(_levels(images.device))
    ]
    return torch.stack(channels, dim=1)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """(3, 256) float32: `normalise` of each level, on the CPU: a GPU divides with another rounding."""
    levels = np.arange(256, dtype=np.uint8)
    return normalise(np.stack([levels] * 3, axis=-1)[None])[:, 0].contiguous().to(device)


def resize_bicubic(image: Image.Image, size: int) -> np.ndarray:
    """PIL's bicubic resize (antialiased): RefCOCO+ and RefCLEF evaluation, and ALBEF's augmentation.

    The pixels are those of Pillow 13, of the golden numbers, with every version. It resizes one axis, rounds to 8 bits
    and resizes the other, the vertical axis first where the height shrinks by more than twice what the width does.
    Older ones, the paper's time's among them, always begin with the horizontal axis: on noise, up to 24 of 255 apart.
    """
    width, height = image.size
    shrinks = height - size
    first = (width, size) if shrinks > 0 and shrinks > 2 * (width - size) else (size, height)
    image = image.convert("RGB").resize(first, Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear_image(image: Image.Image, size: int) -> np.ndarray:
    """OpenCV's bilinear resize (no antialiasing): AMC training and Flickr30k evaluation."""
    return cv2.resize(np.asarray(image.convert("RGB")), (size, size), interpolation=cv2.INTER_LINEAR)


def augment_for_amc(
    image: np.ndarray, mask: np.ndarray, caption: str, options: AugmentConfig, size: int, mask_size: int, rng: Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """Resize to `size` (mask: `mask_size`, nearest), flip both, grayscale, colour jitter: the AMC release's order."""
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, (mask_size, mask_size), interpolation=cv2.INTER_NEAREST)
    if rng.random() < options.flip_prob:
        image, mask = image[:, ::-1], mask[:, ::-1]
        caption = swap_left_right(caption) if options.flip_words == "swap" else caption
    if rng.random() < options.grayscale_prob:
        image = cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if rng.random() < options.jitter_prob:
        jitter = jitter_release if options.jitter == "release" else jitter_standard
        image = jitter(np.ascontiguousarray(image), rng)
    return image, mask, caption


def jitter_release(image: np.ndarray, rng: Generator) -> np.ndarray:
    """The release's colour jitter: contrast and brightness, then hue and a saturation that only ever rises.

    See docs/method.md, Differences from the release.
    """
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    hue = rng.uniform(-0.4, 0.4)
    shifted = image * contrast + (brightness - 1) * image.mean()
    hsv = cv2.cvtColor(shifted.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.int32)
    hsv[..., 0] = (hsv[..., 0] + int(255 * hue)) % 180
    hsv[..., 1] = (hsv[..., 1] + int(255 * saturation)).clip(0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def jitter_standard(image: np.ndarray, rng: Generator) -> np.ndarray:
    """torchvision's: brightness, contrast, saturation factors in [0.6, 1.4], hue shift in [-0.4, 0.4] of a turn."""
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    tensor = F.adjust_contrast(F.adjust_brightness(tensor, brightness), contrast)
    tensor = F.adjust_hue(F.adjust_saturation(tensor, saturation), rng.uniform(-0.4, 0.4))
    return tensor.permute(1, 2, 0).numpy()


def augment_for_albef(
    image: np.ndarray, caption: str, options: AugmentConfig, size: int, rng: Generator
) -> tuple[np.ndarray, str]:
    """Random resized crop, flip, RandAugment(2, 7): ALBEF's pretraining augmentation."""
    picture = Image.fromarray(image)
    top, left, height, width = crop_window(image.shape[0], image.shape[1], options.crop_scale, rng)
    # Not resize's own `box`: that one lets pixels around the crop bleed into its border.
    picture = Image.fromarray(resize_bicubic(picture.crop((left, top, left + width, top + height)), size))
    if rng.random() < options.flip_prob:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        caption = swap_left_right(caption) if options.flip_words == "swap" else caption
    if options.randaugment:
        picture = randaugment(picture, rng)
    return np.asarray(picture), caption


def crop_window(height: int, width: int, scale: tuple[float, float], rng: Generator) -> tuple[int, int, int, int]:
    """A crop (top, left, height, width) of `scale` of the area, its aspect ratio in [3/4, 4/3].

    Ten draws, then the largest central crop of an allowed aspect ratio (Szegedy et al., CVPR 2015, as in torchvision).
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


RANDAUGMENT_OPS = (
    *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
)


def randaugment(picture: Image.Image, rng: Generator, count: int = 2, magnitude: int = 7) -> Image.Image:
    """ALBEF's RandAugment: `count` operations drawn with replacement, each applied with probability 0.5."""
    for name in rng.choice(RANDAUGMENT_OPS, count):
        if rng.random() < 0.5:
            picture = apply_operation(picture, str(name), magnitude / 10, sign=float(rng.choice([-1, 1])))
    return picture


def apply_operation(picture: Image.Image, name: str, strength: float, sign: float) -> Image.Image:
    """One RandAugment operation at `strength` in [0, 1]; `sign` decides the direction of the geometric ones."""
    if name == "AutoContrast":
        return F.autocontrast(picture)
    if name == "Equalize":
        return F.equalize(picture)
    if name == "Brightness":
        return F.adjust_brightness(picture, 1.8 * strength + 0.1)
    if name == "Sharpness":
        return F.adjust_sharpness(picture, 1.8 * strength + 0.1)
    shear, shift = sign * math.degrees(math.atan(0.3 * strength)), round(sign * 10 * strength)
    moves = {
        "ShearX": (0.0, [0, 0], [shear, 0.0]),
        "ShearY": (0.0, [0, 0], [0.0, shear]),
        "TranslateX": (0.0, [shift, 0], [0.0, 0.0]),
        "TranslateY": (0.0, [0, shift], [0.0, 0.0]),
        "Rotate": (sign * 30 * strength, [0, 0], [0.0, 0.0]),
    }
    if name not in moves:
        return picture
    angle, translate, shears = moves[name]
    return F.affine(picture, angle, translate, 1.0, shears, InterpolationMode.BILINEAR, fill=[128, 128, 128])
