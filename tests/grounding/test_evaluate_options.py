"""What command line and config ask for: benchmark, checkpoints, options; and what cannot be done, said first."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from config import GroundingConfig, load_config
from dataset.reading import DataError
from grounding import evaluate as program
from grounding.benchmarks import BENCHMARKS, FLICKR, REFCLEF, REFCOCO_PLUS, Benchmark, benchmark_of
from grounding.evaluate import find_checkpoints
from grounding.questions import EvaluationError
from models.checkpoint import CheckpointError
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, evaluate
from utils import UserError

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the benchmark


def test_the_scripts_name_their_benchmarks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("grounding.evaluate.program", lambda *words: called.append(words))
    for name in ("_singlegpu", "_singlegpu_refclef", "_singlegpu_flickr", ""):
        runpy.run_path(f"grounding_eval{name}.py", run_name="__main__")
    assert called == [(REFCOCO_PLUS,), (REFCLEF,), (FLICKR,), ()]


VALUES = {"image_root": "", "test_file": ["x.json"], "refcoco_data": "refer", "det_file": "dets.json"}
REFCOCO = BENCHMARKS["refcoco"]._replace(splits={"val": "val", "testA": "testA", "testB": "testB"})
REFCOCOG, UMD = BENCHMARKS["refcocog"], {"val": "val", "test": "test"}


def asked(script: Benchmark | None, **keys: str) -> Benchmark:
    return benchmark_of(GroundingConfig.model_validate({**VALUES, **keys}), script)


@pytest.mark.parametrize(
    ("script", "keys", "expected"),
    [
        *((benchmark, {}, benchmark) for benchmark in (REFCOCO_PLUS, REFCLEF, FLICKR)),
        # `refer_dataset` is RefCOCO+'s script's alone
        *((benchmark, {"refer_dataset": "refcoco"}, benchmark) for benchmark in (REFCLEF, FLICKR)),
        (REFCOCO_PLUS, {"refer_dataset": "refcoco"}, REFCOCO),
        (REFCOCO_PLUS, {"refer_dataset": "refcocog", "refer_split": "umd"}, REFCOCOG._replace(splits=UMD)),
        (
            REFCOCO_PLUS,
            {"refer_dataset": "refcocog", "refer_split": "google"},
            REFCOCOG._replace(splits={"val": "val"}),
        ),
        *((None, {"benchmark": name}, BENCHMARKS[name]) for name in ("refcoco+", "refclef", "flickr", "own")),
        *((script, {"benchmark": "refcoco"}, REFCOCO) for script in (None, REFCOCO_PLUS)),
        # the published key counts, so that --set refer_dataset=... works with every shipped file
        (None, {"benchmark": "refcoco+", "refer_dataset": "refcoco"}, REFCOCO),
    ],
)
def test_the_benchmark_that_a_config_asks_for(
    script: Benchmark | None, keys: dict[str, str], expected: Benchmark
) -> None:
    assert asked(script, **keys) == expected


@pytest.mark.parametrize(
    ("script", "keys", "message"),
    [
        (None, {}, r"lacks 'benchmark', which says what to evaluate: one of refcoco\+, refcoco, refcocog, refcl"),
        (None, {"benchmark": "RefCOCO"}, r"benchmark is 'RefCOCO', which is none of refcoco\+, refcoco, "),
        (REFCLEF, {"benchmark": "flickr"}, "benchmark is 'flickr', and this script evaluates RefC"),
        (FLICKR, {"benchmark": "own"}, "benchmark is 'own', and this script evaluates Flic"),
        (REFCOCO_PLUS, {"refer_dataset": "refcocog"}, "split by umd and by google, not by unc; correct refer_split"),
        (REFCOCO_PLUS, {"refer_split": "google"}, r"refcoco\+ is split by unc, not by google"),
        (REFCLEF, {"refer_split": "umd"}, "refclef is split by unc and by berkeley, not by umd"),
    ],
)
def test_what_no_benchmark_is(script: Benchmark | None, keys: dict[str, str], message: str) -> None:
    config = GroundingConfig.model_validate({**VALUES, **keys})
    with pytest.raises(UserError, match=message):
        benchmark_of(config, script).load(config)


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("Grounding_*.yaml")), ids=str)
def test_the_shipped_configs_name_their_benchmarks(path: Path) -> None:
    config = load_config(path, GroundingConfig)
    found = benchmark_of(config)
    assert Path(found.config).name == path.name.replace("blip", "refcoco")  # of another model
    assert benchmark_of(GroundingConfig.model_validate(config.model_dump())) == found  # as saved beside the results


def test_the_split_of_refclef(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    values = {**VALUES, "test_file": [str(tmp_path / "x.json")], "refcoco_data": str(tmp_path)}
    with pytest.raises(DataError, match=r"refclef/refs\(berkeley\)\.p: cannot be read"):
        REFCLEF.load(GroundingConfig.model_validate({**values, "refer_split": "berkeley"}))
    (tmp_path / "refclef").mkdir()
    (tmp_path / "refclef" / "refs(berkeley).p").touch()
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: .*, or correct refer_split: there is refs\(berkeley\)\.p"):
        REFCLEF.load(GroundingConfig.model_validate({**values, "refer_split": "unc"}))
    with pytest.raises(DataError, match=r"refs\(berkeley\)\.p: not a readable pickle"):  # where the config is silent
        REFCLEF.load(GroundingConfig.model_validate(values))
    (tmp_path / "refclef" / "refs(unc).p").touch()
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: not a readable pickle"):  # as in the release
        REFCLEF.load(GroundingConfig.model_validate(values))


# ---- options and checkpoints


def test_the_published_command_line_is_accepted() -> None:
    words = "--checkpoint x --gradcam_mode itm --block_num 8 --text_encoder bert-base-uncased --evaluate --device cuda"
    words += " --seed 42 --world_size 1 --dist_url env:// --distributed True"
    args = program.parse_args(REFCOCO_PLUS, words.split())
    assert (args.config, args.block_num, args.distributed) == (["./configs/Grounding_refcoco.yaml"], 8, True)


def test_hidden_files_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint_00.pth", "._checkpoint_00.pth", ".checkpoint_01.pth", ".DS_Store", "notes.txt", "7.pth"):
        (tmp_path / name).touch()
    (tmp_path / "folder.pth").mkdir()
    found = find_checkpoints(str(tmp_path))
    assert {epoch: path.name for epoch, path in found.items()} == {"7": "7.pth", "00": "checkpoint_00.pth"}


@pytest.mark.parametrize("words", [["--num_workers", "-1"], ["--seed", "-1"], ["--seed", "x"], ["--block_num", "x"]])
def test_values_that_options_cannot_have(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        program.parse_args(REFCOCO_PLUS, ["--checkpoint", "x", *words])
    assert left.value.code == 2
    assert f"error: argument {words[0]}:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block_num", "8"], "--block_num 8: the fusion layers are 1 to 2"),
        (["--block_num", "-1"], "--block_num -1: the fusion layers are 1 to 2"),
        (["--gradcam_mode", "itc"], "--block_num 2: the image encoder's blocks are 0 to 1"),
        (["--set", "vision_width=8"], "vision_width is 8 but bert_config has encoder_width 16"),
        (["--set", "image_res=50"], "image_res"),
    ],
)
def test_what_can_be_known_is_said_first(words: list[str], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(REFCOCO_PLUS, place, tmp_path / "out", *words, checkpoint=ONE)
    assert not (tmp_path / "out").exists()


def test_matching_files_called_alike(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(place / "data" / "matching_val.json", tmp_path))
    files = f"{place / 'data' / 'matching_val.json'},{other}"
    with pytest.raises(EvaluationError, match="called alike; rename one"):
        evaluate(REFCLEF, place, tmp_path / "out", "--set", f"matching_file=[{files}]", checkpoint=ONE)


def test_clear_messages_before_anything_is_computed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such file or folder"):
        evaluate(REFCOCO_PLUS, place, tmp_path, checkpoint="nowhere.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"holds no \*\.pth"):
        find_checkpoints(str(tmp_path / "empty"))
    for name in ("a_00.pth", "b_00.pth"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(EvaluationError, match=r"a_00\.pth and b_00\.pth end alike"):
        find_checkpoints(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"does not fit.*\n.*vision_proj\.weight is \[8, 16\]"):
        evaluate(REFCOCO_PLUS, place, tmp_path, "--set", "embed_dim=4", checkpoint=ONE)
    with pytest.raises(Exception, match="lacks 'det_file'"):
        evaluate(REFCOCO_PLUS, place, tmp_path, "--set", "det_file=", checkpoint=ONE)


def test_the_program_prints_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--checkpoint", "nowhere.pth"])
    with pytest.raises(SystemExit, match=r"^error: --checkpoint nowhere\.pth: no such file or folder"):
        program.program(REFCOCO_PLUS)
