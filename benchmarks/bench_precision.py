"""What TF32 and bf16 change: maps and points of the scenes' AMC model, and the gradients of a training step.

    python benchmarks/bench_precision.py            100 scenes of each split, 64 batches of 4
    python benchmarks/bench_precision.py --quick    4 scenes, 2 batches

TF32 is emulated: a GPU that multiplies in it rounds both operands of a product to 10 bits of mantissa and adds up in
float32. So does `Rounded` with every product and convolution, in forward, backward and second backward passes.
"""

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import parser, print_table
from config import GroundingConfig, PretrainConfig, load_config
from dataset.scenes import files as scenes_files
from dataset.scenes.paths import CONFIGS, SHIPPED_AMC
from dataset.text import load_tokenizer
from dataset.vg import Collate, TrainingData
from grounding import metrics
from grounding.maps import ResizedMap
from grounding.questions import Asking, Questions
from models.checkpoint import load_weights, read_checkpoint
from models.pretrain import Batch, PretrainModel
from precision import DTYPES

TF32_BITS = 10
aten = torch.ops.aten
# Operators that multiply -> the positions of their two operands, or in a backward pass, of all three.
PRODUCTS: dict[Any, tuple[int, ...]] = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.convolution: (0, 1),
    aten.convolution_backward: (0, 1, 2),
    torch.ops.mkldnn._linear_pointwise: (0, 1),
}
MULTIPLIES = re.compile(r"mm|mv|dot|conv|attention|(?:^|_)linear")
TRAINING = {  # precision of autocast, bits of float32 operands
    "tf32": ("fp32", TF32_BITS),
    "bf16, AMC in fp32": ("bf16", None),
    "bf16, AMC in tf32": ("bf16", TF32_BITS),
}
LOSSES = {"loss": "all losses", "loss_cam": "the losses on the map"}  # how names begin -> what is shown
LARGE = 0.05  # an error of the gradient, where a maximum has moved to another patch
EVALUATION = {"tf32": ("fp32", TF32_BITS), "bf16": ("bf16", None), "fp16": ("fp16", None)}


class Rounded(TorchDispatchMode):
    """Within it, products of float32 tensors round their operands to `bits` of mantissa, to the nearest, ties to even.

    Raises:
        NotImplementedError: an operator multiplies that is not in `PRODUCTS`.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = PRODUCTS.get(func.overloadpacket, ())
        if not operands and MULTIPLIES.search(func.overloadpacket.__name__):
            raise NotImplementedError(f"{func} multiplies, and its operands are not rounded")
        args = [rounded(value, self.bits) if at in operands else value for at, value in enumerate(args)]
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor, bits: int) -> Tensor:
    """A finite float32 tensor with `bits` bits of mantissa; others as they are."""
    if x.dtype != torch.float32:
        return x
    dropped = 23 - bits
    whole = x.contiguous().view(torch.int32)
    nearest = whole + (2 ** (dropped - 1) - 1) + ((whole >> dropped) & 1)
    return (nearest >> dropped << dropped).view(torch.float32)


def rounding(bits: int | None) -> AbstractContextManager[Any]:
    return Rounded(bits) if bits else nullcontext()


# ---- evaluation


class Maps:
    """RefCOCO+ of generated scenes, and the shipped AMC model's maps of it."""

    def __init__(self, data: Path) -> None:
        keys = {"benchmark": "refcoco+", "image_root": f"{data}/images", "refcoco_data": f"{data}/refer"}
        folder = f"{data}/refer/refcoco+"
        files = f"['{folder}/refcoco+_val.json','{folder}/refcoco+_test.json']"
        keys |= {"det_file": f"{folder}/dets.json", "test_file": files, "matching_file": "[]"}
        overrides = [f"{key}={value}" for key, value in keys.items()]
        self.config = load_config(CONFIGS / "Grounding_refcoco.yaml", GroundingConfig, overrides)
        self.questions = Questions(self.config, Asking(str(CONFIGS), num_workers=0), torch.device("cpu"))
        self.explainer = self.questions.explainer(read_checkpoint(SHIPPED_AMC), SHIPPED_AMC)[0]

    def of(self, name: str, bits: int | None) -> list[Tensor]:
        """The map (h, w) of each expression, the image encoder in a precision, operands of float32 in some bits."""
        questions, explainer = self.questions, self.explainer._replace(precision=name)
        with sdpa_kernel(SDPBackend.MATH), rounding(bits):
            found = questions.answers(explainer.maps, questions.asked, questions.benchmark.resize)
        return list(found.values[found.positions.argsort()])

    def points(self, maps: list[Tensor]) -> list[tuple[int, int]]:
        sizes = [one.size for one in self.questions.expressions]
        return [ResizedMap(cam, *size).point() for cam, size in zip(maps, sizes, strict=True)]

    def accuracy(self, maps: list[Tensor]) -> float:
        """Point accuracy, over all expressions."""
        return float(metrics.score(maps, self.questions.expressions, ["point"])["point"].mean())


