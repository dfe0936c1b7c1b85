"""Evaluation shared out over processes: tensors and files equal those of one, scoring is shared, a failure ends all."""

import json
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import utils
from config import GroundingConfig, load_config
from dataset.expressions import Expression
from grounding import metrics
from grounding.benchmarks import REFCOCO_PLUS
from grounding.evaluate import evaluate, parse_args
from grounding.maps import ResizedMap
from tests.grounding import test_evaluate as base
from tests.launched import SERVER

place = base.place
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def process(main: Callable[..., None], environment: dict[str, str], printed: Path, *args: Any) -> None:
    """Run `main` as a program in a process of a group."""
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    with open(1, "a", closefd=False) as sys.stdout, open(2, "a", closefd=False) as sys.stderr:
        torch.set_num_threads(1)
        utils.run(lambda _: main(*args), parse_args(None, ["--config", "", "--checkpoint", ""]))


def launch(count: int, printed: Path, main: Callable[..., None], *args: Any) -> tuple[list[int | None], str]:
    """Run `main(*args)` in `count` processes of a group: their exit statuses, and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    environments = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes: list[BaseProcess] = [
        SERVER.Process(target=process, args=(main, each, printed, *args)) for each in environments
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    return [each.exitcode for each in processes], printed.read_text()


# ---- rows of tensors


def exchange(folder: Path) -> None:
    utils.init_distributed(torch.device("cpu"))
    own, sent = utils.rank(), []
    gather = dist.all_gather_object
    dist.all_gather_object = lambda items, item, group: [sent.append(item), gather(items, item, group)]
    whole = torch.arange(60, dtype=torch.float64).view(2, 5, 6)
    counts = {"uneven": (2, 0, 1), "first has none": (0, 2, 3), "none": (0, 0, 0)}
    found = {}
    for name, count in counts.items():
        rows = 100 * own + whole.permute(1, 2, 0)[: count[own]]  # (n, 6, 2), not contiguous
        found[name] = utils.rows_on_rank_0(rows if len(rows) else torch.empty(0, dtype=torch.float64))
    torch.save((found, sent), folder / f"{own}.pth")


def test_rows_of_all_processes_are_on_rank_0(tmp_path: Path) -> None:
    statuses, printed = launch(3, tmp_path / "printed", exchange, tmp_path)
    assert statuses == [0, 0, 0], printed
    (first, sent), (second, _), _ = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(3))
    rows = torch.arange(60, dtype=torch.float64).view(2, 5, 6).permute(1, 2, 0)
    assert torch.equal(first["uneven"], torch.cat([rows[:2], 200 + rows[:1]]))
    assert torch.equal(first["first has none"], torch.cat([100 + rows[:2], 200 + rows[:3]]))
    assert len(first["none"]) == 0
    assert torch.equal(second["first has none"], 100 + rows[:2])
    assert sent == [(2, 6, 2), (0,), (0,)]  # sizes alone travel as objects


# ---- the program


def words(place: Path, output: Path) -> list[str]:
    line = ["--config", str(place / "refcoco.yaml"), "--checkpoint", str(place / "ckpt" / "checkpoint_01.pth")]
    line += ["--output_dir", str(output), "--text_encoder", str(place / "data" / "text_encoder"), "--device", "cpu"]
    return [
        *line,
        "--num_workers",
        "0",
        "--set",
        f"matching_file=[{place}/data/matching_val.json]",
        "--set",
        "batch_size=8",
    ]


def watched(line: list[str], folder: Path, fails: str | None) -> None:
    """Evaluate; write down what this process scores. The metric point fails on an expression of one process."""
    scored: list[Any] = []
    point = metrics.METRICS["point"]

    def watch(cam: ResizedMap, expression: Expression) -> float:
        scored.append(expression.ref_id)
        if expression.image.name == fails:
            raise metrics.MetricError(f"no point in {fails}")
        return point.measure(cam, expression) + float(cam.pixels.sum()) * 1e-7  # counts every bit of the map

    metrics.METRICS["point"] = point._replace(measure=watch)
    evaluate(REFCOCO_PLUS, parse_args(REFCOCO_PLUS, line))
    (folder / f"scored_{utils.rank()}.json").write_text(json.dumps(scored))


def scored(folder: Path, count: int) -> list[list[int]]:
    """What each process has scored."""
    return [json.loads((folder / f"scored_{rank}.json").read_text()) for rank in range(count)]


def written(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "result").iterdir()}


def test_three_processes_write_the_files_of_one_and_share_its_scoring(place: Path, tmp_path: Path) -> None:
    """The 15 images are two batches: the last process has none."""
    one, three = tmp_path / "one", tmp_path / "three"
    statuses, printed = launch(1, tmp_path / "printed_1", watched, words(place, one), tmp_path, None)
    assert statuses == [0], printed
    (whole,) = scored(tmp_path, 1)
    statuses, printed = launch(3, tmp_path / "printed_3", watched, words(place, three), tmp_path, None)
    assert statuses == [0, 0, 0], printed
    assert written(three) == written(one)
    first, second, third = scored(tmp_path, 3)
    assert sorted(first + second) == sorted(whole)
    assert len(first) > len(second) > len(whole) // 3
    assert third == []

    (three / "result" / "log.txt").unlink()  # as if interrupted before its metrics: rank 0 scores what it reads
    statuses, printed = launch(3, tmp_path / "printed_again", watched, words(place, three), tmp_path, None)
    assert statuses == [0, 0, 0], printed
    assert written(three) == written(one)
    assert scored(tmp_path, 3) == [whole, [], []]


def test_an_error_in_the_share_of_one_ends_all(place: Path, tmp_path: Path) -> None:
    expressions = REFCOCO_PLUS.load(load_config(place / "refcoco.yaml", GroundingConfig))
    fails = expressions[-1].image.name  # in the second batch, which falls to process 1
    statuses, printed = launch(3, tmp_path / "printed", watched, words(place, tmp_path / "out"), tmp_path, fails)
    assert statuses == [1, 1, 1]
    assert printed.count(f"error: no point in {fails}") == 1, printed
    assert "process 1 of 3" in printed
    assert "Traceback" not in printed
    assert (tmp_path / "out" / "result" / "epoch00.pth").exists()  # its maps need not be computed again
    assert not (tmp_path / "out" / "result" / "log.txt").exists()
