"""Training and evaluation on a CUDA device that is not there (`benchmarks.simulated`): devices, dtypes, no waiting."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import Pretrain
from benchmarks import simulate_memory
from benchmarks.simulated import DEVICE, FakeCUDA, Memory, SimulatedRun
from config import GroundingConfig, PretrainConfig, load_config
from dataset.text import load_tokenizer
from grounding.explain import Explainer
from models import amc
from models.albef import build_albef
from models.pretrain import Batch
from models.xbert import TextEncoder
from precision import DTYPES
from tests.small_model import SIZES
from tests.training_runs import arguments, make_workplace, ready

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.__version__ < "2.5", reason="fake tensors of PyTorch 2.4 ask for a real GPU"),
]
MOVED = {torch.uint8, torch.int64}  # a batch's own, beside masks
PRECISIONS = ["fp32", "bf16", "fp16"]  # tf32 is the flags of fp32, which change no tensor
INSIDE = {torch.int32, torch.uint64, torch.bool}  # indices, masks, and what fused attention keeps of random numbers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def batches(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """What the loader of a run gives, on the CPU."""
    run = ready(place, tmp_path_factory.mktemp("real"))
    return [Batch(*batch) for batch in itertools.islice(run.loader, 2)]


class Seen:
    """The dtypes of what one run computes, by name."""

    def __init__(self) -> None:
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def wrap(self, owner: object, name: str) -> Any:
        """A patch of a function that notes its arguments, all of them, and its result."""
        function = getattr(owner, name)

        def noting(*args: Any, **keys: Any) -> Any:
            result = function(*args, **keys)
            for way, values in (("into", (args, keys)), ("out of", result)):
                for value in tree_leaves(values):
                    if isinstance(value, Tensor) and value.is_floating_point():
                        assert value.device == DEVICE, f"{way} {name}"
                        self.dtypes.setdefault(f"{way} {name}", set()).add(value.dtype)
            return result

        return mock.patch.object(owner, name, noting)


def train(place: Path, batches: list[Batch], *words: str) -> tuple[FakeCUDA, SimulatedRun, Seen]:
    """One epoch of training steps, by the program's own loop."""
    args = Pretrain.parse_args(arguments(place, place / "none", *words))
    config, seen, cuda = load_config(args.config, PretrainConfig, args.set), Seen(), FakeCUDA()
    watched = [(amc, "gradcam"), (amc, "map_losses"), (SimulatedRun, "backward"), (TextEncoder, "image_keys_values")]
    with cuda, contextlib.ExitStack() as stack:
        for owner, name in watched:
            stack.enter_context(seen.wrap(owner, name))
        run = SimulatedRun(cuda, args, config, batches)
        run.train()
    return cuda, run, seen


