"""Checkpoint files mutated from a seed: bytes flipped, cut or repeated; keys and values in places of others."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ODD: list[Callable[[], Any]] = [
    lambda: None,
    lambda: -1,
    lambda: 10**30,
    lambda: float("nan"),
    lambda: "abc",
    lambda: b"\xff",
    list,
    dict,
    lambda: {"model": {}},
    lambda: [[1, 2], {"params": "x"}],
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.ones(2, 3),
    lambda: torch.zeros(1).expand(10**9, 10**9),
    lambda: torch.arange(3),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.eye(3).to_sparse_csr(),
    lambda: torch.zeros(3, device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    lambda: torch.ones(3, dtype=torch.complex64),
    lambda: torch.ones(3, dtype=torch.bool),
]
ODD_KEYS: list[Any] = [
    1,
    None,
    1.5,
    b"key",
    (1, 2),
    "",
    "model",
    "state_dict",
    "module.",
    "_orig_mod.",
    "k" * 300,
    "\ud800",
]


def mutate_content(content: Any, draw: random.Random) -> Any:
    """A copy of nested dicts and lists in which one to three keys or values are other ones."""
    content = copy.copy(content)
    for _ in range(draw.randint(1, 3)):
        content = _mutate_once(content, draw, content)
    return content


def _mutate_once(content: Any, draw: random.Random, everything: Any) -> Any:
    if isinstance(content, (dict, list)) and content and draw.random() < 0.85:
        content = copy.copy(content)
        places = list(content) if isinstance(content, dict) else list(range(len(content)))
        place = draw.choice(places)
        kind = draw.randrange(5)
        if kind == 0 and isinstance(content, dict):
            content[draw.choice(ODD_KEYS)] = content.pop(place)
        elif kind == 1:
            other = draw.choice(places)
            content[place], content[other] = content[other], content[place]
        elif kind == 2:
            del content[place]
        else:
            content[place] = _mutate_once(content[place], draw, everything)
        return content
    return everything if draw.random() < 0.05 else draw.choice(ODD)()


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip bits, cut, cut out, overwrite, move or repeat a part; often near the ends, where the tables are."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        size = len(changed) or 1
        at = draw.choice(
            [draw.randrange(size), draw.randrange(min(size, 700)), size - 1 - draw.randrange(min(size, 700))]
        )
        length = draw.choice([1, 4, 30, draw.randrange(1, size + 1)])
        kind = draw.randrange(8)
        if kind <= 2 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at : at + length] = draw.randbytes(min(length, 64))
        elif kind == 6:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"])
    return bytes(changed)


def write_mutated(content: dict[str, Any], folder: Path, draw: random.Random) -> Path:
    """Write a checkpoint in one of its formats, its content or its bytes changed; returns the file."""
    form = draw.choice(["zip", "zip", "legacy", "safetensors"])
    path = folder / f"mutated.{'safetensors' if form == 'safetensors' else 'pth'}"
    of_bytes = draw.random() < 0.5
    if form == "safetensors":
        save_file({key: value.clone() for key, value in content["model"].items()}, path)
        of_bytes = True
    else:
        torch.save(
            content if of_bytes else mutate_content(content, draw),
            path,
            _use_new_zipfile_serialization=form == "zip",
        )
    if of_bytes:
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    return path
