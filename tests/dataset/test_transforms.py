"""Image transforms, each against a formula or an example written out here."""

from collections import Counter
from typing import Any

import cv2
import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image

from config import AugmentConfig
from dataset import transforms
from dataset.transforms import (
    RANDAUGMENT_OPS,
    apply_operation,
    augment_for_albef,
    augment_for_amc,
    crop_window,
    jitter_release,
    jitter_standard,
    normalise,
    normalise_batch,
    randaugment,
    resize_bicubic,
    resize_bilinear_image,
)

STILL: dict[str, Any] = {"flip_prob": 0, "grayscale_prob": 0, "jitter_prob": 0}


def noise(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def smooth(height: int = 30, width: int = 40) -> np.ndarray:
    """A picture with colours, edges and neither black nor white, so that every operation shows."""
    small = np.random.default_rng(5).integers(40, 200, size=(4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).clip(30, 210)


class Fixed:
    """A generator whose uniform() returns the given numbers in turn: hues of up to 0.4, and factors around 1."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        taken = [self.numbers.pop(0) for _ in range(size or 1)]
        assert all((low, high) == ((-0.4, 0.4) if number <= 0.4 else (0.6, 1.4)) for number in taken)
        return np.array(taken) if size else taken[0]


# ---- normalising and resizing


def test_batches_are_normalised_to_the_same_bits() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = [np.stack([levels, levels[::-1], levels.T], axis=-1), *(noise(16, 16) for _ in range(3))]
    batch = torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images])
    expected = torch.stack([normalise(image) for image in images])
    assert torch.equal(normalise_batch(batch), expected)
    assert normalise_batch(batch).dtype == torch.float32


def test_normalise() -> None:
    image = np.array([[[0, 128, 255]]], np.uint8)
    red = (0 - 0.48145466) / 0.26862954
    green = (128 / 255 - 0.4578275) / 0.26130258
    blue = (1 - 0.40821073) / 0.27577711
    tensor = normalise(image)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.tensor([[[red]], [[green]], [[blue]]]))
    assert normalise(noise(5, 7)).shape == (3, 5, 7)
    assert torch.equal(normalise(noise()[:, ::-1]), normalise(noise()).flip(2))  # a view with negative strides


@pytest.mark.parametrize(("height", "width", "size"), [(30, 40, 17), (20, 9, 48), (64, 64, 16)])
def test_bilinear_resize(height: int, width: int, size: int) -> None:
    """No antialiasing: PyTorch's plain interpolation gives the same, up to rounding."""
    image = noise(height, width)
    plain = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), (size, size), mode="bilinear")
    evaluated = resize_bilinear_image(Image.fromarray(image), size)
    assert np.abs(plain[0].permute(1, 2, 0).numpy() - evaluated).max() <= 1
    trained, *_ = augment_for_amc(image, image[..., 0], "", AugmentConfig(**STILL), size, 9, np.random.default_rng(0))
    assert (trained == evaluated).all()


def test_bicubic_resize() -> None:
    image = Image.fromarray(noise())
    resized = resize_bicubic(image, 20)
    assert resized.shape == (20, 20, 3)
    across = image.resize((20, image.height), Image.Resampling.BICUBIC)
    assert (resized == np.asarray(across.resize((20, 20), Image.Resampling.BICUBIC))).all()
    grey = resize_bicubic(image.convert("L"), 20)
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize(
    ("width", "height", "size", "vertical_first"),
    [
        (300, 400, 384, True),  # 84 wider, 16 lower
        (320, 640, 256, True),  # 64 narrower, 384 lower
        (306, 356, 256, False),  # 50 and 100: not more than twice
        (306, 357, 256, True),
        (400, 300, 384, False),
        (90, 100, 384, False),  # both grow
    ],
)
def test_bicubic_resize_rounds_between_the_axes_as_pillow_13(
    width: int, height: int, size: int, vertical_first: bool
) -> None:
    image = Image.fromarray(noise(height, width))
    orders = [
        np.asarray(image.resize(first, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC))
        for first in ((size, height), (width, size))
    ]
    assert (orders[0] != orders[1]).any()
    assert (resize_bicubic(image, size) == orders[vertical_first]).all()
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert (orders[vertical_first] == np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))).all()


