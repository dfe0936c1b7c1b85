"""Several configs in one command, such as those of RefCOCO, RefCOCO+ and RefCOCOg: each as if it were alone."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.reading import DataError
from grounding import evaluate as program
from grounding import questions
from grounding.questions import EvaluationError
from grounding.report import write
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, log, results, write_config

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")
REFER = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # whose split


@pytest.fixture(scope="module")
def configs(place: Path) -> dict[str, Path]:
    """A config for each of REFER's three sets, made of the scenes' RefCOCO+; and one whose images are smaller."""
    keys: dict[str, Any] = json.loads((place / "refcoco.yaml").read_text())
    folder = Path(keys["refcoco_data"])
    refs = pickle.loads((folder / "refcoco+" / "refs(unc).p").read_bytes())  # our own file
    found = {}
    for name, split_by in REFER.items():
        if name != "refcoco+":
            (folder / name).mkdir()
            shutil.copy(folder / "refcoco+" / "instances.json", folder / name)
            known = {"testA": "test", "testB": "test"} if split_by == "umd" else {}
            own = [{**ref, "split": known.get(ref["split"], ref["split"])} for ref in refs]
            (folder / name / f"refs({split_by}).p").write_bytes(pickle.dumps(own))
        found[name] = place / f"{name}.yaml"
        write_config(found[name], {**keys, "benchmark": name, "refer_split": split_by})
    found["small"] = place / "small.yaml"
    write_config(found["small"], {**keys, "benchmark": "refcoco+", "image_res": 32})
    return found


@pytest.fixture
def evaluate(place: Path, tmp_path: Path) -> Callable[..., Path]:
    """grounding_eval.py with configs to a folder of a name."""

    def run(name: str, *words: str | Path, checkpoint: str = "ckpt") -> Path:
        line = ["--config", *map(str, words), "--checkpoint", str(place / checkpoint), "--device", "cpu"]
        line += ["--text_encoder", str(place / "data" / "text_encoder"), "--num_workers", "0"]
        program.evaluate(None, program.parse_args(None, [*line, "--output_dir", str(tmp_path / name)]))
        return tmp_path / name

    return run


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The image size of each model that is built."""
    found: list[int] = []
    build = questions.build_model
    monkeypatch.setattr(questions, "build_model", lambda config: found.append(config.image_res) or build(config))
    return found


def test_all_three_sets_of_refer(
    configs: dict[str, Path], evaluate: Callable[..., Path], builds: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each result is that of the config alone; one model a checkpoint and image size; one table at the end."""
    out = evaluate("all", *configs.values())
    assert builds == [48, 32] * 3
    printed = capsys.readouterr().out
    for name, config in configs.items():
        alone = evaluate("alone", config, checkpoint=ONE)
        assert [line for line in log(out / name) if line["epoch"] == "01"] == [
            {**line, "epoch": "01"} for line in log(alone)
        ]
        pairs = zip(results(out / name, "01"), results(alone), strict=True)
        assert all(one["ref_id"] == other["ref_id"] and torch.equal(one["pred"], other["pred"]) for one, other in pairs)
        assert (out / name / "config.yaml").read_bytes() == (alone / "config.yaml").read_bytes()
        run = json.loads((out / name / "run.json").read_text())
        assert (run["options"]["config"], run["options"]["output_dir"]) == (str(config), str(out / name))
        shutil.rmtree(alone)
    assert not (out / "result").exists()
    table = printed[printed.index("results ") :].splitlines()
    assert table[0].split() == ["results", "epoch", "metric", "val", "testA", "testB", "test"]
    assert len(table) == 1 + 4 * 3 * 2 + 1
    assert table[-1] == "in %"
    rows = {tuple(row[:3]): row[3:] for row in map(str.split, table[1:-1])}
    for name in REFER:
        for metric, line in zip(
            ("box", "point"), (one for one in log(out / name) if one["epoch"] == "02"), strict=True
        ):
            values = {re.sub("_d$", "", key): f"{100 * value:.2f}" for key, value in line.items() if key != "epoch"}
            assert rows[name, "02", metric] == [values.get(split, "-") for split in table[0].split()[3:]]
    assert rows["refcocog", "00", "point"][1:3] == ["-", "-"]


def test_only_what_is_lacking_is_computed(
    configs: dict[str, Path], evaluate: Callable[..., Path], builds: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    two = configs["refcoco"], configs["refcoco+"]
    out = evaluate("all", *two, checkpoint=ONE)
    assert builds == [48]
    shutil.rmtree(out / "refcoco+" / "result")
    evaluate("all", *two, checkpoint=ONE)
    evaluate("all", *two, "--set", "metrics=[point_15px]", checkpoint=ONE)
    assert builds == [48, 48]
    near = f"{100 * log(out / 'refcoco+')[2]['point_15px_val_d']:.2f}"
    assert re.search(rf"\nrefcoco\+ +00 +point_15px +{near} ", capsys.readouterr().out)


def test_a_checkpoint_that_is_replaced_between_two_configs_is_loaded_again(
    configs: dict[str, Path],
    evaluate: Callable[..., Path],
    builds: list[int],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model in memory is not taken for the file that is there now."""
    file = Path(shutil.copy(place / ONE, place / "replaced.pth"))
    first = place / "ckpt" / "checkpoint_00.pth"
    run = program.Evaluation.run

    def and_replace(evaluation: program.Evaluation, *rest: Any) -> None:
        run(evaluation, *rest)
        shutil.copy(first, file)

    monkeypatch.setattr(program.Evaluation, "run", and_replace)
    out = evaluate("all", configs["refcoco"], configs["refcoco+"], checkpoint="replaced.pth")
    assert builds == [48, 48]
    for name, checkpoint in (("refcoco", ONE), ("refcoco+", "ckpt/checkpoint_00.pth")):
        alone = evaluate(f"{name} alone", configs[name], checkpoint=checkpoint)
        assert log(out / name) == log(alone)


def test_reports_compare_the_folders_of_the_same_config(
    configs: dict[str, Path], evaluate: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    monkeypatch.setattr(
        write, "report_folders", lambda benchmark, _, folders: compared.append((benchmark.name, folders))
    )
    two = configs["refcocog"], configs["refcoco+"]
    before = evaluate("before", *two, checkpoint="ckpt/checkpoint_00.pth")
    after = evaluate("after", *two, "--compare", tmp_path / "before", checkpoint=ONE)
    names = {"RefCOCOg": "refcocog", "RefCOCO+": "refcoco+"}
    assert compared == [(name, [before / folder, after / folder]) for name, folder in names.items()]


def test_errors_come_before_anything_is_computed(
    configs: dict[str, Path], evaluate: Callable[..., Path], tmp_path: Path, place: Path
) -> None:
    (tmp_path / "other").mkdir()
    again = Path(shutil.copy(configs["refcoco"], tmp_path / "other"))
    with pytest.raises(EvaluationError, match="two are called alike, and so would be their folders; rename one"):
        evaluate("out", configs["refcoco"], again)
    write_config(again, {**json.loads(again.read_text()), "test_file": ["nowhere.json"]})
    with pytest.raises(DataError, match=r"nowhere\.json"):
        evaluate("out", configs["refcocog"], again)
    write_config(again, {**json.loads(again.read_text()), "benchmark": "refcoc"})
    with pytest.raises(ValueError, match=rf"{again}: benchmark is 'refcoc'"):
        evaluate("out", configs["refcocog"], again)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        program.parse_args(None, ["--config", "--checkpoint", "x"])
