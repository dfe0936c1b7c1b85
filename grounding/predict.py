"""From images and texts to GradCAM maps and match decisions: the evaluation's path through the model.

Every image is decoded and encoded once, whatever the number of texts about it; so are its keys and values for the
fusion layers. Equal texts of one image share a map. Maps leave the device as soon as they are computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.reading import DataError, read_image
from dataset.text import Tokenizer
from dataset.transforms import normalise
from dataset.workers import check_shared_memory
from models.albef import ALBEF
from models.checkpoint import CheckpointError, first_not_finite
from models.xbert import KeyValue
from utils import rank, world_size

MAX_PAIRS = 32  # (image, text) pairs in one pass of the fusion layers; each holds a copy of its image's keys and values

Pair = tuple[Path, str]
Resize = Callable[[Image.Image, int], np.ndarray]
Ask = Callable[[Tensor, list[int], list[str]], Tensor]  # `Explainer.maps`, or `Explainer.match_probabilities`


class Explainer(NamedTuple):
    """A model with what it takes to ask it: tokenizer, device, and which attention to explain.

    mode "itm": cross-attention of BERT layer `block`, by the match logit; "itc": self-attention of image block `block`,
    by the image-text similarity. precision: of the image encoder up to the part that is explained; all else is fp32.
    name: of the checkpoint, for messages.

    Whatever is asked of it raises `CheckpointError` where the answer is not a number (`finite`).
    """

    model: ALBEF
    tokenizer: Tokenizer
    device: torch.device
    mode: str
    block: int
    precision: torch.dtype = torch.float32
    name: str = "the model"

    def finite(self, answer: Tensor, what: str = "the map") -> Tensor:
        """An answer of the model, on the CPU; raises `CheckpointError` when it holds NaN or infinity, and says why."""
        if not answer.isfinite().all():
            raise CheckpointError(f"{what} holds values that are not numbers: {self._reason()}")
        return answer

    def _reason(self) -> str:
        if key := first_not_finite(self.model):
            return f"in {self.name}, {key} holds NaN or infinity (its training diverged); take an earlier checkpoint"
        weights = [(float(p.abs().max()), key) for key, p in self.model.named_parameters() if p.numel()]
        largest, key = max(weights)
        return (
            f"the weights of {self.name} are finite, but so large that the computation overflows (the largest, of "
            f"{key}, is {largest:.3g}); take an earlier checkpoint"
        )

    @torch.no_grad()
    def maps(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        """GradCAM maps, one for each text.

        Args:
            images: (N, 3, r, r), normalised.
            index: for each text, its image among the N.

        Returns:
            float32 (len(texts), h, w) on the CPU, at least 0, each up to a positive factor.
        """
        images = images.to(self.device, non_blocking=True)
        explain = self._match_maps if self.mode == "itm" else self._contrast_maps
        return self.finite(explain(images, index, texts))

    def _match_maps(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        keys_values, maps = self._keys_values(images), []
        for chosen, ids, mask in self._chunks(index, texts):
            cam, _ = self.model.match_gradcam(keys_values, ids, mask, self.block, chosen)
            maps.append(cam.cpu())
        return torch.cat(maps)

    def _contrast_maps(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        with self.reduced_precision():
            tokens = self.model.visual_encoder.tokens_before(images, self.block)
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer(texts))
        chosen = torch.tensor(index, device=self.device)
        cam, _ = self.model.contrast_gradcam(tokens.float(), ids, mask, self.block, chosen)
        return cam.cpu()

    @torch.no_grad()
    def match_probabilities(self, images: Tensor, index: list[int], texts: list[str]) -> Tensor:
        """How likely the model finds it that each text matches its image: (len(texts),) in [0, 1], on the CPU.

        Arguments as in `maps`.
        """
        keys_values, found = self._keys_values(images.to(self.device)), []
        for chosen, ids, mask in self._chunks(index, texts):
            tokens = self.model.encode_text(ids, mask)
            fused = self.model.text_encoder.fuse(tokens, mask, keys_values, chosen, cls_only=True)
            found.append(self.model.match_logits(fused.tokens).softmax(dim=1)[:, 1].cpu())
        return self.finite(torch.cat(found), "the match probability")

    def _keys_values(self, images: Tensor) -> list[KeyValue]:
        with self.reduced_precision():
            tokens = self.model.encode_image(images)
        return self.model.text_encoder.image_keys_values(tokens.float())

    def reduced_precision(self) -> torch.autocast:
        """The context that the image encoder runs in."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _chunks(self, index: list[int], texts: list[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Image index (n,), token ids (n, T) and mask (n, T) of up to `MAX_PAIRS` texts at a time."""
        for start in range(0, len(texts), MAX_PAIRS):
            tokens = self.tokenizer(texts[start : start + MAX_PAIRS])
            chosen = torch.tensor(index[start : start + MAX_PAIRS])
            yield chosen.to(self.device), tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)


class Loaded(NamedTuple):
    """An image ready for the model, (3, r, r); None when it could not be read, and why."""

    path: Path
    pixels: Tensor | None
    problem: str = ""


class ImageData(Dataset[Loaded]):
    """Images resized to `image_res` and normalised; an unreadable one raises `DataError` unless `skip_broken`."""

    def __init__(self, paths: Sequence[Path], resize: Resize, image_res: int, skip_broken: bool) -> None:
        self.paths, self.resize, self.image_res, self.skip_broken = paths, resize, image_res, skip_broken

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        path = self.paths[index]
        try:
            image = read_image(path, f"image {index} of {len(self)}")
        except DataError as error:
            if not self.skip_broken:
                raise
            return Loaded(path, None, str(error))
        return Loaded(path, normalise(self.resize(image, self.image_res)))


def load_images(data: ImageData, batch_size: int, workers: int) -> Iterator[list[Loaded]]:
    """This process's batches of images, decoded by `workers` processes while the model computes.

    Batches are dealt out to the processes whole, so that what is computed does not depend on how many there are. Shows
    progress on a terminal.
    """
    indices = list(range(len(data)))
    batches = [indices[start : start + batch_size] for start in range(0, len(data), batch_size)]
    mine = batches[rank() :: world_size()]
    check_shared_memory(workers, len(mine), 4 * 3 * data.image_res**2 * batch_size)
    loader: Iterable[list[Loaded]] = DataLoader(data, batch_sampler=mine, num_workers=workers, collate_fn=list)
    with tqdm(total=sum(map(len, mine)), unit="image", disable=None if rank() == 0 else True) as bar:
        for batch in loader:
            for broken in (image for image in batch if image.pixels is None):
                print(f"skipped: {broken.problem}", flush=True)
            yield [image for image in batch if image.pixels is not None]
            bar.update(len(batch))


def ask(function: Ask, pairs: Sequence[Pair], batches: Iterable[list[Loaded]]) -> Iterator[tuple[int, Tensor]]:
    """Answer (image, text) pairs, image by image, each different pair once.

    Yields:
        the position of a pair and its row of the answer; pairs of images that `batches` lacks are left out.
    """
    positions: dict[Path, dict[str, list[int]]] = {}
    for position, (path, text) in enumerate(pairs):
        positions.setdefault(path, {}).setdefault(text, []).append(position)
    for batch in batches:
        if not batch:
            continue
        asked = [(row, text) for row, image in enumerate(batch) for text in positions[image.path]]
        pixels = torch.stack([image.pixels for image in batch if image.pixels is not None])
        answers = function(pixels, [row for row, _ in asked], [text for _, text in asked])
        for (row, text), answer in zip(asked, answers, strict=True):
            for position in positions[batch[row].path][text]:
                yield position, answer.clone()
