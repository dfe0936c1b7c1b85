"""Training by two processes, with gloo on the CPU: the launchers, and what the processes must agree on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from config import PretrainConfig, load_config
from models.kernels.onednn import use_onednn
from models.pretrain import Batch, PretrainModel
from tests.grounding.pictures.test_watch import read_events
from tests.launched import Launched
from tests.training_runs import (
    KEYS,
    LOSSES,
    REPOSITORY,
    arguments,
    left_by_a_run,
    log_rows,
    make_workplace,
    saved,
    step_rows,
)

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone"],
    "torch.distributed.launch": ["torch.distributed.launch", "--use_env", "--standalone"],
}
ALPHA = 0.3
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
# Run by each of two processes. The program's own `Run` does a step; what each process sees of it is saved.
SCRIPT = f"""
import sys
import torch
import Pretrain, utils
from config import PretrainConfig, load_config

def main(args):
    utils.init_distributed(torch.device("cpu"))
    run = Pretrain.Run(args, load_config(args.config, PretrainConfig, args.set), torch.device("cpu"))
    copy = lambda: {{key: value.clone() for key, value in run.model.state_dict().items()}}
    gradients = lambda: {{k: p.grad.clone() for k, p in run.model.named_parameters() if p.grad is not None}}
    batches = [Pretrain.Batch(*batch).to(run.device) for batch, _ in zip(run.loader, range(3))]
    seen = {{"start": copy(), "batch": list(batches[0])}}
    run.parallel.train()
    seen["losses"] = run.backward(batches[0], {ALPHA}, micro=0)
    seen["gradients"] = gradients()
    run.optimizer.step()
    run.optimizer.zero_grad()
    seen["after"] = copy()
    args.accum_steps = 2
    run.backward(batches[1], {ALPHA}, micro=0)
    seen["half"] = gradients()
    run.backward(batches[2], {ALPHA}, micro=1)
    seen["accumulated"] = gradients()
    args.accum_steps = 1
    run.optimizer.zero_grad()
    run.model.load_state_dict(seen["start"])
    run.model.compile_step("eager")
    seen["compiled losses"] = run.backward(batches[0], {ALPHA}, micro=0)
    seen["compiled"] = gradients()
    torch.save(seen, f"{{args.output_dir}}/rank{{utils.rank()}}.pth")

