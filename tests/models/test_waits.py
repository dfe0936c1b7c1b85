"""A training step does not wait for its device, and asks it for no more than it needs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import published
from benchmarks.counts import Counts
from dataset.transforms import _levels
from models import losses
from models.pretrain import STUDENT_AND_TEACHER, Batch, Encoders, PretrainModel
from tests.models.plain import IDS, MASK, images
from tests.models.test_training_step import make_batch, make_model
from tests.training_runs import make_workplace, ready
from training.log import TrainingLog

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")
# What PyTorch's profiler calls a number or a count that the host reads, also within operators.
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.mark.parametrize("axis", ["sequence", "vocabulary"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("add_gcam=false", "--precision", "bf16", "--grad_clip", "1"),
        ("selfeq.weight_similarity=1", "train_file=[PLACE/data/train_relations.json]"),
    ],
)
def test_a_step_reads_nothing_from_the_device(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str, words: tuple[str, ...]
) -> None:
    """A whole step of the program, of two batches, while no line of the log is due."""
    words = tuple(word.replace("PLACE", str(place)) for word in words)
    run = ready(place, tmp_path, f"mlm_distill_axis={axis}", "batch_size=3", "--accum_steps", "2", *words)
    batches = [batch for batch, _ in zip(run.loader, range(2), strict=False)]  # the loader's work is no part of a step
    run.loader = batches  # type: ignore[assignment]
    _levels(run.device)  # made once
    monkeypatch.setattr(TrainingLog, "is_due", lambda *_: False)
    with Counts() as counts:
        run.train_epoch(0, 1)
    assert not counts.waits
    assert counts.launches["_fused_adamw_"] == 2  # of two groups of weights
    # Without AdamW, whose kernel for CPUs reads its count of steps where it lies.
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run.log.add(run.backward(Batch(*batches[0]).to(run.device), 0.4, micro=0))
        run.log.add_gradient_norm(run.clip_gradients())
    assert not [event.key for event in profiled.key_averages() if event.key in READS]
    with Counts() as counts:
        run.log.recent.means()
    assert counts.waits.total() == len(run.log.recent.sums)  # a line of the log does


def test_teacher_rounds_its_weights_once_a_step(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast rounds them, to the bit, after each change of the weights; and they are no part of the checkpoint."""
    results, casts = [], []
    for rounded in (True, False):
        model = make_model(tiny_config(momentum=0.5))
        state = {key: value + 0.1 for key, value in model.state_dict().items()}
        if not rounded:
            monkeypatch.setattr(PretrainModel, "_teacher_parts", lambda self, _: exact(self))
        for step in range(5):
            if step == 2:
                model.load_state_dict(state)
            if step == 3:
                model.copy_teacher()
            torch.manual_seed(1)  # the hard negatives
            with Counts() as counts, torch.autocast("cpu", torch.bfloat16):
                results.append(model(make_batch(), alpha=0.4, update_teacher=step in (0, 1, 4)))
        casts.append(counts.launches["_to_copy"])
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            parts = model._teacher_parts("cpu")
        assert not any(module.training for part in parts for module in part.modules())
        assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(results[:5], results[5:], rtol=0, atol=0)
    assert results[0]["loss_ita"] != results[1]["loss_ita"] != results[4]["loss_ita"]
    assert casts[1] - casts[0] == sum(1 for part in exact(model) for _ in rounded_weights(part))


def exact(model: PretrainModel) -> Encoders:
    return Encoders(*(getattr(model, f"{name}_m") for name in STUDENT_AND_TEACHER))


def rounded_weights(part: nn.Module) -> Iterator[nn.Parameter]:
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield from module.parameters()


# ---- negatives

SIZES = [2, 3, 4, 7, 8, 31, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_drawn_as_multinomial_draws_them(dtype: torch.dtype) -> None:
    """The same ones, and the same random numbers afterwards; a row that was NaN has equal weights."""
    for seed in range(40):
        for size in SIZES:
            generator = torch.Generator().manual_seed(seed)
            scores = 10 * torch.randn(size, size, generator=generator, dtype=dtype)
            scores[seed % size] = torch.nan if seed % 3 == 0 else 1e4 if seed % 3 == 1 else 0.0
            weights = scores.fill_diagonal_(-torch.inf).softmax(dim=1).nan_to_num(nan=1.0)
            torch.manual_seed(seed)
            expected = torch.multinomial(weights, 1)[:, 0], torch.rand(3)
            torch.manual_seed(seed)
            found = losses.draw_columns(weights), torch.rand(3)
            assert all(map(torch.equal, found, expected)), (seed, size)


# ---- keys and values


@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_images_are_not_copied(tiny_config: TinyConfig, checkpointing: bool) -> None:
    """Texts after those of `image_index` look at their own images, as if these were in the index."""
    model = make_model(tiny_config())
    encoder = model.text_encoder
    encoder.checkpoint_activations = checkpointing
    tokens = model.visual_encoder(images(3)).detach().requires_grad_()
    text, mask = encoder(IDS, MASK).detach(), MASK.repeat(2, 1)
    results, copied = [], []
    for index in (torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2, 0, 1, 2])):
        with Counts() as counts:
            fused = encoder.fuse(text.repeat(2, 1, 1), mask, encoder.image_keys_values(tokens), index, cls_only=True)
        (gradient,) = torch.autograd.grad(fused.tokens.square().sum(), tokens)
        results.append((fused.tokens, gradient))
        copied.append(counts.written["index_select"])
    torch.testing.assert_close(results[1], results[0])
    assert copied[1] == 2 * copied[0]


@pytest.mark.parametrize("axis", ["sequence", "vocabulary"])
def test_what_is_shared_changes_no_loss(tiny_config: TinyConfig, axis: str) -> None:
    """One pass for both texts, targets alone, no copies: within 1e-6 of each pass by itself."""
    found = []
    for losses_of in (published.training_losses, lambda model, *args: model(*args)):
        model = make_model(tiny_config(mlm_distill_axis=axis))
        torch.manual_seed(1)  # the hard negatives
        found.append({name: value.detach() for name, value in losses_of(model, make_batch(), 0.4).items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
