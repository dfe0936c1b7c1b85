"""What the page of `demo.py --web` offers: checkpoints to choose from, and examples to try them on."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.reading import DataError, load_json
from runs import newest_checkpoint, shortest_ends
from utils import UserError

SHIPPED = Path("checkpoints/scenes_stage1.safetensors")
SHIPPED_AMC = Path("checkpoints/scenes_amc.safetensors")
SHIPPED_CONFIG = Path("configs/scenes/Grounding_refcoco.yaml")
DEMO = Path("output/scenes")  # where `make demo` leaves its models
TRAINED = {"control": "control", "AMC": "amc"}  # name on the page, after "make demo: " -> folder
BEFORE = "stage 1 (before AMC)"
AFTER = "AMC"
ONLY_BEFORE = (
    "Only the model before AMC is here. `make demo` trains one with AMC, and a control without it, to compare."
)
SCENES = Path("data/scenes")
SHOWN = Path("docs/images/scenes")  # held-out scenes that ship: an example needs no `prepare.py scenes`
SCENES_FILE = SHOWN / "phrases.json"
SCENES_SHOWN = ("100000.jpg", "100013.jpg", "100016.jpg", "100021.jpg")
PHRASES_SHOWN = 3


class Offer(NamedTuple):
    """A checkpoint on the page's list; config None: chosen by what the checkpoint says of its sizes."""

    name: str
    checkpoint: Path
    config: str | None = None


class Example(NamedTuple):
    """A picture to try, with phrases that fit; `credit` is empty for a scene."""

    name: str
    path: Path
    phrases: tuple[str, ...]
    credit: str = ""


# In scikit-image's wheel; licences as its docstrings state them (skimage.data.astronaut and the others).
PHOTOGRAPHS = (
    ("astronaut", "astronaut.png", ("the astronaut", "the flag", "the space shuttle"), "NASA, public domain"),
    ("coffee", "coffee.png", ("the cup of coffee", "the spoon"), "Rachel Michetti, CC0"),
    ("cat", "chelsea.png", ("the cat", "the nose", "the left eye"), "Stefan van der Walt, CC0"),
    ("rocket", "rocket.jpg", ("the rocket", "the fire", "the towers"), "SpaceX, public domain"),
)


def offered(checkpoints: Sequence[str] = (), config: str | None = None, demo: Path = DEMO) -> list[Offer]:
    """The checkpoints of the page, in the order of its list.

    Args:
        checkpoints: as named on the command line; none: the two that ship and the newest ones that `make demo` left.
        config: for all of them; None: each by its sizes, the shipped stage 1 by its own.

    Raises:
        UserError: one of `checkpoints` is no file.
    """
    if checkpoints:
        paths = list(dict.fromkeys(map(Path, checkpoints)))
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no such checkpoint; the page takes files, for instance {SHIPPED}")
        return [
            Offer(name, path, config or _own_config(path))
            for name, path in zip(shortest_ends(paths), paths, strict=True)
        ]
    trained = [(f"make demo: {name}", newest_checkpoint(demo / folder)) for name, folder in TRAINED.items()]
    return [
        Offer(BEFORE, SHIPPED, config or str(SHIPPED_CONFIG)),
        Offer(AFTER, SHIPPED_AMC, config),
        *(Offer(name, path, config) for name, path in trained if path is not None),
    ]


def _own_config(path: Path) -> str | None:
    return str(SHIPPED_CONFIG) if path.resolve() == SHIPPED.resolve() else None


def examples() -> list[Example]:
    """Scenes, then photographs that come with scikit-image; nothing is downloaded."""
    return scene_examples() + photograph_examples()


def scene_examples(file: Path = SCENES_FILE, images: Path = SHOWN) -> list[Example]:
    """Held-out scenes with phrases of their own; empty when their files are not there."""
    try:
        entries = load_json(file, list)
    except DataError:
        return []
    found = []
    for number, name in enumerate(SCENES_SHOWN, start=1):
        phrases = [str(entry["text"]) for entry in entries if entry["image"] == name]
        if phrases and (images / name).is_file():
            longest_first = sorted(dict.fromkeys(phrases), key=lambda phrase: (-len(phrase.split()), phrase))
            found.append(Example(f"scene {number}", images / name, tuple(longest_first[:PHRASES_SHOWN])))
    return found


def photograph_examples() -> list[Example]:
    """Photographs inside the installed scikit-image; its package is found, not imported."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin else Path()
    found = [Example(name, folder / file, phrases, credit) for name, file, phrases, credit in PHOTOGRAPHS]
    return [example for example in found if example.path.is_file()]
