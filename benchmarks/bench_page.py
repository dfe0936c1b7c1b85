"""The page of `demo.py --web`: seconds from an upload to its picture, and from a phrase to its map, at full size.

    python benchmarks/bench_page.py             on one thread; mode itm, layer 8, random weights
    python benchmarks/bench_page.py --mode itc

What a browser would wait for, without the way there: decoding, the model, the map at the image's size, and the picture
as PNG. An image is encoded for its first phrase alone. Medians of some rounds, each with a picture not yet seen.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import skimage.data
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inputs import scenes_tokenizer
from benchmarks.machine import Clock, describe_machine, parser, print_table
from config import GroundingConfig, load_config
from grounding.load import OpenedModel
from grounding.maps import THRESHOLD
from grounding.web import fragments
from grounding.web.examples import Offer
from grounding.web.session import Answers
from models.albef import build_albef
from models.checkpoint import LoadReport
from models.kernels.onednn import use_onednn

PHOTO_SIZES = ((512, 512), (640, 427), (4000, 3000))
STEPS = ("upload", "first phrase", "new phrase", "another threshold")
MODEL = "random weights"
PAGE_ROUNDS = 5


def open_random(config: GroundingConfig) -> OpenedModel:
    """A model of a config's size with random weights, ready to be asked."""
    torch.manual_seed(0)
    model = build_albef(config).requires_grad_(False).eval()
    use_onednn(model)
    return OpenedModel(model, scenes_tokenizer(), torch.device("cpu"), config, "", LoadReport(MODEL))


def jpeg(size: tuple[int, int], number: int) -> bytes:
    """A photograph of (width, height) pixels, another file for another number."""
    image = Image.fromarray(skimage.data.astronaut()).resize(size)
    image.putpixel((0, 0), (number, 0, 0))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


def page_rows(opened: OpenedModel, mode: str) -> Iterator[list[str]]:
    """One row of the table per image size."""
    for size in PHOTO_SIZES:
        clock = Clock()
        for number in range(PAGE_ROUNDS + 1):
            one_round(Answers([Offer(MODEL, Path())], lambda offer: opened), jpeg(size, number), mode, clock)
        medians = [clock.median(step, skip=1) for step in STEPS]
        yield [f"{size[0]} x {size[1]}", *(f"{seconds:.2f}" for seconds in [*medians, medians[2] / medians[1]])]


def one_round(answers: Answers, content: bytes, mode: str, clock: Clock) -> None:
    """An upload and two phrases, as the page's events ask them."""
    with clock.measure("upload"):
        picture = answers.add_picture(content, "a.jpg")
        fragments.HTML.shown_picture(picture)

    def draw(phrase: str, threshold: float) -> None:
        reply = answers.ask(picture.key, [phrase], MODEL, mode, None)
        fragments.row(picture, phrase, [reply], 0, threshold, "viridis")

    for step, phrase, threshold in (
        ("first phrase", "the red circle on the left", THRESHOLD),
        ("new phrase", "the small blue square", THRESHOLD),
        ("another threshold", "the small blue square", 0.7),
    ):
        with clock.measure(step):
            draw(phrase, threshold)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--mode", choices=("itm", "itc"), default="itm")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model = open_random(load_config("configs/Grounding_refcoco.yaml", GroundingConfig))
    print(describe_machine() + "\n")
    print_table(["seconds", *STEPS, "new / first"], page_rows(model, args.mode))
