"""AMC training data: JSON entries {"image", "caption", "bbox"} -> samples -> batches (Visual Genome in the paper)."""

import difflib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from config import PretrainConfig
from dataset.expressions import SURROGATE, EntryProblem, Problems, first_of, is_box, is_text, locate, require, shown
from dataset.reading import DataError, load_json, read_image
from dataset.text import Tokenizer, clean_caption, has_content
from dataset.transforms import augment_for_albef, augment_for_amc, normalise
from utils import gather_objects, log

KEYS = ("image", "caption", "bbox")  # of an entry
NO_BOXES = "add_gcam is True, but no entry has boxes for AMC to learn from; is their key spelled 'bbox'?"


class Sample(NamedTuple):
    """image: (3, r, r) float32; mask: (s, s) float32 in {0, 1}; rng: where the sample's later draws come from."""

    image: Tensor
    caption: str
    mask: Tensor
    has_box: bool
    rng: Generator


class TrainingEntry(NamedTuple):
    """One training entry; `source` names its file and index in messages. Boxes are [x1, y1, x2, y2] in pixels."""

    image: Path
    captions: list[str]
    boxes: list[list[float]]
    source: str


class TrainingData(Dataset[Sample]):
    """Entries of the config's train files, drawn and augmented anew each epoch from (seed, epoch, index) alone.

    Args:
        skip_broken: replace a missing or unreadable image by another sample and count it in `broken`; else stop.

    Raises:
        DataError: a file or entry that cannot be used; all entries are checked here, before training starts.
    """

    def __init__(self, config: PretrainConfig, seed: int, skip_broken: bool = False) -> None:
        self.config = config
        self.seed = seed
        self.epoch = 0
        self.skip_broken = skip_broken
        self.entries = [entry for file in config.train_file for entry in load_entries(file, config)]
        if config.add_gcam and not any(entry.boxes for entry in self.entries):
            log(f"warning: {NO_BOXES}")
        _check_images(self.entries, skip_broken)
        # One flag an entry, in shared memory: the loader's workers set them, the training process counts them.
        self.broken = torch.zeros(len(self.entries), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.entries)

    def broken_anywhere(self) -> list[int]:
        """The indices of all entries whose images could not be read, on any process (a collective call)."""
        own = self.broken.nonzero().flatten().tolist()
        return sorted({index for indices in gather_objects(own) for index in indices})

    def replaced(self) -> list[str]:
        """The sources of all entries whose images could not be read, on any process (a collective call)."""
        return [self.entries[index].source for index in self.broken_anywhere()]

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        while True:
            try:
                return self._sample(self.entries[index], rng)
            except DataError:
                if not self.skip_broken:
                    raise
                self.broken[index] = True
                if self.broken.all():
                    raise DataError(f"none of the {len(self)} training images can be read") from None
                index = int(rng.integers(len(self)))

    def _sample(self, entry: TrainingEntry, rng: Generator) -> Sample:
        config = self.config
        image = np.asarray(read_image(entry.image, entry.source))
        caption = entry.captions[int(rng.integers(len(entry.captions)))]
        size = config.mask_size
        if not config.add_gcam:
            image, caption = augment_for_albef(image, caption, config.augment, config.image_res, rng)
            return Sample(normalise(image), caption, torch.zeros(size, size), False, rng)
        mask, has_box = self._mask(entry, image.shape[0], image.shape[1], rng)
        image, mask, caption = augment_for_amc(image, mask, caption, config.augment, config.image_res, size, rng)
        return Sample(normalise(image), caption, torch.from_numpy(mask.astype(np.float32)), has_box, rng)

    def _mask(self, entry: TrainingEntry, height: int, width: int, rng: Generator) -> tuple[np.ndarray, bool]:
        """The mask (h, w) of a drawn box, or of all boxes, and whether there is one."""
        mask = np.zeros((height, width), np.uint8)
        if not entry.boxes or not (self.config.phrase_input or self.config.mask_all):
            return mask, False
        boxes = [box for box in (clip_box(box, height, width) for box in entry.boxes) if box is not None]
        if not boxes:
            warnings.warn(f"{entry.source}: no box covers a pixel of the {width}x{height} image", stacklevel=2)
            return mask, self.config.amc.empty_box == "zero_mask"
        if not self.config.mask_all:
            boxes = [boxes[int(rng.integers(len(boxes)))]]
        for x1, y1, x2, y2 in boxes:
            mask[y1:y2, x1:x2] = 1
        return mask, True


