"""What the benchmarks feed to the programs: synthetic scenes as photographs, their phrases and their vocabulary."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from dataset.scenes.files import vocabulary
from dataset.scenes.language import KINDS, find_phrase, text
from dataset.scenes.world import draw_scene, render
from dataset.text import Tokenizer, load_tokenizer

WIDTH, HEIGHT = 640, 480


def scene(seed: Sequence[int], phrases: int) -> tuple[bytes, list[str], Generator]:
    """A scene as a JPEG of 640 x 480 pixels, so many different phrases of it, and the generator for further draws."""
    rng = np.random.default_rng(seed)
    drawn = draw_scene(rng, 560)
    found: list[str] = []
    while len(found) < phrases:
        spec = find_phrase(drawn, int(rng.integers(len(drawn.things))), KINDS[len(found) % 4], rng)
        phrase = text(spec, rng) if spec else f"the thing {len(found)}"
        found += [phrase] if phrase not in found else []
    jpeg = io.BytesIO()
    Image.fromarray(render(drawn, rng)).resize((WIDTH, HEIGHT)).save(jpeg, "JPEG", quality=92)
    return jpeg.getvalue(), found, rng


def scenes_tokenizer() -> Tokenizer:
    """A tokenizer of the scenes' words; their ids are within BERT's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        return load_tokenizer(folder)
