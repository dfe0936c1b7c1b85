"""What the page of `demo.py --web` begins with: checkpoints to choose from, and example pictures with phrases."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.scenes.paths import DEMO, DEMO_AMC, DEMO_CONTROL, SHIPPED, SHIPPED_AMC, SHIPPED_CONFIG, SHOWN
from grounding.maps import THRESHOLD
from grounding.pictures.render import COLORMAP
from models.student import is_student, local_checkpoint
from runs import newest_checkpoint, shortest_ends
from utils import UserError

BEFORE = "stage 1 (before AMC)"  # its name on the page


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


# Name, file, phrases, and author with licence by the docstrings of skimage.data.
SCENES = (
    ("scene 1", "100000.jpg", ("the small red triangle", "the big circle", "the blue circle"), ""),
    ("scene 2", "100013.jpg", ("small blue thing", "the blue square", "large cross"), ""),
    ("scene 3", "100016.jpg", ("the big purple square", "small purple thing", "purple square"), ""),
    ("scene 4", "100021.jpg", ("the little green square", "the little red triangle", "green square"), ""),
)
PHOTOGRAPHS = (
    ("astronaut", "astronaut.png", ("the astronaut", "the flag", "the space shuttle"), "NASA, public domain"),
    ("coffee", "coffee.png", ("the cup of coffee", "the spoon"), "Rachel Michetti, CC0"),
    ("cat", "chelsea.png", ("the cat", "the nose", "the left eye"), "Stefan van der Walt, CC0"),
    ("rocket", "rocket.jpg", ("the rocket", "the fire", "the towers"), "SpaceX, public domain"),
)


def offered(checkpoints: Sequence[str] = (), config: str | None = None, demo: Path = DEMO) -> list[Offer]:
    """The checkpoints that are named, or else the two that ship and the newest ones of `make demo`.

    Without `config`, each is opened by its sizes, the shipped stage 1 by its own config. A checkpoint that is no file,
    no student's folder and no name of one on the hub raises `UserError`.
    """
    paths = {Path(checkpoint): local_checkpoint(checkpoint) for checkpoint in checkpoints}
    for path in paths.values():
        if not path.is_file() and not is_student(path):
            raise UserError(f"{path}: no such checkpoint; the page takes files, for instance {SHIPPED}")
    named = dict(zip(shortest_ends(list(paths)), paths.values(), strict=True))
    if not paths:
        named = {BEFORE: SHIPPED, "AMC": SHIPPED_AMC}
        for name, folder in (("control", DEMO_CONTROL), ("AMC", DEMO_AMC)):
            if newest := newest_checkpoint(demo / folder.name):
                named[f"make demo: {name}"] = newest
    own = {SHIPPED.resolve(): str(SHIPPED_CONFIG)}
    return [Offer(name, path, config or own.get(path.resolve())) for name, path in named.items()]


def examples() -> list[Example]:
    """Held-out scenes, then photographs of the installed scikit-image (found, not imported); those that are there."""
    spec = importlib.util.find_spec("skimage")
    photographs = Path(spec.origin).parent / "data" if spec and spec.origin else Path()
    found = [
        Example(name, folder / file, phrases, credit)
        for folder, table in ((SHOWN, SCENES), (photographs, PHOTOGRAPHS))
        for name, file, phrases, credit in table
    ]
    return [example for example in found if example.path.is_file()]