def map_errors(exact: list[Tensor], other: list[Tensor]) -> list[float]:
    """By how much maps differ at most, as a share of their maximum."""
    pairs = zip(exact, other, strict=True)
    return [float((a / a.max() - b / b.max()).abs().max()) for a, b in pairs]


# ---- training


class Gradients:
    """Gradients of the shipped AMC model's training losses, without dropout, for batches of generated scenes."""

    def __init__(self, data: Path, batch_size: int) -> None:
        keys = [f"train_file=['{data}/train_phrases.json']", f"image_root={data}/images", f"batch_size={batch_size}"]
        config = load_config(CONFIGS / "Pretrain.yaml", PretrainConfig, keys)
        torch.manual_seed(0)
        self.model = PretrainModel(config).eval()
        load_weights(self.model, read_checkpoint(SHIPPED_AMC)["model"], SHIPPED_AMC)
        self.model.copy_teacher()
        self.queues = {name: buffer.clone() for name, buffer in self.model.named_buffers() if "queue" in name}
        self.data, self.collate = TrainingData(config, seed=1), Collate(load_tokenizer(str(CONFIGS)), config)

    def batches(self, count: int) -> Iterator[Batch]:
        size = self.model.config.batch_size
        for first in range(0, count * size, size):
            yield Batch(*self.collate([self.data[first + row] for row in range(size)])).to(torch.device("cpu"))

    def of(self, batch: Batch, name: str, bits: int | None, losses: str = "loss") -> Tensor:
        """The gradient of the weighted losses whose names begin with `losses`, as one vector.

        Without that of ITC's temperature, which is 0.01 here: it is larger than all others together.
        """
        for buffer, kept in self.queues.items():
            self.model.get_buffer(buffer).copy_(kept)
        self.model.zero_grad()
        torch.manual_seed(2)  # draws the negatives
        dtype = DTYPES[name]
        with sdpa_kernel(SDPBackend.MATH), rounding(bits):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                found = self.model(batch, alpha=0.2, update_teacher=False)
            self.model.total({key: loss * key.startswith(losses) for key, loss in found.items()}).backward()
        self.model.temp.grad = None
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def gradient_error(exact: Tensor, other: Tensor) -> float:
    return float((other - exact).norm() / exact.norm())


# ---- the tables


def compare_maps(maps: Maps, variants: Mapping[str, tuple[str, int | None]]) -> Iterator[list[str]]:
    exact = maps.of("fp32", None)
    points = maps.points(exact)
    yield ["fp32", "0", "0", f"0/{len(points)}", f"{100 * maps.accuracy(exact):.2f}"]
    for label, variant in variants.items():
        found = maps.of(*variant)
        errors = map_errors(exact, found)
        moved = sum(a != b for a, b in zip(points, maps.points(found), strict=True))
        accuracy = f"{100 * maps.accuracy(found):.2f}"
        yield [label, f"{statistics.median(errors):.1e}", f"{max(errors):.1e}", f"{moved}/{len(points)}", accuracy]


def compare_gradients(gradients: Gradients, count: int) -> Iterator[list[str]]:
    batches = list(gradients.batches(count))
    exact = {losses: [gradients.of(batch, "fp32", None, losses) for batch in batches] for losses in LOSSES}
    for label, variant in TRAINING.items():
        row = [label]
        for losses, vectors in exact.items():
            others = (gradients.of(batch, *variant, losses) for batch in batches)
            errors = [gradient_error(a, b) for a, b in zip(vectors, others, strict=True)]
            row.append(f"{statistics.median(errors):.1e}")
        yield [*row, f"{sum(error > LARGE for error in errors)}/{count}"]  # of the last, the losses on the map


def make_scenes(folder: Path, evaluation: int, train: int) -> Path:
    size = load_config(CONFIGS / "Pretrain.yaml", PretrainConfig).image_res
    scenes_files.generate(folder, seed=3, train=train, annotated=train, evaluation=evaluation, size=size)
    return folder


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scenes, batches = (4, 2) if args.quick else (100, 64)
        data = make_scenes(Path(folder), scenes, train=4 * batches)
        heads = ["evaluation", "maps differ by (median)", "at most", "points moved", "point accuracy"]
        print_table(heads, compare_maps(Maps(data), EVALUATION))
        print()
        heads = ["training", *LOSSES.values(), f"of these, batches above {LARGE}"]
        print_table(heads, compare_gradients(Gradients(data, 4), batches))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    main(options.parse_args())
