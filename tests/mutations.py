"""Random damage for the fuzzer: to the bytes of a file, or to what it says once it is parsed."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 10**20, 10**400, 0.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "?!", "\u200b", "\ud800", "x" * 300, "x" * 5000),
    *("../../etc/passwd", "/etc/passwd", "\x1b[2J", "NaN", "1e5"),
    *([], {}, [[]], [None], [[1, 2]], [[4, 4, 2, 2]], [[0, 0, 1e400, 5]], {"a": {}}, "[" * 50),
)


def odd_tensor(rng: random.Random) -> torch.Tensor:
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: torch.zeros(0),
        lambda: torch.zeros(1, 1, 1),  # shapes that no weight has: each is refused
        lambda: torch.full((7, 7), float("nan")),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(1).expand(10**9, 10**9),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3, dtype=torch.bool),
    ]
    return rng.choice(kinds)()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three of: a bit flipped, a piece cut, doubled, zeroed or inserted, the end or the beginning lost.

    Often near the ends, where many formats have their tables.
    """
    for _ in range(rng.randint(1, 3)):
        size = len(data)
        near = rng.randrange(min(size, 700) + 1)
        start = rng.choice([rng.randrange(size + 1), near, size - near])
        before, after = data[:start], data[min(size, start + rng.choice([1, 1, 2, 8, 200, size])) :]
        piece = data[start : size - len(after)]
        extra = rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", *b'{ [ " \n \x1f\x8b -'.split(b" "), b"9" * 30])
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in piece[:1]) + piece[1:]
        number = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]) + data[start + 4 :]
        changed = [flipped + after, flipped + after, number, after, piece * 2 + after, bytes(len(piece)) + after]
        data = rng.choice([*(before + end for end in (*changed, extra + data[start:], b"")), extra + data])
    return data


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change a parsed value at one to two places: an odd value, a key lost, renamed or doubled, items swapped."""
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        odd = odd_tensor(rng) if isinstance(holder[key], torch.Tensor) and rng.random() < 0.7 else rng.choice(ODD)
        what = rng.randrange(5)
        if what < 3:
            holder[key] = odd
        elif isinstance(holder, dict):
            taken = holder.pop(key)
            if what == 4:
                holder[rng.choice([f"{key}s", "", 7, "module.x", None])] = taken
        elif what == 3:
            del holder[key]
        else:
            holder.append(holder[key])
    return value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    if depth > 8 or not isinstance(value, dict | list):
        return
    for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from _places(inside, depth + 1)
