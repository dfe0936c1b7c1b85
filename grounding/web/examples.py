"""What the page of `demo.py --web` begins with: checkpoints to choose from, and example pictures with phrases."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.reading import DataError, load_json
from dataset.scenes.paths import DEMO, DEMO_AMC, DEMO_CONTROL, SHIPPED, SHIPPED_AMC, SHIPPED_CONFIG, SHOWN
from grounding.maps import THRESHOLD
from grounding.pictures.render import COLORMAP
from runs import newest_checkpoint, shortest_ends
from utils import UserError

BEFORE = "stage 1 (before AMC)"  # its name on the page
SCENES = ("100000.jpg", "100013.jpg", "100016.jpg", "100021.jpg")
PHRASES_SHOWN = 3


class Start(NamedTuple):
    """What the page's controls hold at first."""

    mode: str = "itm"
    layer: int | None = None
    threshold: float = THRESHOLD
    colormap: str = COLORMAP


class Offer(NamedTuple):
    """A checkpoint on the page's list; config None: chosen by the sizes that the checkpoint states."""

    name: str
    checkpoint: Path
    config: str | None = None


class Example(NamedTuple):
    """A picture to try, with phrases that fit it; `credit` names its author and licence."""

    name: str
    path: Path
    phrases: tuple[str, ...]
    credit: str = ""


# Name, file in scikit-image's wheel, phrases, and author with licence by the docstrings of skimage.data.
PHOTOGRAPHS = (
    ("astronaut", "astronaut.png", ("the astronaut", "the flag", "the space shuttle"), "NASA, public domain"),
    ("coffee", "coffee.png", ("the cup of coffee", "the spoon"), "Rachel Michetti, CC0"),
    ("cat", "chelsea.png", ("the cat", "the nose", "the left eye"), "Stefan van der Walt, CC0"),
    ("rocket", "rocket.jpg", ("the rocket", "the fire", "the towers"), "SpaceX, public domain"),
)


def offered(checkpoints: Sequence[str] = (), config: str | None = None, demo: Path = DEMO) -> list[Offer]:
    """The checkpoints that are named, or else the two that ship and the newest ones of `make demo`.

    Without `config`, each is opened by its sizes, the shipped stage 1 by its own config. A checkpoint that is no file
    raises `UserError`.
    """
    paths = list(dict.fromkeys(map(Path, checkpoints)))
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; the page takes files, for instance {SHIPPED}")
    named = dict(zip(shortest_ends(paths), paths, strict=True))
    if not paths:
        named = {BEFORE: SHIPPED, "AMC": SHIPPED_AMC}
        for name, folder in (("control", DEMO_CONTROL), ("AMC", DEMO_AMC)):
            if newest := newest_checkpoint(demo / folder.name):
                named[f"make demo: {name}"] = newest
    own = {SHIPPED.resolve(): str(SHIPPED_CONFIG)}
    return [Offer(name, path, config or own.get(path.resolve())) for name, path in named.items()]


def examples() -> list[Example]:
    """Scenes, then photographs that come with scikit-image; nothing is downloaded."""
    return scene_examples() + photograph_examples()


def scene_examples(file: Path = SHOWN / "phrases.json", images: Path = SHOWN) -> list[Example]:
    """Held-out scenes with phrases of their own; empty when their files are not there."""
    try:
        entries = load_json(file, list)
    except DataError:
        return []
    found = []
    for number, name in enumerate(SCENES, start=1):
        phrases = {str(entry["text"]) for entry in entries if entry["image"] == name}
        if phrases and (images / name).is_file():
            longest_first = sorted(phrases, key=lambda phrase: (-len(phrase.split()), phrase))
            found.append(Example(f"scene {number}", images / name, tuple(longest_first[:PHRASES_SHOWN])))
    return found


def photograph_examples() -> list[Example]:
    """Photographs inside the installed scikit-image; the package is located, not imported."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else Path()
    found = [Example(name, folder / file, phrases, credit) for name, file, phrases, credit in PHOTOGRAPHS]
    return [example for example in found if example.path.is_file()]