utils.run(main, Pretrain.parse_args())
"""


def launch(launcher: str, *command: str) -> str:
    """Start `command` in two processes; returns what they printed. The port is a free one."""
    line = [sys.executable, "-m", *LAUNCHERS[launcher], "--nproc_per_node", "2", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace without dropout. Do not write into it."""
    folder = make_workplace(tmp_path_factory.mktemp("distributed"))
    bert = json.loads((folder / "bert.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "bert.json").write_text(json.dumps(bert | still))
    return folder


@pytest.mark.parametrize(
    ("launcher", "add_gcam"), [("torchrun", True), ("torch.distributed.launch", False)], ids=lambda value: str(value)
)
def test_training(place: Path, tmp_path: Path, launcher: str, add_gcam: bool) -> None:
    words = [f"add_gcam={add_gcam}", "schedular.epochs=2", "batch_size=4"]
    watched = [] if add_gcam else ["--tensorboard"]
    printed = launch(launcher, "Pretrain.py", *arguments(place, tmp_path, *words, *watched))
    events = {"tensorboard"} if watched else set()
    assert {path.name for path in tmp_path.iterdir()} == left_by_a_run(epochs=2) | events
    entries = len(json.loads((place / "data" / "train_phrases.json").read_text()))
    rows = log_rows(tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["steps"] == (entries + 1) // 2 // 4  # each process has half of the entries
        assert all((row[name] > 0) == (add_gcam or "cam" not in name) for name in LOSSES)
    for line in ("Done.", "epoch 0:", "epoch 1:", f"{entries} entries, {rows[0]['steps']} steps of 4 x 2 samples"):
        assert printed.count(line) == 1  # by rank 0 alone
    assert [(row["epoch"], row["step"]) for row in step_rows(tmp_path)] == [
        (epoch, rows[0]["steps"] - 1) for epoch in (0, 1)
    ]
    for step, row in zip(step_rows(tmp_path), rows, strict=True):  # a line for a whole epoch: of both processes too
        assert all(step[name.removeprefix("train_")] == row[name] for name in (*LOSSES, "train_lr", "train_grad_norm"))
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2
    assert saved(tmp_path, 0)["model"]["queue_ptr_img"].item() == rows[0]["steps"] * 8 % 64
    assert not any(key.startswith("module.") for key in saved(tmp_path, 1)["model"])
    if watched:
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1
        scalars, images = read_events(tmp_path)
        ends = [rows[0]["steps"], 2 * rows[0]["steps"]]
        means = [pytest.approx(row["train_loss_itm"]) for row in rows]  # over both processes
        assert scalars["epochs/loss_itm"] == list(zip(ends, means, strict=True))
        assert len(images) == 4
        assert all([step for step, _ in shown] == [0, ends[1]] for shown in images.values())


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """The first of two processes draws maps, with dropout; of one: tests/grounding/pictures/test_watch.py."""
    place = make_workplace(tmp_path / "place")
    words = ["schedular.epochs=1", "batch_size=4"]
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for output, more in ((plain, []), (watched, ["--tensorboard", "--heat_maps_every", "2"])):
        launched = Launched(place, output, *words, *more, processes=2)
        assert launched.wait() == [0, 0], launched.said()
    _, images = read_events(watched)
    steps = log_rows(plain)[0]["steps"]
    assert all([step for step, _ in shown] == [*range(0, steps, 2), steps] for shown in images.values())
    assert log_rows(watched) == log_rows(plain)
    assert step_rows(watched) == step_rows(plain)
    one, other = saved(watched, 0), saved(plain, 0)
    assert_equal(one["model"], other["model"])
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for key, state in other["optimizer"]["state"].items():
        assert_equal(one["optimizer"]["state"][key], state)


# ---- one step of two processes


# A batch of 2 leaves nothing to draw: each sample has one negative. Half of the words are MLM targets: some always are.
STEP = ["batch_size=2", "momentum=0.9", "mlm_probability=0.5"]


@pytest.fixture(scope="module")
def step(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw of one step."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "step.py").write_text(SCRIPT)
    launch("torchrun", str(folder / "step.py"), *arguments(place, folder, *STEP))
    return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(place: Path, step: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same step on each process's batch, done here by a single process."""
    results = []
    for seen in step:
        model = PretrainModel(load_config(place / "config.yaml", PretrainConfig, STEP))
        model.load_state_dict(seen["start"])
        use_onednn(model)  # as the program does: the comparison is of the processes, not of two products
        losses = model(Batch(*seen["batch"]), ALPHA)
        model.total(losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"losses": losses, "gradients": gradients, "queues": model.state_dict()})
    return results


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_losses_are_those_of_the_own_batch(step: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    first, second = step
    assert not torch.equal(first["batch"][0], second["batch"][0])
    for seen, single in zip(step, alone, strict=True):
        for name, loss in seen["losses"].items():
            torch.testing.assert_close(loss, single["losses"][name].detach())


def test_gradients_are_the_average(step: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    first, second = (single["gradients"] for single in alone)
    average = {name: (first[name] + second[name]) / 2 for name in first}
    for seen in step:
        assert seen["gradients"].keys() == average.keys()
        for name, gradient in average.items():
            torch.testing.assert_close(seen["gradients"][name], gradient, rtol=1e-5, atol=1e-6)
    assert any((first[name] - second[name]).abs().max() > 1e-2 for name in first)  # two gradients that do differ


def test_both_begin_and_end_alike(step: list[dict[str, Any]]) -> None:
    """Student, teacher, queues and temperature; gradients, also those of an accumulated step, averaged once."""
    first, second = step
    for name in ("start", "gradients", "after", "accumulated"):
        assert_equal(first[name], second[name])
    assert not torch.equal(first["half"]["itm_head.weight"], second["half"]["itm_head.weight"])  # not yet exchanged
    moved = {key for key in first["start"] if not torch.equal(first["start"][key], first["after"][key])}
    assert {"image_queue", "text_queue", "temp", "itm_head.weight", "vision_proj.weight"} <= moved


def test_a_compiled_step_is_the_same(step: list[dict[str, Any]]) -> None:
    for seen in step:
        torch.testing.assert_close(seen["compiled losses"], seen["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen["compiled"], seen["gradients"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queue", ["image_queue", "text_queue"])
def test_the_queue_holds_the_features_of_all(
    step: list[dict[str, Any]], alone: list[dict[str, Any]], queue: str
) -> None:
    own = [single["queues"][queue][:, :2] for single in alone]  # what one process alone enqueues
    for seen in step:
        torch.testing.assert_close(seen["after"][queue][:, :4], torch.cat(own, dim=1))  # in the order of ranks
        assert torch.equal(seen["after"][queue][:, 4:], seen["start"][queue][:, 4:])
    assert step[0]["after"]["queue_ptr_img"].item() == step[0]["after"]["queue_ptr_txt"].item() == 4
