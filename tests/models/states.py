"""Checkpoints for the tests of them: state dicts with other values than a model's own, and damaged files."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.checkpoint import load_weights, read_checkpoint

State = dict[str, Tensor]


def state_of(model: nn.Module, seed: int = 1) -> State:
    """A state dict of the model's shapes with other values than the model's."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        state[key] = drawn if value.is_floating_point() else value.clone()
    tied = "text_encoder.cls.predictions.decoder.weight"
    for suffix in ("", "_m"):
        key = tied.replace("text_encoder", f"text_encoder{suffix}")
        if key in state:
            state[key] = state[key.replace("cls.predictions.decoder", "bert.embeddings.word_embeddings")]
            bias = key.replace("decoder.weight", "bias")
            state[key.replace("weight", "bias")] = state[bias]
    return state


def assert_holds(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


def load(model: nn.Module, path: Path) -> str:
    """Load a file into a model; returns the report."""
    return str(load_weights(model, read_checkpoint(path)["model"], path))


def image_encoder(image_res: int = 8, **options: Any) -> VisionTransformer:
    return VisionTransformer(image_res, 4, embed_dim=8, depth=2, num_heads=2, num_classes=0, global_pool="", **options)


def resized(embedding: Tensor, side: int) -> Tensor:
    """The positions of a CLS token and a square grid, on another grid."""
    old = math.isqrt(embedding.shape[1] - 1)
    rows = [[embedding[0, 1 + row * old + column] for column in range(old)] for row in range(old)]
    grid = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)[None]
    new = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0]
    patches = [new[:, row, column] for row in range(side) for column in range(side)]
    return torch.stack([embedding[0, 0], *patches])[None]


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def data_offset(path: Path, record: str) -> int:
    with zipfile.ZipFile(path) as archive, archive.open(record) as stream:
        return stream._orig_compress_start  # type: ignore[attr-defined]
