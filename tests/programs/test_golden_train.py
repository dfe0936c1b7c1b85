"""One full-size training step, and three with the optimizer, against the numbers in golden/train.json and train.npz.

Tolerances are those of golden/README.md: losses 1e-4, gradient norms 1e-3, maps 2e-3 of their maximum.
"""

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from config import PretrainConfig, load_config
from models import amc
from models.checkpoint import load_weights, read_checkpoint
from models.pretrain import Batch, PretrainModel
from optim import create_optimizer, parameter_groups

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
AXES = {"sequence": "mlm_distill_sequence", "vocabulary": "mlm_distill_vocab"}  # ours, and train.json's
LOSSES = ["loss_mlm", "loss_ita", "loss_itm", "loss_cam1", "loss_cam2"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "train.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def golden_arrays() -> dict[str, Tensor]:
    with np.load(GOLDEN / "train.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}


@pytest.fixture(scope="module")
def skeleton() -> PretrainModel:
    """The published model without memory for its weights: shapes and names only."""
    with torch.device("meta"):
        return PretrainModel(load_config(ROOT / "configs" / "Pretrain.yaml", PretrainConfig))


@dataclass
class Step:
    """What is left of a training run when its model is gone. Everything but `losses` belongs to the first step."""

    losses: list[dict[str, float]]  # of each step, and their `total`
    gradients: dict[str, tuple[float, float]]  # norm and sum by parameter
    cam: Tensor
    cam_up: Tensor
    queues: dict[str, Tensor]
    queue_ptr: list[int]
    teacher: dict[str, Tensor]
    weight_sum: dict[str, float]  # after the last step


def training_batch(golden_fixture: ModuleType) -> Batch:
    drawn = {name: torch.from_numpy(array) for name, array in golden_fixture.training_batch(1).items()}
    return Batch(**drawn, has_box=torch.ones(2, dtype=torch.bool))


def train(axis: str, steps: int, names: list[str], batch: Batch, checkpoint: Path) -> Step:
    """Steps of AdamW at the config's 1e-5; `names` are the parameters to look at."""
    config = load_config(ROOT / "configs" / "Pretrain.yaml", PretrainConfig, [f"mlm_distill_axis={axis}"])
    model = PretrainModel(config)
    load_weights(model, read_checkpoint(checkpoint)["model"], checkpoint)
    model.eval()  # which switches off dropout, and nothing else
    optimizer = create_optimizer(config.optimizer, model)
    maps: dict[str, list[Tensor]] = {"normalise_map": [], "resize": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, kept in maps.items():
            patch.setattr(amc, name, recorded(getattr(amc, name), kept))
        losses, first = [], None
        for _ in range(steps):
            named = model(batch, alpha=0.4)
            total = model.total(named)
            total.backward()
            losses.append({name: value.item() for name, value in {**named, "total": total}.items()})
            first = first or look(model, names)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    weight_sum = {name: model.get_parameter(name).detach().double().sum().item() for name in names}
    assert first is not None
    return Step(losses, cam=maps["normalise_map"][0], cam_up=maps["resize"][0], weight_sum=weight_sum, **first)


def recorded(function: Any, kept: list[Tensor]) -> Any:
    def call(*args: Any) -> Tensor:
        out = function(*args)
        kept.append(out.detach().clone())
        return out

    return call


def look(model: PretrainModel, names: list[str]) -> dict[str, Any]:
    """The step's traces in the model, copied, after its backward pass."""
    gradients = {name: cast(Tensor, model.get_parameter(name).grad).double() for name in names}
    teacher = {"vision_proj_m": model.vision_proj_m, "text_m": model.text_encoder_m.layers[3].output.dense}
    return {
        "gradients": {name: (gradient.norm().item(), gradient.sum().item()) for name, gradient in gradients.items()},
        "queues": {name: getattr(model, name)[:, :3].clone() for name in ("image_queue", "text_queue")},
        "queue_ptr": [int(model.queue_ptr_img), int(model.queue_ptr_txt)],
        "teacher": {name: layer.weight[:4, :8].clone() for name, layer in teacher.items()},
    }


@pytest.fixture(scope="module", params=list(AXES))
def step(
    request: pytest.FixtureRequest, golden: dict[str, Any], golden_fixture: ModuleType, golden_checkpoint: Path
) -> Iterator[Step]:
    """Three steps with the release's axis, one with the other; a step needs 11 GB, so one model at a time."""
    names = list(golden[AXES[request.param]]["grad_norm"])
    steps = 3 if request.param == "sequence" else 1
    yield train(request.param, steps, names, training_batch(golden_fixture), golden_checkpoint)
    gc.collect()


@pytest.fixture
def expected(request: pytest.FixtureRequest, golden: dict[str, Any], step: Step) -> dict[str, Any]:
    """train.json's part for this step."""
    return golden[AXES[request.node.callspec.params["step"]]]


# ---- names and shapes


def test_state_dict_has_the_released_keys_shapes_and_types(skeleton: PretrainModel) -> None:
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text(encoding="utf-8"))
    state = skeleton.state_dict()
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == expected


def test_parameter_group_sizes(skeleton: PretrainModel, golden: dict[str, Any]) -> None:
    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    no_decay, decay = ([names[id(p)] for p in group["params"]] for group in parameter_groups(skeleton, 0.02))
    assert (len(no_decay), len(decay)) == (golden["no_decay_count"], golden["decay_count"])
    assert set(golden["no_decay_examples"]) <= set(no_decay)
    assert set(golden["decay_examples"]) <= set(decay)
    trained = [name for name, parameter in skeleton.named_parameters() if parameter.requires_grad]
    assert sorted(no_decay + decay) == sorted(trained)


# ---- the first step


def test_losses(step: Step, expected: dict[str, Any]) -> None:
    assert step.losses[0] == pytest.approx({name: expected[name] for name in (*LOSSES, "total")}, rel=1e-4)


def test_gradients(step: Step, expected: dict[str, Any]) -> None:
    # A sum far below the norm is what is left of entries that cancel: rounding. Those that say something have a
    # hundredth of the norm at least; they see a sign that a norm does not.
    norms, sums = expected["grad_norm"], expected["grad_sum"]
    assert len(norms) == 20
    assert {name: norm for name, (norm, _) in step.gradients.items()} == pytest.approx(norms, rel=1e-3)
    telling = [name for name in norms if abs(sums[name]) > 0.01 * norms[name]]
    assert len(telling) >= 8
    for name in telling:
        assert step.gradients[name][1] == pytest.approx(sums[name], abs=1e-3 * norms[name]), name


def test_maps(step: Step, golden_arrays: dict[str, Tensor]) -> None:
    for found, name in ((step.cam, "cam"), (step.cam_up, "cam_up")):
        truth = golden_arrays[name]
        assert found.shape == truth.shape
        assert ((found - truth).abs() <= 2e-3 * truth.amax(dim=(-2, -1), keepdim=True)).all()


def test_queues(step: Step, golden_arrays: dict[str, Tensor], golden_fixture: ModuleType) -> None:
    assert step.queue_ptr == [2, 2]
    for name, queue in step.queues.items():
        torch.testing.assert_close(queue[:, :2], golden_arrays[f"{name}_head"], rtol=1e-3, atol=1e-4)
        untouched = golden_fixture.tensor(1, name, (256, 65536), "float32")[:, 2]
        assert torch.equal(queue[:, 2], torch.from_numpy(untouched))


def test_teacher(step: Step, golden_arrays: dict[str, Tensor]) -> None:
    for name, weight in step.teacher.items():
        torch.testing.assert_close(weight, golden_arrays[name], rtol=1e-5, atol=1e-6)


# ---- three steps


@pytest.mark.parametrize("step", ["sequence"], indirect=True)
def test_three_steps(step: Step, golden: dict[str, Any]) -> None:
    assert len(step.losses) == len(golden["three_steps_lr1e-5"]) == 3
    for found, truth in zip(step.losses, golden["three_steps_lr1e-5"], strict=True):
        assert list(found) == [*LOSSES, "total"]
        assert list(found.values())[:-1] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("step", ["sequence"], indirect=True)
def test_weights_after_three_steps(step: Step, golden: dict[str, Any], golden_fixture: ModuleType) -> None:
    # What counts is how far the sums of the weights have moved. AdamW moves each weight by about the learning rate, by
    # the sign of its gradient, of whose smallest entries rounding decides: of a sum, a part of what random signs give.
    shapes = json.loads((GOLDEN / "state_dict_keys.json").read_text(encoding="utf-8"))
    for name, after in golden["after_three_steps"].items():
        start = golden_fixture.tensor(1, name, *shapes[name])
        before, random_walk = float(np.sum(start, dtype=np.float64)), 3e-5 * start.size**0.5
        moved, expected = step.weight_sum[name] - before, after - before
        assert moved == pytest.approx(expected, rel=1e-2), name
        assert abs(moved - expected) < random_walk / 500, name
