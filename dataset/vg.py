"""AMC training data (Visual Genome in the paper): JSON entries -> samples -> batches.

An entry is {"image", "caption", "bbox"}, or has "segmentation" in place of "bbox".
"""

import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from config import PretrainConfig
from dataset.expressions import SURROGATE, EntryProblem, Problems, is_box, is_text, locate, require, shown
from dataset.loader.entries import FORM, PackedEntries, RawEntry, TrainingEntry, pack
from dataset.reading import DataError, read_image, read_list
from dataset.segmentation import check_segmentation, to_mask, to_rle
from dataset.text import Tokenizer, clean_caption, has_content, swap_left_right
from dataset.transforms import augment_for_albef, augment_for_amc, resize_bicubic
from files import file_digest
from utils import UserError, atomic_path, barrier, gather_objects, log, rank, sweep

KEYS = ("image", "caption", "bbox", "segmentation")  # of an entry
SELFEQ_KEYS = ("phrase_chunks", "relation")  # of SelfEQ's: the first in the place of `caption`, in its files of COCO
LARGE = 64 << 20  # bytes of a JSON file whose entries are worth a packed file
NO_BOXES = "add_gcam is True, but no entry has boxes for AMC to learn from; is their key spelled 'bbox'?"
NO_SYNONYMS = "no entry has a relation with synonyms for SelfEQ to learn from; is its key spelled 'relation'?"


class Sample(NamedTuple):
    """image: (3, r, r) uint8; mask: (s, s) uint8 of 0 and 1; rng: where the sample's later draws come from.

    other: the caption in other words, None without synonyms. In SelfEQ's relation epoch the two change places.
    """

    image: Tensor
    caption: str
    mask: Tensor
    has_box: bool
    rng: Generator
    other: str | None = None


