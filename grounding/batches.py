"""Evaluation's images: decoded by worker processes, in batches, and asked for everything about them at once."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.loader.workers import check_shared_memory
from dataset.reading import DataError, read_image
from dataset.transforms import normalise
from grounding.explain import Resize
from signals import ignore_in_worker
from utils import rank, world_size

Pair = tuple[Path, str]
Ask = Callable[[Tensor, list[int], list[str]], Tensor]  # `Explainer.maps`, or `Explainer.match_probabilities`


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


def load_images(
    data: ImageData, batch_size: int, workers: int, wanted: Collection[Path] | None = None
) -> Iterator[list[Loaded]]:
    """This process's batches of images, decoded by `workers` processes while the model computes.

    Whole batches are dealt out to the processes, so results do not depend on their number. A terminal shows progress.

    Args:
        wanted: leave out batches with none of these images.
    """
    indices = list(range(len(data)))
    batches = [indices[start : start + batch_size] for start in range(0, len(data), batch_size)]
    if wanted is not None:
        batches = [batch for batch in batches if any(data.paths[index] in wanted for index in batch)]
    mine = batches[rank() :: world_size()]
    check_shared_memory(workers, len(mine), 4 * 3 * data.image_res**2 * batch_size)
    loader: Iterable[list[Loaded]] = DataLoader(
        data, batch_sampler=mine, num_workers=workers, collate_fn=list, worker_init_fn=ignore_in_worker
    )
    with tqdm(total=sum(map(len, mine)), unit="image", disable=None if rank() == 0 else True) as bar:
        for batch in loader:
            for broken in (image for image in batch if image.pixels is None):
                print(f"skipped: {broken.problem}", flush=True)
            yield [image for image in batch if image.pixels is not None]
            bar.update(len(batch))


def answer_pairs(ask: Ask, pairs: Sequence[Pair], batches: Iterable[list[Loaded]]) -> Iterator[tuple[int, Tensor]]:
    """Answer (image, text) pairs, image by image; equal pairs are asked once.

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
        answers = ask(pixels, [row for row, _ in asked], [text for _, text in asked])
        for (row, text), answer in zip(asked, answers, strict=True):
            for position in positions[batch[row].path][text]:
                yield position, answer