def state_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("add_gcam", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_step(place: Path, batches: list[Batch], precision: str, add_gcam: bool, checkpointing: bool) -> None:
    words = ["--precision", precision, f"add_gcam={add_gcam}"]
    words += ["--grad_checkpointing"] if checkpointing else ["--grad_clip", "1", "mlm_distill_axis=vocabulary"]
    cuda, run, seen = train(place, batches[:1], *words)
    dtype, full = DTYPES[precision], {torch.float32}
    assert seen.dtypes["out of image_keys_values"] == {dtype}  # of student and teacher
    assert seen.dtypes["out of backward"] == full  # the losses
    assert ("into gradcam" in seen.dtypes) == add_gcam
    if add_gcam:
        names = ("into gradcam", "out of gradcam", "into map_losses", "out of map_losses")
        assert all(seen.dtypes[name] == full for name in names)
    assert cuda.dtypes - INSIDE == MOVED | {torch.float32, dtype}  # no float64
    assert cuda.waits == (1 if precision == "fp16" else 0)  # fp16: was the step skipped?
    logged = run.log.recent.sums
    assert logged.pop("lr").device.type == "cpu"
    tensors = [*run.model.state_dict().values(), *state_of(run.optimizer), *logged.values()]
    assert {tensor.device for tensor in tensors} == {DEVICE}
    assert {value.dtype for value in (*run.model.parameters(), *state_of(run.optimizer))} == full
    assert len(run.optimizer.state) == sum(p.requires_grad for p in run.model.parameters())


# ---- evaluation


QUESTIONS = [
    ("itm", 1, "maps"),
    ("itm", 1, "match_probabilities"),
    ("itc", 0, "maps"),
    ("itm", 2, "encode"),
    ("itc", 1, "encode"),
]
INDEX, TEXTS = [0, 0, 1], ["the red star", "circle", "red"]


@pytest.mark.parametrize(("mode", "block", "question"), QUESTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation(place: Path, precision: str, mode: str, block: int, question: str) -> None:
    """Two images, encoded for one question; and one image, encoded for any, as the page and `ground` do."""
    keys = {**SIZES, "bert_config": str(place / "bert.json"), "vision_width": 32, "image_root": ""}
    config, tokenizer = GroundingConfig.model_validate(keys), load_tokenizer(str(place / "data" / "text_encoder"))
    seen, dtype, full = Seen(), DTYPES[precision], {torch.float32}
    with FakeCUDA() as cuda, seen.wrap(amc, "gradcam"), seen.wrap(TextEncoder, "image_keys_values"):
        model = cuda.build(lambda: build_albef(config)).requires_grad_(False).eval().to(DEVICE)
        explainer = Explainer(model, tokenizer, DEVICE, mode, block, precision)
        images = torch.empty(2, 3, 48, 48)
        if question == "encode":
            encoded = explainer.encode(images[:1])
            ((_, tokens),) = explainer.chunks(TEXTS)
            found = model.explain(encoded, None, tokens, mode, block).maps.cpu()
            assert model.match(encoded, None, tokens).dtype == torch.float32
        else:
            found = getattr(explainer, question)(images, INDEX, TEXTS)
    assert (found.device.type, found.dtype) == ("cpu", torch.float32)
    assert found.shape == ((3,) if question == "match_probabilities" else (3, 3, 3))
    assert all(dtypes == full for dtypes in seen.dtypes.values())
    assert cuda.dtypes - INSIDE == {torch.int64, torch.float32, dtype}
    assert cuda.waits == 0


# ---- the device itself


FAULTS = {
    "another device": (lambda x: x @ torch.ones(4, 4), RuntimeError),
    "a number": (lambda x: float(x.sum()), DataDependentOutputException),
    "a size": (lambda x: x.nonzero(), DynamicOutputShapeException),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    cause, error = FAULTS[fault]
    with FakeCUDA(), pytest.raises(error):
        cause(torch.ones(4, 4, device="cuda"))
    with FakeCUDA() as cuda:
        assert torch.ones(4, device="cuda").all()
    assert cuda.waits == 1


def test_gradients_are_pytorchs() -> None:
    """Of autocast layers, twice differentiated: shapes and dtypes of the CPU, and parameters that share memory."""

    def gradients(device: str) -> list[tuple[Any, ...]]:
        layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        layer[2].weight = layer[0].weight
        layer.to(torch.device(device))
        with torch.autocast(device, torch.bfloat16):
            tokens = layer(torch.ones(2, 4, device=device))
        (first,) = torch.autograd.grad(tokens.float().exp().sum(), tokens, create_graph=True)
        first.float().square().sum().backward()
        assert layer[2].weight is layer[0].weight
        return [(tokens.dtype, first.dtype), *((p.grad.shape, p.grad.dtype) for p in layer.parameters())]

    with FakeCUDA():
        fake = gradients("cuda")
    assert fake == gradients("cpu")
    assert fake[0] == (torch.bfloat16, torch.bfloat16)


def test_memory_follows_storages() -> None:
    """On real tensors; kilobytes are whole blocks of the allocator."""
    with Memory("cpu") as memory:
        kept = torch.zeros(1024)
        view = kept.view(32, 32).t()
        view.exp_().sum()
        assert (memory.held, memory.peak) == (4096, 4096 + 512)
        summed = (kept.exp() + kept.double()).sum()
        assert (memory.held, memory.peak) == (4096 + 512, 4 * 1024 * (1 + 1 + 2 + 2))
        memory.reset()
        del kept
        assert memory.held == 4096 + 512  # by the view
        del view, summed
        assert (memory.held, memory.peak) == (0, 4096 + 512)
    assert memory.dtypes == {torch.float32, torch.float64}


@pytest.mark.parametrize("words", [[], ["--grad_checkpointing"]])
def test_simulated_memory_is_that_of_real_tensors(
    place: Path, batches: list[Batch], tmp_path: Path, words: list[str]
) -> None:
    """A whole step on the CPU, counted alike. What differs is what the CPU's kernels of attention keep."""
    with Memory("cpu") as real:
        run = ready(place, tmp_path, *words)
        run.loader = [tuple(batches[0])]  # type: ignore[assignment]
        run.log.is_due = lambda step: False  # type: ignore[method-assign]
        run.train_epoch(0, 1)
    simulated = train(place, batches[:1], "--precision", "fp32", *words)
    cuda = simulated[0]
    assert cuda.peak == pytest.approx(real.peak, rel=0.1)
    assert cuda.held == pytest.approx(real.held, rel=0.1)


def test_memory_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_memory, "CHOICES", {"bf16": "bf16"})
    simulate_memory.main(["--quick", "--batch", "16", "--images", "1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (kept, recomputed), evaluation = rows[2:4], rows[7:]
    assert (kept[:2], recomputed[:2]) == (["bf16", "16"], ["bf16, recomputation", "16"])
    assert [row[:2] for row in evaluation] == [["itm, bf16", "1"], ["itc, bf16", "1"]]
    assert kept[3] == recomputed[3]  # between steps
    assert float(kept[2]) > float(recomputed[2]) > float(kept[3])


@pytest.mark.parametrize(("peak", "card"), [(10e9, "16"), (14.8e9, "16"), (15.0e9, "24"), (77e9, "80"), (78e9, "none")])
def test_smallest_card(peak: float, card: str) -> None:
    assert simulate_memory.smallest_card(int(peak)) == card