class TrainingData(Dataset[Sample]):
    """Entries of the config's train files, drawn and augmented anew each epoch from (seed, epoch, index) alone.

    Args:
        skip_broken: replace a missing or unreadable image by another sample and count it in `broken`; else stop.
        cache_dir: where the packed entries of large files lie; None: beside each file.

    Raises:
        DataError: a file or entry that cannot be used; all entries are checked here, before training starts.
    """

    def __init__(
        self, config: PretrainConfig, seed: int, skip_broken: bool = False, cache_dir: str | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # loader processes live on over epochs
        self.skip_broken = skip_broken
        if not config.train_file:
            raise DataError("train_file lists no files")
        files = [packed_entries(file, config, cache_dir) for file in config.train_file]
        self.entries = ConcatDataset[TrainingEntry](files)
        self.boxed = np.concatenate([file.boxed for file in files]).astype(bool)
        related = np.flatnonzero(np.concatenate([file.related for file in files]))
        if config.paraphrases and not len(related):
            raise DataError(f"{', '.join(config.train_file)}: {NO_SYNONYMS}")
        if config.relation_file:
            log(f"relation_file: {len(related)} of {len(self.boxed)} entries have synonyms; the others take no part")
            self.entries = ConcatDataset([Subset(self.entries, related)])  # type: ignore[arg-type]  # NumPy's take less memory
            self.boxed = self.boxed[related]
        if config.add_gcam and not self.boxed.any():
            log(f"warning: {NO_BOXES}")
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            _check_images(files, skip_broken)
        # One flag an entry, in shared memory: the loader's workers set them, the training process counts them.
        self.broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.boxed)

    @property
    def epoch(self) -> int:
        """The epoch whose samples are drawn, in this process and in loader processes."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

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
        config, kind = self.config, self.config.augment.kind or ("amc" if self.config.add_gcam else "albef")
        image = np.asarray(read_image(entry.image, entry.source))
        drawn = caption = entry.captions[int(rng.integers(len(entry.captions)))]
        size = config.mask_size
        mask, has_box, other = np.zeros((size, size), np.uint8), False, None
        if kind == "amc":
            mask, has_box = self._mask(entry, image.shape[0], image.shape[1], rng)
            image, mask, caption = augment_for_amc(image, mask, caption, config.augment, config.image_res, size, rng)
        elif kind == "albef":
            image, caption = augment_for_albef(image, caption, config.augment, config.image_res, rng)
        else:
            image = resize_bicubic(Image.fromarray(image), config.image_res)
        if config.paraphrases and entry.relation:
            other = self._paraphrase(caption, entry.relation, caption != drawn, rng)
            caption, other = (other, caption) if config.relation_file else (caption, other)
        return Sample(_as_tensor(image), caption, torch.from_numpy(mask.copy()), has_box, rng, other)

    def _paraphrase(self, caption: str, relation: Sequence[str], mirrored: bool, rng: Generator) -> str:
        """The caption with its words replaced by a drawn synonym; `mirrored`: it has changed left and right already."""
        words = relation[0], relation[1 + int(rng.integers(len(relation) - 1))]
        old, new = map(swap_left_right, words) if mirrored else words
        if self.config.selfeq.replace == "word":
            return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, caption)
        return caption.replace(old, new)

    def _mask(self, entry: TrainingEntry, height: int, width: int, rng: Generator) -> tuple[np.ndarray, bool]:
        """The mask (h, w) of a drawn box or segmentation, or of all of them, and whether there is one."""
        mask = np.zeros((height, width), np.uint8)
        if not (entry.boxes or entry.segmentations) or not (self.config.phrase_input or self.config.mask_all):
            return mask, False
        boxes = filter(None, (clip_box(box, height, width) for box in entry.boxes))
        regions: list[Any] = [np.s_[y1:y2, x1:x2] for x1, y1, x2, y2 in boxes] + covering_masks(entry, height, width)
        if not regions:
            what = "segmentation" if entry.segmentations else "box"
            warnings.warn(f"{entry.source}: no {what} covers a pixel of the {width}x{height} image", stacklevel=2)
            return mask, self.config.amc.empty_box == "zero_mask"
        if not self.config.mask_all:
            regions = [regions[int(rng.integers(len(regions)))]]
        for region in regions:
            mask[region] = 1
        return mask, True


def _as_tensor(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w) uint8, to travel between processes; `models.pretrain.Batch.to` normalises it."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def clip_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """Clip [x1, y1, x2, y2] to the image and truncate to int; None when nothing is left of it."""
    x1, x2 = (int(min(max(x, 0), width)) for x in (box[0], box[2]))
    y1, y2 = (int(min(max(y, 0), height)) for y in (box[1], box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def covering_masks(entry: TrainingEntry, height: int, width: int) -> list[np.ndarray]:
    """The segmentations that cover a pixel of the image, bool (h, w).

    Raises:
        UserError: an RLE is of another size; no `DataError`, which --skip_broken would take for an unreadable image.
    """
    try:
        masks = [to_mask(to_rle(one, height, width)) for one in entry.segmentations]
    except EntryProblem as problem:
        lists = "prepare.py check lists all such entries"
        raise UserError(f"{entry.source}: {problem.kind} ({problem.detail}); {lists}") from None
    return [mask for mask in masks if mask.any()]


def load_entries(file: str | Path, config: PretrainConfig) -> list[TrainingEntry]:
    """Read and check one training JSON; captions come back cleaned. Raises `DataError` with all problems."""
    return list(_checked_entries(file, config))


def _checked_entries(file: str | Path, config: PretrainConfig) -> PackedEntries:
    with Problems() as problems:
        return read_entries(file, config.image_root, config.max_words, problems, config.empty_captions)


def packed_entries(file: str, config: PretrainConfig, cache_dir: str | None = None) -> PackedEntries:
    """`load_entries` for all processes together: of a large file, one makes packed entries that the others map.

    They lie beside the file or in `cache_dir`. Their name tells the file's content and how it is read.
    """
    path = None
    if os.path.exists(file) and (cache_dir is not None or os.path.getsize(file) >= LARGE):
        options = json.dumps([config.image_root, config.max_words, config.empty_captions])
        name = f"{Path(file).name}.{_content_digest(file)}-{_short_digest(options)}.packed"
        path = Path(cache_dir or Path(file).parent, name)
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for makes in (rank() == 0, rank() != 0 and first_here):  # the second: where a machine has a folder of its own
        if path and makes:
            _make_packed(file, config, path)
        barrier()
    return PackedEntries(path, file, config.image_root) if path else _checked_entries(file, config)


def _content_digest(file: str) -> str:
    return _short_digest(f"{file_digest(file)} {FORM!r}")


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _make_packed(file: str, config: PretrainConfig, path: Path) -> None:
    """Write the packed entries of a file, unless they are there and intact; remove those of its earlier contents.

    These are known by the file's name. So none is removed from another folder, where files of that name may meet.
    """
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        PackedEntries(path, file, config.image_root).verify()
        return
    sweep(path.parent)
    log(f"{file}: packing its entries into {path}, once")
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as out, Problems() as problems:
            pack(_entries(file, config.image_root, config.max_words, problems, config.empty_captions), out)
            out.flush()
            if f".{_content_digest(file)}-" not in path.name:  # the name promises the content
                raise DataError(f"{file}: changed while it was read; start again once it is written")
    except DataError:
        raise
    except UserError as error:
        raise DataError(f"{error}; name a folder by --cache_dir for the packed entries of {file}") from error
    name = re.compile(rf"{re.escape(Path(file).name)}\.(\w{{12}})-\w{{12}}\.packed")
    for other in path.parent.iterdir() if path.parent == Path(file).parent else ():
        found = name.fullmatch(other.name)
        if found and not path.name.startswith(f"{Path(file).name}.{found[1]}-"):
            other.unlink(missing_ok=True)
            log(f"{other}: removed, packed from an earlier content of {file}")


def read_entries(
    file: str | Path, image_root: str, max_words: int, problems: Problems, empty_captions: str = "keep"
) -> PackedEntries:
    """The entries of one training JSON that can be used; notes the others, and captions of which nothing is left.

    Raises `DataError` for the file itself, or when it has no entries.
    """
    content = io.BytesIO()
    pack(_entries(file, image_root, max_words, problems, empty_captions), content)
    return PackedEntries(content.getvalue(), file, image_root)


def _entries(
    file: str | Path, image_root: str, max_words: int, problems: Problems, empty_captions: str
) -> Iterator[RawEntry]:
    remedy = {"keep": "they stay, and the model reads [CLS] alone", "drop": "they are left out"}[empty_captions]
    empty = f"{file}: captions of which nothing is left once cleaned; as empty_captions says, {remedy}"
    same = f"{file}: the relation's group is in no caption, or is its only synonym; SelfEQ's two maps are then equal"
    rows = found = 0
    for index, row in enumerate(read_list(file)):
        rows += 1
        image = row.get("image") if isinstance(row, dict) else None
        source = f"{file}: entry {index}" + (f" ({image})" if is_text(image) else "")
        entry = None
        with problems.at(source):
            entry = _entry(index, row, image_root, max_words)
            for text, cleaned in zip(_texts(row), entry.captions, strict=True):
                if not has_content(cleaned):
                    problems.warnings.add(source, empty, shown(text))
            if entry.relation and not _has_paraphrase(entry):
                problems.warnings.add(source, same, shown(entry.relation[0]))
            if empty_captions == "drop":
                entry = entry._replace(captions=list(filter(has_content, entry.captions)))
        if entry and entry.captions:
            found += 1
            yield entry
    if not found and not problems.kinds:
        raise DataError(f"{file}: holds no entries" + (" that have a caption" if rows else ""))


_locate_recent = functools.lru_cache(256)(locate)  # a third of the time, and an image has many entries


def _entry(index: int, row: Any, image_root: str, max_words: int) -> RawEntry:
    _check_spelling(row)
    name = require(row, "image", str)
    _locate_recent(image_root, name)
    key = _caption_key(row)
    if key not in row:
        raise EntryProblem("key 'caption' is missing")
    texts = _texts(row)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise EntryProblem(f"key '{key}' must be a string or a list of strings", f"found {shown(row[key])}")
    if not all(map(is_text, texts)):
        raise EntryProblem(f"key '{key}' {SURROGATE}", shown(row[key]))
    boxes = row.get("bbox", [])
    if not isinstance(boxes, list) or not all(map(is_box, boxes)):
        raise EntryProblem("key 'bbox' must be a list of [x1, y1, x2, y2]", f"found {shown(boxes)}")
    segmentations = row.get("segmentation", [])
    if not isinstance(segmentations, list):
        kind = "key 'segmentation' must be a list, with a list of polygons or an RLE for each region"
        raise EntryProblem(kind, f"found {shown(segmentations)}")
    for one in segmentations:
        check_segmentation(one, "each region of 'segmentation'")
    if boxes and segmentations:
        raise EntryProblem("an entry may have 'bbox' or 'segmentation', not both: AMC takes one mask; remove a key")
    captions = [clean_caption(text, max_words) for text in texts]
    return RawEntry(index, name, captions, boxes, _relation(row.get("relation"), max_words), segmentations)


def _relation(relation: Any, max_words: int) -> list[str]:
    """The group of a relation and its synonyms, cleaned; nothing if there are none."""
    if relation is None or (isinstance(relation, dict) and not relation.get("synonym")):
        return []
    group, synonyms = map(relation.get, ("group", "synonym")) if isinstance(relation, dict) else (None, None)
    if not is_text(group) or not isinstance(synonyms, list) or not all(map(is_text, synonyms)):
        form = 'key \'relation\' must be {"group": words of the caption, "synonym": a list of texts}'
        raise EntryProblem(form, f"found {shown(relation)}")
    words = [clean_caption(text, max_words) for text in (group, *synonyms)]
    synonyms = list(filter(has_content, words[1:]))
    return [words[0], *synonyms] if has_content(words[0]) and synonyms else []


def _has_paraphrase(entry: RawEntry) -> bool:
    """Whether any of its synonyms changes any of its captions."""
    group, *synonyms = entry.relation
    return any(group in caption for caption in entry.captions) and any(synonym != group for synonym in synonyms)


def _caption_key(row: dict[str, Any]) -> str:
    return SELFEQ_KEYS[0] if "caption" not in row and SELFEQ_KEYS[0] in row else "caption"


def _texts(row: dict[str, Any]) -> list[Any]:
    texts = row[_caption_key(row)]
    return texts if isinstance(texts, list) else [texts]


def _check_spelling(row: Any) -> None:
    """Raise `EntryProblem` where a key is missing, and another looks like it; files may have keys of their own."""
    if not isinstance(row, dict) or len(row) <= sum(key in row for key in KEYS):
        return
    others = {other.lower(): other for other in row if other not in KEYS + SELFEQ_KEYS}
    for key in KEYS[:3] if row.get("bbox") else KEYS:
        cutoff = 0.9 if key == "segmentation" else 0.65  # the long one is like many others
        if key not in row and (close := difflib.get_close_matches(key, others, n=1, cutoff=cutoff)):
            raise EntryProblem(f"unknown key {shown(others[close[0]])}; did you mean '{key}'?")


def _check_images(files: list[PackedEntries], skip_broken: bool) -> None:
    """Look for each image once; raises `DataError` if one is missing, with `skip_broken` if all are."""
    hashes = np.fromiter((hash(image) for file in files for image, _ in file.images()), np.int64)
    new = np.zeros(len(hashes), bool)
    new[np.unique(hashes, return_index=True)[1]] = True  # files may share images
    count, missing, first = int(new.sum()), 0, ""
    for image, source in itertools.compress((image for file in files for image in file.images()), new):
        if not os.path.isfile(image):  # False, too, for a name that the system finds too long
            missing, first = missing + 1, first or source
    if not missing:
        return
    said = f"{missing} of {count} training images are missing, the first at {first}: "
    if not skip_broken:
        raise DataError(f"{said}check image_root, or pass --skip_broken to train without them")
    if missing == count:
        raise DataError(f"none of the {count} training images can be read; check image_root")
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


def mlm_targets(labels: Tensor) -> Tensor:
    """MLM labels (B, T) -> (K,) int64, where their targets are when flattened; in a loader this waits for no device."""
    return (labels.flatten() != -100).nonzero()[:, 0]


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
        labels = torch.from_numpy(np.stack([m.labels for m in masked]))
        others = [sample.caption if sample.other is None else sample.other for sample in samples]
        has_other = torch.tensor([sample.other is not None for sample in samples])
        more = (*self.tokenizer(others, self.config.max_tokens), has_other) if self.config.paraphrases else ()
        return (
            torch.stack([sample.image for sample in samples]),
            tokens.input_ids,
            tokens.attention_mask,
            torch.from_numpy(np.stack([m.ids for m in masked])),
            labels,
            torch.stack([sample.mask for sample in samples]),
            torch.tensor([sample.has_box for sample in samples]),
            mlm_targets(labels),
            *more,
        )
