"""TensorBoard logging of a training run: scalars, and periodic heat maps of fixed phrases.

Pretrain.py imports this for --tensorboard alone. Steps are optimizer steps since the run's beginning, so that a resumed
run continues the curves of the interrupted one; steps that it repeats replace the earlier ones.
"""

import contextlib
import itertools
import random
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from config import ConfigError
from dataset.loader.entries import TrainingEntry
from dataset.photos import read_photo
from dataset.reading import DataError, read_image
from dataset.text import has_content
from dataset.vg import clip_box, covering_masks
from grounding.explain import Explainer, clean_phrase, encode, ground
from grounding.pictures.overlay import overlay
from grounding.pictures.render import pixels
from models.interface import MODES
from utils import UserError, log

SHOWN_ENTRIES = 4  # of the training data, where nothing else is asked for
LONGEST_TAG = 60  # characters


class Watched(NamedTuple):
    """A phrase whose map is drawn periodically.

    truth: boxes [x, y, w, h] in pixels of the image; region: the pixels of segmentations, bool (height, width).
    """

    image: Image.Image
    phrase: str
    truth: tuple[tuple[int, int, int, int], ...] = ()
    region: np.ndarray | None = None


class Board:
    """Event files of one run, written by rank 0.

    Args:
        explainer: the model in training, and the layer whose maps are drawn.
        watched: phrases of one image in a row share its encoding.
        every: optimizer steps between two sets of maps.

    Raises:
        UserError: TensorBoard is not installed; a phrase cannot be read; the layer has no maps. `start` alone writes.
    """

    def __init__(self, explainer: Explainer, watched: Sequence[Watched], every: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"--tensorboard: TensorBoard is missing ({error}); pip install tensorboard") from None
        known = explainer.model.layers(explainer.mode)
        if explainer.block not in known:  # which nothing else checks where AMC is off
            raise ConfigError(
                f"--tensorboard draws maps of amc.layer, which is {explainer.block}; the {MODES[explainer.mode]} are "
                f"{known.start} to {known[-1]}: choose one by --set amc.layer={known[len(known) // 2]}"
            )
        self.writer_class = SummaryWriter
        self.explainer, self.watched, self.every = explainer, watched, every
        texts = [clean_phrase(explainer, one.phrase) for one in watched]
        self.tags = [f"maps/{number:02d}_{tag_of(text)}" for number, text in enumerate(texts, start=1)]
        self.step, self.drawn_at = 0, -1

    def start(self, folder: Path, step: int, config: str) -> None:
        """Begin or go on after `step` steps: the config as text and, in a new folder, the maps of the first weights."""
        new = not folder.exists()
        # What an interrupted run wrote of later steps, which are now repeated, is hidden by TensorBoard.
        self.writer = self.writer_class(str(folder), purge_step=step + 1)
        self.writer.add_text("config", textwrap.indent(config, "    "), step)
        self.step, self.drawn_at = step, step
        if new:
            self.draw_maps(step)

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a group after `step` steps."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def after_step(self, step: int) -> None:
        """Draw the maps every `every` steps."""
        self.step = step
        if step % self.every == 0:
            self.draw_maps(step)

    def close(self) -> None:
        """Draw the maps of the last step if they are missing."""
        if self.drawn_at != self.step:
            self.draw_maps(self.step)
        self.writer.close()

    def draw_maps(self, step: int) -> None:
        """Ask the model as it is for each phrase and draw what it answers; nothing of the training changes by it."""
        with undisturbed(self.explainer):
            image = None
            for tag, one in zip(self.tags, self.watched, strict=True):
                if one.image is not image:
                    image, encoded = one.image, encode(self.explainer, one.image)
                try:
                    found = ground(self.explainer, encoded, one.phrase)
                except UserError as error:  # weights that are not numbers; the next check of the losses stops the run
                    log(f"step {step}: no map of {one.phrase!r}: {error}")
                    continue
                drawn = overlay(image, found, one.truth, region=one.region)
                self.writer.add_image(tag, pixels(drawn), step, dataformats="HWC")
        self.writer.flush()
        self.drawn_at = step


def watched_pairs(pairs: Sequence[tuple[str, str]]) -> list[Watched]:
    """Images of any kind and phrases for them; raises `DataError` naming an image that cannot be read."""
    images = {path: read_photo(Path(path), f"--watch {path}") for path, _ in pairs}
    return [Watched(images[path], phrase) for path, phrase in pairs]


def watched_entries(
    entries: Sequence[TrainingEntry] | ConcatDataset[TrainingEntry],
    boxed: np.ndarray,
    skip_broken: bool = False,
    count: int = SHOWN_ENTRIES,
) -> list[Watched]:
    """The first captions of entries at equal distances through the training data, of those with a region if any has.

    `boxed` tells which have. Entries without words are passed over. An image that cannot be read raises `DataError`,
    or with `skip_broken` is passed over as well.
    """
    suitable = np.flatnonzero(boxed) if boxed.any() else np.arange(len(entries))
    starts = [len(suitable) * number // count for number in range(count + 1)]
    watched = []
    for start, end in itertools.pairwise(starts):
        for index in map(int, suitable[start:end]):
            entry = entries[index]
            phrase = next(filter(has_content, entry.captions), None)
            if phrase is None:
                continue
            try:
                image = read_image(entry.image, entry.source)
            except DataError:
                if not skip_broken:
                    raise
                continue
            clipped = (clip_box(box, image.height, image.width) for box in entry.boxes)
            truth = tuple((x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in filter(None, clipped))
            masks = covering_masks(entry, image.height, image.width)
            watched.append(Watched(image, phrase, truth, np.any(masks, axis=0) if masks else None))
            break
    return watched


@contextlib.contextmanager
def undisturbed(explainer: Explainer) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modules' modes and all random states are as they were before."""
    modes = [(module, module.training) for module in explainer.model.modules()]
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries may draw from it
    explainer.model.eval()
    try:
        with torch.random.fork_rng([explainer.device] if explainer.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        for module, training in modes:
            module.training = training


def tag_of(text: str) -> str:
    """A phrase as a part of a tag: letters, digits and underscores."""
    return re.sub(r"\W+", "_", text)[:LONGEST_TAG].strip("_")