# ---- the release's augmentation


@pytest.mark.parametrize(("grows", "mask_size"), [(1, 12), (6, 9)])
def test_the_mask_is_resized_to_the_nearest(grows: int, mask_size: int) -> None:
    pattern = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1]], np.uint8)
    mask = np.kron(pattern, np.ones((grows, grows), np.uint8))
    options, rng = AugmentConfig(**STILL), np.random.default_rng(0)
    _, resized, _ = augment_for_amc(noise(3, 3), mask, "", options, 8, mask_size, rng)
    assert (resized == np.kron(pattern, np.ones((mask_size // 3, mask_size // 3)))).all()


@pytest.mark.parametrize(("words", "caption"), [("keep", "the left dog"), ("swap", "the right dog")])
def test_the_flip_mirrors_image_and_mask(words: Any, caption: str) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[3:9, 5:20] = 1
    still, flipped = (
        augment_for_amc(
            *(noise(), mask, "the left dog", AugmentConfig(**STILL | {"flip_prob": prob}, flip_words=words)),
            *(32, 40, np.random.default_rng(0)),
        )
        for prob in (0, 1)
    )
    assert (flipped[0] == still[0][:, ::-1]).all()
    assert (flipped[1] == still[1][:, ::-1]).all()
    assert (flipped[1] != still[1]).any()
    assert (still[2], flipped[2]) == ("the left dog", caption)


def test_each_change_has_its_probability() -> None:
    options = AugmentConfig(flip_prob=0.3, grayscale_prob=0.2, jitter_prob=0, flip_words="swap")
    seen: Counter[str] = Counter()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        image, _, caption = augment_for_amc(noise(8, 8), np.ones((8, 8), np.uint8), "left", options, 8, 8, rng)
        seen["flipped"] += caption == "right"
        seen["grey"] += bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    assert seen["flipped"] / 1000 == pytest.approx(0.3, abs=0.06)
    assert seen["grey"] / 1000 == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("name", ["release", "standard"])
def test_the_jitter_asked_for_is_used(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def record(other: str) -> Any:
        return lambda image, rng: (used.append(other), image)[1]

    for other in ("release", "standard"):
        monkeypatch.setattr(transforms, f"jitter_{other}", record(other))
    options = AugmentConfig(flip_prob=1, grayscale_prob=1, jitter_prob=0.5, jitter=name)
    rng = np.random.default_rng(0)
    for _ in range(200):
        augment_for_amc(noise(8, 8), np.ones((8, 8), np.uint8), "", options, 8, 8, rng)
    assert set(used) == {name}
    assert len(used) == pytest.approx(100, abs=30)


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"),
    [(1.0, 1.0, 0.6, 0.0), (1.4, 0.7, 0.9, 0.37), (0.6, 1.4, 1.4, -0.4), (0.8, 1.2, 0.61, -0.013)],
)
def test_jitter_release(brightness: float, contrast: float, saturation: float, hue: float) -> None:
    image = noise(12, 9)
    mean = sum(int(value) for value in image.reshape(-1)) / image.size
    expected = np.empty_like(image)
    for y in range(12):
        for x in range(9):
            shifted = [int(min(max(v * contrast + (brightness - 1) * mean, 0), 255)) for v in map(float, image[y, x])]
            h, s, v = (int(u) for u in cv2.cvtColor(np.uint8([[shifted]]), cv2.COLOR_RGB2HSV)[0, 0])
            h, s = (h + int(255 * hue)) % 180, min(s + int(255 * saturation), 255)
            expected[y, x] = cv2.cvtColor(np.uint8([[[h, s, v]]]), cv2.COLOR_HSV2RGB)[0, 0]
    jittered = jitter_release(image, Fixed(brightness, contrast, saturation, hue))  # type: ignore[arg-type]
    assert jittered.dtype == np.uint8
    assert (jittered == expected).all()


def test_jitter_standard_at_given_factors() -> None:
    image = smooth()
    unchanged = jitter_standard(image, Fixed(1, 1, 1, 0))  # type: ignore[arg-type]
    assert np.abs(unchanged.astype(int) - image).max() <= 1
    dark = jitter_standard(image, Fixed(0.6, 1, 1, 0))  # type: ignore[arg-type]
    assert np.abs(dark - 0.6 * image).max() <= 2
    grey = image @ np.array([0.2989, 0.587, 0.114])
    flat = jitter_standard(image, Fixed(1, 0.6, 1, 0))  # type: ignore[arg-type]
    assert np.abs(flat - (0.6 * image + 0.4 * grey.mean())).max() <= 2
    pale = jitter_standard(image, Fixed(1, 1, 0.6, 0))  # type: ignore[arg-type]
    assert np.abs(pale - (0.6 * image + 0.4 * grey[..., None])).max() <= 2
    red = np.full((4, 4, 3), (200, 0, 0), np.uint8)
    assert np.abs(jitter_standard(red, Fixed(1, 1, 1, 1 / 3)) - [0.0, 200, 0]).max() <= 1  # type: ignore[arg-type]


# ---- ALBEF's augmentation


@pytest.mark.parametrize(("height", "width", "largest"), [(300, 400, 1), (100, 100, 1), (480, 270, 0.75)])
def test_crop_window(height: int, width: int, largest: float) -> None:
    rng = np.random.default_rng(0)
    areas, aspects, corners = [], [], []
    for _ in range(600):
        top, left, h, w = crop_window(height, width, (0.2, 1.0), rng)
        assert top >= 0
        assert left >= 0
        assert top + h <= height
        assert left + w <= width
        areas.append(h * w / (height * width))
        aspects.append(w / h)
        corners.append((top, left))
    assert 0.19 < min(areas) < 0.25
    assert 0.9 * largest < max(areas) <= largest
    assert 0.73 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.36
    assert len(set(corners)) > 300


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (36, 40, (0, 0, 36, 40)), (48, 48, (0, 0, 48, 48))],
)
def test_a_crop_that_cannot_be_drawn_is_central(height: int, width: int, window: tuple[int, ...]) -> None:
    for seed in range(20):  # no crop of the whole area, and 3/4 to 4/3 as wide as high, fits but the whole image
        assert crop_window(height, width, (1.0, 1.0), np.random.default_rng(seed)) == window


def test_albef_crop_and_flip() -> None:
    options = AugmentConfig(flip_prob=0, randaugment=False, crop_scale=(1, 1))
    image, caption = augment_for_albef(noise(48, 48), "left dog", options, 24, np.random.default_rng(0))
    assert image.dtype == np.uint8
    assert (image == resize_bicubic(Image.fromarray(noise(48, 48)), 24)).all()
    assert caption == "left dog"
    for words, text in (("keep", "left dog"), ("swap", "right dog")):
        options = AugmentConfig(flip_prob=1, flip_words=words, randaugment=False, crop_scale=(1, 1))
        flipped, caption = augment_for_albef(noise(48, 48), "left dog", options, 24, np.random.default_rng(0))
        assert (flipped == image[:, ::-1]).all()
        assert caption == text


def test_albef_crops_what_the_window_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "crop_window", lambda *_: (5, 12, 20, 10))
    options = AugmentConfig(flip_prob=0, randaugment=False)
    image, _ = augment_for_albef(noise(), "", options, 15, np.random.default_rng(0))
    part = Image.fromarray(noise()[5:25, 12:22])
    assert (image == resize_bicubic(part, 15)).all()


def changed(name: str, strength: float = 0.7, sign: float = 1.0) -> np.ndarray:
    return np.asarray(apply_operation(Image.fromarray(smooth()), name, strength, sign))


@pytest.mark.parametrize("name", RANDAUGMENT_OPS)
def test_each_operation(name: str) -> None:
    image = changed(name)
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8
    assert (image != smooth()).any() == (name != "Identity")
    geometric = name.startswith(("Shear", "Translate", "Rotate"))
    assert (changed(name, sign=-1) != image).any() == geometric
    if geometric:
        assert (changed(name, strength=0) == smooth()).all()
        assert (image == 128).all(axis=2).any()  # what comes in from outside is grey


def test_what_the_operations_do() -> None:
    assert changed("AutoContrast").reshape(-1, 3).min(axis=0).tolist() == [0, 0, 0]
    assert changed("AutoContrast").reshape(-1, 3).max(axis=0).tolist() == [255, 255, 255]
    assert np.abs(changed("Brightness") - (smooth() * 1.36).clip(0, 255)).max() <= 1
    assert (changed("Brightness", strength=0.5) == smooth()).all()  # a factor of 1
    assert (changed("Sharpness", strength=0.5) == smooth()).all()
    assert (changed("TranslateX")[:, 8:-1] == smooth()[:, 1:-8]).all()
    assert (changed("TranslateY", sign=-1)[1:-8] == smooth()[8:-1]).all()
    # The top of a sheared image moves against its bottom, by 0.3 * 0.7 of the height between them.
    columns = np.zeros((41, 81, 3), np.uint8)
    columns[:, 40] = 255
    sheared = np.asarray(apply_operation(Image.fromarray(columns), "ShearX", 0.7, 1.0))[..., 0].astype(float)
    sheared[sheared == 128] = 0
    middles = (sheared * np.arange(81)).sum(axis=1) / sheared.sum(axis=1)
    assert abs(middles[40] - middles[0]) == pytest.approx(0.21 * 40, abs=0.7)
    # A line through the middle, turned by 21 degrees.
    turned = np.asarray(apply_operation(Image.fromarray(columns), "Rotate", 0.7, 1.0))[5:36, ..., 0].astype(float)
    turned[turned == 128] = 0
    middles = (turned * np.arange(81)).sum(axis=1) / turned.sum(axis=1)
    assert abs(middles[30] - middles[0]) == pytest.approx(30 * np.tan(np.radians(21)), abs=1)


def test_randaugment_draws_two_operations_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, float, float]] = []

    def record(picture: Image.Image, name: str, strength: float, sign: float) -> Image.Image:
        used.append((name, strength, sign))
        return picture

    monkeypatch.setattr(transforms, "apply_operation", record)
    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(1000):
        before = len(used)
        randaugment(Image.fromarray(smooth()), rng)
        counts[len(used) - before] += 1
    for count, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[count] / 1000 == pytest.approx(share, abs=0.06)
    names = Counter(name for name, *_ in used)
    assert names.keys() == set(RANDAUGMENT_OPS)
    assert max(names.values()) < 1.6 * min(names.values())
    assert {strength for _, strength, _ in used} == {0.7}
    assert {sign for *_, sign in used} == {-1, 1}


# ---- draws


def amc_sample(rng: Generator) -> list[Any]:
    options = AugmentConfig(flip_words="swap", jitter_prob=1)
    return list(augment_for_amc(noise(), np.tri(30, 40, dtype=np.uint8), "left", options, 24, 24, rng))


def albef_sample(rng: Generator) -> list[Any]:
    return list(augment_for_albef(noise(), "left", AugmentConfig(flip_words="swap"), 24, rng))


def standard_jitter_sample(rng: Generator) -> list[Any]:
    return [jitter_standard(noise(), rng)]


@pytest.mark.parametrize("draw", [amc_sample, albef_sample, standard_jitter_sample])
def test_every_draw_comes_from_the_generator(draw: Any) -> None:
    first = draw(np.random.default_rng(3))
    np.random.seed(1)  # noqa: NPY002 - the global generators do not matter
    torch.manual_seed(1)
    assert all(np.array_equal(one, other) for one, other in zip(first, draw(np.random.default_rng(3)), strict=True))
    assert (first[0] != draw(np.random.default_rng(4))[0]).any()
