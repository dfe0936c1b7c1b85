"""The compiled training step: graphs without a break, captions of a few lengths, and the numbers of the eager step.

Backend "eager" runs PyTorch's own operators on what the compiler has read; "aot_eager" on what it has differentiated,
too; "inductor" makes code of that, and needs a C++ compiler here.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from models import amc
from models.kernels import compiling, onednn
from models.pretrain import Batch, PretrainModel
from models.xbert import KeyValue
from tests.models.plain import IDS, MASK, images
from tests.models.test_training_step import gradients, make_batch, make_model, total
from utils import UserError

TinyConfig = Callable[..., Any]
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
OPEN = {"margin_mean": 2.0, "margin_max": 2.0}  # margins that open every hinge of the losses on the map
pytestmark = pytest.mark.usefixtures("one_thread", "nothing_compiled")
compiles = pytest.mark.skipif(
    torch.__version__ < "2.5", reason="PyTorch 2.4 cannot compile the step: --compile says so"
)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Compiled code is kept by function, so that another test's would count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch_of(tokens: int) -> Batch:
    """The batch of `make_batch`, whose longest text now has so many tokens."""
    batch = make_batch()
    more = torch.zeros(3, tokens - IDS.shape[1], dtype=torch.long)
    words = more.clone()
    words[0] = 9
    return batch._replace(
        input_ids=torch.cat([IDS, words], 1),
        attention_mask=torch.cat([MASK, words.clamp(max=1)], 1),
        mlm_input_ids=torch.cat([batch.mlm_input_ids, words], 1),
        mlm_labels=torch.cat([batch.mlm_labels, more - 100], 1),
    )


def step(model: PretrainModel, batches: list[Batch], autocast: bool = False) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Losses of the micro-batches of one optimizer step, its gradients, and the queue that it leaves."""
    model.zero_grad()
    found = []
    for micro, batch in enumerate(batches):
        torch.manual_seed(micro)  # hard negatives and dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(batch, 0.4 / (micro + 1), update_teacher=micro == 0)
        total(model, losses).backward()
        found.append({name: loss.detach() for name, loss in losses.items()})
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, named, model.image_queue


def same_step(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=rtol * largest)
    torch.testing.assert_close(found[2], expected[2], rtol=rtol, atol=rtol)


@compiles
@pytest.mark.parametrize(
    ("backend", "bert", "config", "lengths", "checkpointing", "autocast"),
    [
        ("aot_eager", DROPOUT, {"amc": OPEN | {"layer": 1}}, [8, 8], True, False),
        ("eager", {}, {"amc": OPEN | {"layer": 1}, "momentum": 0.9}, [5, 7], False, False),
        ("eager", DROPOUT, {"add_gcam": False, "mlm_distill_axis": "vocabulary"}, [8, 8], False, False),
        ("eager", {}, {"amc": OPEN | {"layer": 2}, "mlm_distill_axis": "vocabulary"}, [5, 8], False, True),
    ],
    ids=["dropout, checkpointing", "two lengths", "without AMC", "bf16"],
)
def test_a_compiled_step_equals_the_eager_one(
    tiny_config: TinyConfig,
    backend: str,
    bert: dict[str, float],
    config: dict[str, Any],
    lengths: list[int],
    checkpointing: bool,
    autocast: bool,
) -> None:
    """In two graphs, for all lengths that are padded to one size, and with gradients of two batches added up."""
    eager, compiled = (make_model(tiny_config(bert=bert, **config)) for _ in range(2))
    for model in (eager, compiled):  # so small a map that the 1e-7 of its normalisation counts
        with torch.no_grad():
            model.itm_head.weight.mul_(1e-5)
    names = list(compiled.state_dict())
    graphs = CompileCounterWithBackend(backend)
    compiled.compile_step(graphs)
    compiled.checkpoint_activations(checkpointing)
    batches = [batch_of(length) for length in lengths]
    expected = step(eager, batches, autocast)
    assert expected[0][0]["loss_cam2"] > 0 or "add_gcam" in config
    same_step(step(compiled, batches, autocast), expected, 0.05 if autocast else 1e-5)
    assert graphs.frame_count == 2  # student and teacher read images in the one; all the rest is the other
    assert list(compiled.state_dict()) == names


@compiles
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor's code for the CPU needs a C++ compiler")
def test_inductor_differentiates_a_gradcam(tiny_config: TinyConfig) -> None:
    """What no compiler differentiates from outside: a loss on a map, which is a gradient already."""
    model = make_model(tiny_config(bert={"num_hidden_layers": 2}, amc=OPEN | {"layer": 1}))  # the rest takes minutes
    encoder, batch = model.text_encoder, make_batch()
    with torch.no_grad():
        text, pictures = encoder(IDS, MASK), encoder.image_keys_values(model.visual_encoder(images(3)))

    def losses(text: Tensor, pictures: list[KeyValue]) -> Tensor:
        match = encoder.explain_match(text, MASK, pictures, 1, model.match_logits)
        cam = amc.gradcam(match.attention[..., 1:], match.gradient[..., 1:], MASK, model.grid)
        return sum(amc.map_losses(cam, batch.box_mask, batch.has_box, model.config.amc).values()) + match.logits.sum()

    onednn.use_onednn(model)
    found = []
    for function in (losses, compiling.whole(losses, torch.device("cpu"))):
        gradients(model, function(text, pictures))  # compiles it
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss = function(text, pictures)
            found.append((loss.detach(), gradients(model, loss)))
        counts = {event.key: event.count for event in profiled.key_averages()}
        assert counts["mkldnn::_linear_pointwise"] > 10  # as models/kernels/onednn.py multiplies
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("longest", "sizes"), [(25, [8, 16, 25]), (8, [8]), (6, [6]), (40, [8, 16, 25, 32, 40]), (26, [8, 16, 25, 26])]
)
def test_sizes_end_at_the_longest_caption(longest: int, sizes: list[int]) -> None:
    assert list(compiling.token_sizes(longest)) == sizes


@pytest.mark.parametrize(
    ("tokens", "longest", "targets", "size", "room"),
    [(5, 25, 4, 8, 6), (5, 6, 4, 6, 5), (8, 25, 6, 8, 6), (9, 25, 13, 16, 24), (8, 25, 13, 8, 24), (12, 8, 0, 12, 9)],
)
def test_padding_keeps_words_and_targets(tokens: int, longest: int, targets: int, size: int, room: int) -> None:
    """To as few sizes as possible; the rest of the targets are the first [CLS], whose label is none."""
    labels = torch.full((3, tokens), -100)
    places = [(row, place) for place in range(1, tokens) for row in range(3)][:targets]
    for row, place in places:
        labels[row, place] = 10 * row + place
    where = (labels.flatten() != -100).nonzero()[:, 0]
    batch = batch_of(tokens)._replace(mlm_labels=labels, mlm_targets=where)
    padded = batch.padded(longest)
    for name in ("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels"):
        assert getattr(padded, name).shape == (3, size)
        assert torch.equal(getattr(padded, name)[:, :tokens], getattr(batch, name))
    assert not padded.attention_mask[:, tokens:].any()
    assert padded.mlm_targets is not None
    assert len(padded.mlm_targets) == room
    at = padded.mlm_labels.flatten()[padded.mlm_targets]
    assert torch.equal(at[:targets], labels.flatten()[where])
    assert (at[targets:] == -100).all()


def test_what_cannot_be_compiled_is_an_error() -> None:
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(UserError, match=r"^--compile: PyTorch cannot compile this step; leave the option out: "):
        compiling.whole(breaking, torch.device("cpu"), "eager")(torch.ones(2))
