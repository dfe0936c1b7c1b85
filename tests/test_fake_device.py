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
import utils
from benchmarks.simulated import DEVICE, FakeCUDA, Memory, SimulatedRun
from config import GroundingConfig, PretrainConfig, load_config
from grounding.explain import Explainer
from models import amc
from models.albef import ALBEF, build_albef
from models.pretrain import Batch
from models.xbert import TextEncoder
from tests.grounding import test_explain as base
from tests.training_runs import arguments, make_workplace, ready

explainer = base.explainer
pytestmark = pytest.mark.usefixtures("one_thread")
MOVED = {torch.uint8, torch.int64, torch.bool}  # a batch's own
INSIDE = {torch.int32, torch.uint64}  # indices, and what fused attention keeps of its random numbers


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
@pytest.mark.parametrize("precision", utils.PRECISIONS)
def test_training_step(place: Path, batches: list[Batch], precision: str, add_gcam: bool, checkpointing: bool) -> None:
    words = ["--precision", precision, f"add_gcam={add_gcam}"]
    words += ["--grad_checkpointing"] if checkpointing else ["--grad_clip", "1", "mlm_distill_axis=vocabulary"]
    cuda, run, seen = train(place, batches[:1], *words)
    dtype, full = utils.PRECISIONS[precision], {torch.float32}
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


def test_a_step_of_two_batches(place: Path, batches: list[Batch]) -> None:
    cuda, run, seen = train(place, batches, "--accum_steps", "2", "--precision", "bf16")
    assert run.log.recent.counts == dict.fromkeys(run.log.recent.counts, 2) | {"lr": 1, "grad_norm": 1}
    assert cuda.waits == 0


# ---- evaluation


def evaluate(explainer: Explainer, precision: str, mode: str, block: int, question: str) -> tuple[FakeCUDA, Tensor]:
    """The answers about two images, three texts each."""
    config = base.config_of(explainer)
    with FakeCUDA() as cuda:
        model: Any = cuda.build(lambda: build_albef(config)).requires_grad_(False).eval().to(DEVICE)
        asked = explainer._replace(
            model=model, device=DEVICE, mode=mode, block=block, precision=utils.PRECISIONS[precision]
        )
        images = torch.empty(2, 3, model.image_res, model.image_res)
        answers = getattr(asked, question)(images, [0, 0, 0, 1, 1, 1], ["a red star", "circle", "red"] * 2)
    return cuda, answers