def clip_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """Clip [x1, y1, x2, y2] to the image and truncate to int; None when nothing is left of it."""
    x1, x2 = (int(min(max(x, 0), width)) for x in (box[0], box[2]))
    y1, y2 = (int(min(max(y, 0), height)) for y in (box[1], box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def load_entries(file: str | Path, config: PretrainConfig) -> list[TrainingEntry]:
    """Read and check one training JSON; captions come back cleaned. Raises `DataError` with all problems."""
    with Problems() as problems:
        return read_entries(file, config.image_root, config.max_words, problems, config.empty_captions)


def read_entries(
    file: str | Path, image_root: str, max_words: int, problems: Problems, empty_captions: str = "keep"
) -> list[TrainingEntry]:
    """The entries of one training JSON that can be used; notes the others, and captions of which nothing is left.

    Raises `DataError` for the file itself, or when it has no entries.
    """
    rows = load_json(file, list)
    entries = []
    remedy = {"keep": "they stay, and the model reads [CLS] alone", "drop": "they are left out"}[empty_captions]
    empty = f"{file}: captions of which nothing is left once cleaned; as empty_captions says, {remedy}"
    for index, row in enumerate(rows):
        image = row.get("image") if isinstance(row, dict) else None
        source = f"{file}: entry {index}" + (f" ({image})" if is_text(image) else "")
        with problems.at(source):
            entry = _entry(row, source, image_root, max_words)
            for text, cleaned in zip(_texts(row), entry.captions, strict=True):
                if not has_content(cleaned):
                    problems.warnings.add(source, empty, shown(text))
            if empty_captions == "drop":
                entry = entry._replace(captions=list(filter(has_content, entry.captions)))
            if entry.captions:
                entries.append(entry)
    if not entries and not problems.kinds:
        raise DataError(f"{file}: holds no entries" + (" that have a caption" if rows else ""))
    return entries


def _entry(row: Any, source: str, image_root: str, max_words: int) -> TrainingEntry:
    _check_spelling(row)
    image = locate(image_root, require(row, "image", str))
    if "caption" not in row:
        raise EntryProblem("key 'caption' is missing")
    texts = _texts(row)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise EntryProblem("key 'caption' must be a string or a list of strings", f"found {shown(row['caption'])}")
    if not all(map(is_text, texts)):
        raise EntryProblem(f"key 'caption' {SURROGATE}", shown(row["caption"]))
    boxes = row.get("bbox", [])
    if not isinstance(boxes, list) or not all(map(is_box, boxes)):
        raise EntryProblem("key 'bbox' must be a list of [x1, y1, x2, y2]", f"found {shown(boxes)}")
    return TrainingEntry(image, [clean_caption(text, max_words) for text in texts], boxes, source)


def _texts(row: dict[str, Any]) -> list[Any]:
    return row["caption"] if isinstance(row["caption"], list) else [row["caption"]]


def _check_spelling(row: Any) -> None:
    """Raise `EntryProblem` where a key is missing, and another looks like it; files may have keys of their own."""
    if not isinstance(row, dict) or len(row) <= sum(key in row for key in KEYS):
        return
    others = {other.lower(): other for other in row if other not in KEYS}
    for key in KEYS:
        if key not in row and (close := difflib.get_close_matches(key, others, n=1, cutoff=0.65)):
            raise EntryProblem(f"unknown key {shown(others[close[0]])}; did you mean '{key}'?")


def _check_images(entries: list[TrainingEntry], skip_broken: bool) -> None:
    first = first_of((entry.image, entry.source) for entry in entries)
    missing = [source for image, source in first.items() if not os.path.isfile(image)]
    if not missing:
        return
    said = f"{len(missing)} of {len(first)} training images are missing, the first at {missing[0]}: "
    if not skip_broken:
        raise DataError(f"{said}check image_root, or pass --skip_broken to train without them")
    if len(missing) == len(first):
        raise DataError(f"none of the {len(first)} training images can be read; check image_root")
    log(f"{said}others take their place")


class Masked(NamedTuple):
    """ids: (T,) with masked tokens replaced; labels: (T,) original ids at targets, -100 elsewhere."""

    ids: np.ndarray
    labels: np.ndarray


def mask_tokens(ids: np.ndarray, tokenizer: Tokenizer, probability: float, rng: Generator) -> Masked:
    """Draw MLM targets among the tokens (T,) other than PAD and CLS: 80% [MASK], 10% a random id, 10% unchanged."""
    candidates = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id)
    target = candidates & (rng.random(len(ids)) < probability)
    kind = rng.random(len(ids))
    random_ids = rng.integers(tokenizer.vocab_size, size=len(ids))
    replaced = np.select([kind < 0.8, kind < 0.9], [tokenizer.mask_id, random_ids], ids)
    return Masked(np.where(target, replaced, ids), np.where(target, ids, -100))


class Collate:
    """Samples -> the tensors of `models.pretrain.Batch`, in its order."""

    def __init__(self, tokenizer: Tokenizer, config: PretrainConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        tokens = self.tokenizer([sample.caption for sample in samples], self.config.max_tokens)
        masked = [
            mask_tokens(ids, self.tokenizer, self.config.mlm_probability, sample.rng)
            for ids, sample in zip(tokens.input_ids.numpy(), samples, strict=True)
        ]
        return (
            torch.stack([sample.image for sample in samples]),
            tokens.input_ids,
            tokens.attention_mask,
            torch.from_numpy(np.stack([m.ids for m in masked])),
            torch.from_numpy(np.stack([m.labels for m in masked])),
            torch.stack([sample.mask for sample in samples]),
            torch.tensor([sample.has_box for sample in samples]),
        )
