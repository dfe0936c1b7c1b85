"""scenes_demo.py: which programs it runs, what it shows of them, and the table that it makes of their results."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

import demo
import prepare
import Pretrain
import scenes_demo
from config import GroundingConfig, PretrainConfig, load_config
from dataset.expressions import Expression
from grounding import evaluate
from grounding.benchmarks import BENCHMARKS, FLICKR, REFCOCO_PLUS
from grounding.results import ResultFolder
from utils import UserError

Commands = dict[str, list[str]]
MODELS = ("stage1", "control", "amc")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stands for the programs: name -> the words of each that the demo runs."""
    found: Commands = {}

    def run_step(name: str, words: list[str], *args: object, **more: object) -> None:
        found[name] = words

    monkeypatch.setattr(scenes_demo, "run_step", run_step)
    monkeypatch.setattr(scenes_demo, "report", lambda *args: "| the table |")
    return found


def demonstrate(folder: Path, **options: bool | str) -> None:
    scenes_demo.main(
        argparse.Namespace(**{"all": False, "full": False, "device": "cpu", "output_dir": folder, **options})
    )


def trained(words: list[str]) -> tuple[argparse.Namespace, PretrainConfig]:
    args = Pretrain.parse_args(words[1:])
    return args, load_config(args.config, PretrainConfig, args.set)


