"""Peak memory of training and evaluation on a GPU, simulated: no GPU is needed, and none is used.

    python benchmarks/simulate_memory.py            full size: some minutes on one core
    python benchmarks/simulate_memory.py --quick    the small model of the scenes

The program's own steps run on fake tensors (`benchmarks.simulated`), whose storages are counted as PyTorch's allocator
counts blocks. What a kernel needs inside, CUDA's own memory and fragmentation are not in the numbers; whether a card's
memory suffices allows for them: a tenth more, and 0.8 GB, by estimate.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import Pretrain
from benchmarks.bench_train import make_batch
from benchmarks.machine import parser, print_table
from benchmarks.simulated import DEVICE, FakeCUDA, SimulatedRun
from config import GroundingConfig, PretrainConfig, load_config
from dataset.text import Tokens
from grounding.explain import Explainer
from model_sizes import load_bert_config
from models.albef import build_albef

CARDS = (16, 24, 40, 80)  # GiB
GIB, GB = 2**30, 1e9
CHOICES = {"tf32, fp32": "fp32", "bf16": "bf16"}  # tf32 and fp32 keep the same tensors
MODES = {"itm": 8, "itc": 8}  # the layer that is explained
EXPRESSIONS = 7  # an image, as RefCOCO+ has them


def training(folder: Path, sizes: list[int], tokens: int, precision: str, *words: str) -> Iterator[tuple[int, int]]:
    """The bytes held between steps, and the peak of a step, for each batch size; AdamW's moments are there."""
    args = Pretrain.parse_args(["--config", str(folder / "Pretrain.yaml"), "--precision", precision, *words])
    config = load_config(args.config, PretrainConfig)
    vocabulary = load_bert_config(config.bert_config).vocab_size
    batches = [make_batch(size, tokens, config, vocabulary) for size in sizes]
    batches = [batch._replace(image=batch.image.to(torch.uint8)) for batch in batches]  # as they travel
    with FakeCUDA() as cuda:
        run = SimulatedRun(cuda, args, config, batches)
        run.train_epoch(0, 1)  # makes the moments
        for batch in run.loader:
            run.loader = [batch]
            cuda.reset()
            run.train_epoch(0, 1)
            yield cuda.held, cuda.peak


def evaluation(folder: Path, size: int, precision: str, mode: str, layer: int) -> int:
    """The peak of asking about a batch of images."""
    config = load_config(folder / "Grounding_refcoco.yaml", GroundingConfig)
    texts = [f"{expression} of {image}" for image in range(size) for expression in range(EXPRESSIONS)]
    index = [image for image in range(size) for _ in range(EXPRESSIONS)]

    def tokenizer(texts: list[str]) -> Tokens:
        return Tokens(*torch.ones(2, len(texts), 8, dtype=torch.int64))

    with FakeCUDA() as cuda:
        model = cuda.build(lambda: build_albef(config)).requires_grad_(False).eval().to(DEVICE)
        explainer = Explainer(model, tokenizer, DEVICE, mode, layer, precision)  # type: ignore[arg-type]
        explainer.maps(torch.empty(size, 3, config.image_res, config.image_res), index, texts)
    return cuda.peak


def smallest_card(peak: int) -> str:
    """The smallest of the usual cards that a peak fits, in GB as they are sold."""
    needed = 1.1 * peak + 0.8 * GB
    return next((f"{card}" for card in CARDS if needed <= card * GIB), "none")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="the small model of the scenes")
    options.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64], help="samples of a training step")
    options.add_argument("--tokens", type=int, default=14, help="of a caption")
    options.add_argument("--images", type=int, nargs="+", default=[1, 8, 32], help="images of a batch of evaluation")
    args = options.parse_args(argv)
    folder = Path(__file__).parents[1] / "configs" / ("scenes" if args.quick else "")
    print_table(["training", "batch", "GB", "between steps, GB", "smallest card, GB"], training_rows(folder, args))
    print()
    print_table(["evaluation", "images", "GB", "smallest card, GB"], evaluation_rows(folder, args))


def training_rows(folder: Path, args: argparse.Namespace) -> Iterator[list[str]]:
    for name, precision in CHOICES.items():
        for label, words in {name: [], f"{name}, recomputation": ["--grad_checkpointing"]}.items():
            found = training(folder, args.batch, args.tokens, precision, *words)
            for size, (held, peak) in zip(args.batch, found, strict=True):
                yield [label, str(size), f"{peak / GB:.2f}", f"{held / GB:.2f}", smallest_card(peak)]


def evaluation_rows(folder: Path, args: argparse.Namespace) -> Iterator[list[str]]:
    for mode, layer in MODES.items():
        for name, precision in CHOICES.items():
            for size in args.images:
                peak = evaluation(folder, size, precision, mode, 3 if args.quick else layer)
                yield [f"{mode}, {name}", str(size), f"{peak / GB:.2f}", smallest_card(peak)]


if __name__ == "__main__":
    main()