def test_the_short_demo(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demonstrate(tmp_path)
    assert list(commands) == ["first_look", "scenes", "control", "amc", *(f"{m}_refcoco" for m in MODELS)]
    assert demo.parse_args(commands["first_look"][1:]).checkpoint == "checkpoints/scenes_amc.safetensors"
    assert Path(commands["first_look"][1]).is_file()
    prepare.parse_args(commands["scenes"][1:])
    for name, amc in (("control", False), ("amc", True)):
        args, config = trained(commands[name])
        assert (args.max_steps, args.checkpoint) == (150, "checkpoints/scenes_stage1.safetensors")
        assert (config.schedular.epochs, config.add_gcam) == (1, amc)
    for name, checkpoint in zip(MODELS, (scenes_demo.SHIPPED, "control", "amc"), strict=True):
        args = evaluate.parse_args(None, commands[f"{name}_refcoco"][1:])
        own = tmp_path / checkpoint / "checkpoint_00.pth" if isinstance(checkpoint, str) else checkpoint
        assert (args.checkpoint, args.output_dir) == (str(own), str(tmp_path / name / "refcoco"))
        assert load_config(*args.config, GroundingConfig, args.set).matching_file == []
    shown = capsys.readouterr().out
    assert set(commands) & set(scenes_demo.TITLES) == {"first_look", "scenes", "control", "amc"}
    assert "| the table |" in shown
    assert (tmp_path / "report.html").as_uri() in shown


@pytest.mark.parametrize("full", [False, True])
def test_the_whole_table(full: bool, commands: Commands, tmp_path: Path) -> None:
    demonstrate(tmp_path, **{"full" if full else "all": True})
    evaluated = [f"{model}_{benchmark}" for model in MODELS for benchmark in ("refcoco", "refclef", "flickr")]
    assert list(commands) == [
        "first_look",
        "scenes",
        *(["stage1", "student"] if full else []),
        "control",
        "amc",
        *evaluated,
    ]
    for name in ("control", "amc"):
        args, config = trained(commands[name])
        assert (args.max_steps, config.schedular.epochs) == (None, 3)
        assert args.checkpoint == str(tmp_path / "stage1" / "student" if full else scenes_demo.SHIPPED)
    for name in ("refcoco", "refclef", "flickr"):
        program, *words = commands[f"amc_{name}"]
        args = evaluate.parse_args(None, words)
        assert (program, args.config) == ("grounding_eval.py", [f"configs/scenes/Grounding_{name}.yaml"])
        assert args.set == []


@pytest.mark.parametrize(("gpus", "batch"), [(1, 32), (2, 16)])
def test_on_gpus(gpus: int, batch: int, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes need two; one has the batches of both."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    demonstrate(tmp_path, device="cuda")
    assert demo.parse_args(commands.pop("first_look")[1:]).device == "cuda"
    for name in ("control", "amc"):
        args, config = trained(commands.pop(name))
        assert (args.device, config.batch_size) == ("cuda", batch)
        assert scenes_demo.shared_out(scenes_demo.CONFIGS / "Pretrain.yaml", "cuda")[0] == gpus
    for name in (f"{model}_refcoco" for model in MODELS):
        assert evaluate.parse_args(None, commands[name][1:]).device == "cuda"


def test_training_goes_on_where_it_stopped(commands: Commands, tmp_path: Path) -> None:
    config, start = Path("configs/scenes/Pretrain.yaml"), ["--checkpoint", "stage1"]
    last = scenes_demo.train(tmp_path, config, start)
    assert last.name == "checkpoint_02.pth"
    assert commands.popitem()[1][-2:] == start
    (tmp_path / "checkpoint_00.pth").touch()
    scenes_demo.train(tmp_path, config, start)
    assert commands.popitem()[1][-1] == "--resume"
    last.touch()
    scenes_demo.train(tmp_path, config, start)
    assert not commands


def test_a_command_and_its_output_go_to_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('output'); print('progress', file=sys.stderr)"
    scenes_demo.run_step("scenes", ["-c", code], tmp_path)
    out, err = capfd.readouterr()
    assert re.fullmatch(r"\n== Draw .* real data sets\n   \d+ s\n", out)
    assert err == "progress\n"
    assert (tmp_path / "scenes.txt").read_text() == f"python -c {code}\noutput\n"


def test_programs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"slow": ["-c", "import time; time.sleep(0.3); print(1)"], "fast": ["-c", "print(2)"]}
    scenes_demo.run_side_by_side(steps, tmp_path)
    assert capsys.readouterr().out == "   slow\n   fast\n"
    assert [(tmp_path / f"{name}.txt").read_text()[-2:] for name in steps] == ["1\n", "2\n"]


def test_a_failing_program_ends_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('why', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="'bad' failed with exit status 3; its message stands above"):
        scenes_demo.run_side_by_side({"bad": ["-c", code]}, tmp_path)
    assert "\nwhy\n" in capsys.readouterr().out


def test_another_benchmark_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the scenes have no config for is passed over; a metric without a number for chance has none."""
    assert list(scenes_demo.scenes_benchmarks()) == ["refcoco", "refclef", "flickr"]
    monkeypatch.setitem(BENCHMARKS, "new", FLICKR._replace(name="New", config="configs/Grounding_new.yaml"))
    assert list(scenes_demo.scenes_benchmarks()) == ["refcoco", "refclef", "flickr"]
    boxes, detections = np.array([[2.0, 1.0, 4.0, 3.0]]), np.array([[2.0, 1.0, 4.0, 3.0], [50.0, 50.0, 9.0, 9.0]])
    one = Expression(Path("a.png"), "a", 0, "val", boxes, detections=detections, annotated_size=(10, 10))
    other = REFCOCO_PLUS._replace(metrics=("box", "new", "point"))
    row = scenes_demo.chance(other, GroundingConfig(image_root=""), [one])["chance"]
    assert {key: value for key, value in row.items() if value is not None} == {
        "RefCOCO+ box val_d": 0.5,
        "RefCOCO+ point val_d": 0.06,
    }


def test_the_table_is_read_from_the_logs(tmp_path: Path) -> None:
    """A row per split, a column per model."""
    folder = ResultFolder(tmp_path)
    folder.write_lines("00", [{"val_d": 0.1}, {"val_d": 0.2}, {"matching_val": 0.3, "matching_val_phrase": 0.4}])
    config = GroundingConfig(image_root="", matching_file=["somewhere/matching_val.json"])
    table: scenes_demo.Table = {"chance": {"matching val": 0.5, "RefCOCO+ box val_d": None}}
    table |= scenes_demo.accuracies(REFCOCO_PLUS, config, {"AMC": folder})
    assert scenes_demo.table_rows(table) == [
        ["", "chance", "AMC"],
        ["matching val", "50.00", "30.00"],
        ["RefCOCO+ box val_d", "-", "10.00"],
        ["RefCOCO+ point val_d", "-", "20.00"],
        ["matching val phrase", "-", "40.00"],
    ]
