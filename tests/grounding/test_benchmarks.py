"""The registries: a metric and a benchmark added in a few lines, one's own data, and what evaluation does not load."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import demo
import prepare
from config import GroundingConfig, load_config
from dataset.expressions import Expression, Reading
from dataset.transforms import resize_bicubic
from grounding import evaluate as program
from grounding import metrics, questions
from grounding.benchmarks import BENCHMARKS, FLICKR, REFCLEF, Benchmark, benchmark_of
from grounding.maps import ResizedMap
from grounding.metrics import MetricError
from grounding.results import ResultFolder
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, evaluate, log, results, write_config

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")


def run(place: Path, config: Path, output: Path, *words: str, checkpoint: str = "ckpt") -> None:
    """grounding_eval.py, without a process of its own."""
    args = ["--config", str(config), "--checkpoint", str(place / checkpoint), "--output_dir", str(output)]
    args += ["--text_encoder", str(place / "data" / "text_encoder"), "--device", "cpu", "--num_workers", "0"]
    program.evaluate(None, program.parse_args(None, [*args, *words]))


def own_config(place: Path, folder: Path, rows: list[Any], **keys: Any) -> Path:
    """A config of the benchmark `own`, and the file that it names."""
    (folder / "own.json").write_text(json.dumps(rows))
    sizes = json.loads((place / "refclef.yaml").read_text())
    for key in ("test_file", "refcoco_data"):
        del sizes[key]
    write_config(folder / "own.yaml", {**sizes, "benchmark": "own", "test_file": [str(folder / "own.json")], **keys})
    return folder / "own.yaml"


@pytest.fixture
def rows(place: Path) -> list[dict[str, Any]]:
    """The expressions of the scenes' Flickr30k as entries of one's own."""
    expressions = FLICKR.load(load_config(place / "flickr.yaml", GroundingConfig))
    return [
        {"image": one.image.name, "phrase": one.text, "boxes": one.boxes.tolist(), "split": f"my {one.split}"}
        for one in expressions
    ]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, dict[str, Any]]]:
    """Run `prepare.py check`: its exit status, and what it finds."""

    def run(config: Path) -> tuple[int, dict[str, Any]]:
        args = prepare.parse_args(["check", str(config), "--json"])
        capsys.readouterr()
        try:
            args.run(args)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, json.loads(capsys.readouterr().out)

    return run


# ---- one's own data


def test_own_data_has_the_numbers_of_the_same_data_in_another_format(
    place: Path, rows: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_config(place, tmp_path, rows)
    bilinear = BENCHMARKS["own"]._replace(resize=FLICKR.resize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARKS, "own", bilinear)
        run(place, config, tmp_path / "own", "--report", checkpoint=ONE)
    evaluate(FLICKR, place, tmp_path / "flickr", checkpoint=ONE)
    map_box, point = log(tmp_path / "own")
    assert list(point) == ["my val", "my test", "epoch"]
    assert list(point.values()) == list(log(tmp_path / "flickr")[0].values())
    for one, other in zip(results(tmp_path / "own"), results(tmp_path / "flickr"), strict=True):
        assert torch.equal(one["pred"], other["pred"])
        assert one.keys() == {"ref_id", "pred", "image_path", "split"}
    expressions = BENCHMARKS["own"].load(load_config(config, GroundingConfig))
    found = metrics.score([row["pred"] for row in results(tmp_path / "own")], expressions, ["map_box"])["map_box"]
    val = np.array([one.split == "my val" for one in expressions])
    assert list(map_box.values())[:2] == [found[val].mean(), found[~val].mean()]
    assert "Own data: " in capsys.readouterr().out
    html = (tmp_path / "own" / "report.html").read_text(encoding="utf-8")
    assert "map_box my val" in html or "map box my val" in html
    saved = load_config(tmp_path / "own" / "config.yaml", GroundingConfig)
    assert benchmark_of(saved) is BENCHMARKS["own"]


def test_own_data_is_checked_before_a_run(
    place: Path, rows: list[Any], tmp_path: Path, check: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    status, found = check(own_config(place, tmp_path, rows))
    assert status == 0
    file = str(tmp_path / "own.json")
    assert [row["count"] for row in found["files"] if row["file"] == file] == [len(rows)]
    del rows[0]["phrase"]
    rows[1]["boxes"] = [[900, 3, 5, 5]]
    status, found = check(own_config(place, tmp_path, rows))
    assert status == 1
    said = json.dumps(found["problems"])
    assert "an entry needs one of the keys 'phrase' and 'phrases'" in said
    assert "no box covers a pixel of the image: no answer can be right" in said


# ---- adding a metric and a benchmark


def test_a_metric_and_a_benchmark_in_a_few_lines(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    check: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    """Both are logged, printed, in the table, the report and its charts, and checked, by nothing but what is here."""
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))

    @metrics.metric()
    def near(cam: ResizedMap, expression: Expression) -> float:
        """How near the map's point is to the first box's centre: 1 there, 0 a diagonal away."""
        (x, y), (bx, by, w, h) = cam.point(), expression.boxes[0].tolist()
        return 1 - float(np.hypot(x - bx - w / 2, y - by - h / 2) / np.hypot(*expression.size))

    def read(config: GroundingConfig, reading: Reading) -> list[Expression]:
        found = []
        with reading.file(config.test_file[0], "lines", "test_file") as file:
            for i, line in enumerate(Path(file.name).read_text().splitlines()):
                name, text, box = line.split("\t")
                image, boxes = Path(config.image_root, name), np.array([[float(v) for v in box.split()]])
                file.says(f"line {i}", image, text=text, boxes=boxes)
                found.append(Expression(image, text, i, "dev", boxes))
        return found

    lines = Benchmark("Lines", "lines.yaml", read, resize_bicubic, {"dev": "dev_x"}, ("near", "point"))
    monkeypatch.setitem(BENCHMARKS, "lines", lines)
    (tmp_path / "lines.tsv").write_text(
        "".join(f"10000{i}.jpg\tthe {word} circle\t{9 * i} 5 20 20\n" for i, word in enumerate(("red", "blue", "big")))
    )
    config = own_config(place, tmp_path, [], benchmark="lines", test_file=[str(tmp_path / "lines.tsv")])
    run(place, config, tmp_path / "out", "--report")

    printed = capsys.readouterr().out
    assert "Lines: 3 expressions of 3 images" in printed
    rows = log(tmp_path / "out")
    assert [list(row) for row in rows] == [["dev_x", "epoch"]] * 6
    first = results(tmp_path / "out", "01")
    expected = [near(ResizedMap(row["pred"], *one.size), one) for row, one in zip(first, load_of(config), strict=True)]
    assert rows[2]["dev_x"] == pytest.approx(np.mean(expected))
    assert 0 < rows[2]["dev_x"] < 1
    assert f"epoch 01 near: dev_x {100 * rows[2]['dev_x']:.2f}\n" in printed
    assert "epoch  near dev_x  point dev_x" in printed
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("near dev_x", "Near accuracy of the checkpoints", f"{100 * rows[2]['dev_x']:.2f}"):
        assert words in html

    status, found = check(config)
    assert (status, found["files"][0]["checked"]) == (0, "evaluation config, Lines")
    with Path(tmp_path / "lines.tsv").open("a") as file:
        file.write("100001.jpg\tthe blue circle\t900 5 20 20\n100009.jpg\tit\t9 5 20 20\n")
    status, found = check(config)
    assert status == 1
    first = {row["kind"].split(":")[0]: row["first"][0].split(" (")[0] for row in found["problems"]}
    assert first == {
        "the image file does not exist; check image_root": "line 4",
        "no box covers a pixel of the image": "line 3",
        "image and text are those of an earlier entry": "line 3",
    }


def load_of(config: Path) -> list[Expression]:
    read = load_config(config, GroundingConfig)
    return benchmark_of(read).load(read)


def test_metrics_that_the_data_cannot_be_measured_by(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before a model is built; never taken for another metric."""
    monkeypatch.setattr(questions, "build_model", None)
    for names, message in (
        (("boxes", "point"), r"there is no metric 'boxes' in grounding/metrics\.py; there are box, point, map_box"),
        (("box", "point"), r"metric 'box' needs detections, which (\d+) of \1 expressions do not have \(the first: '"),
    ):
        with pytest.raises(MetricError, match=message):
            evaluate(REFCLEF._replace(metrics=names), place, tmp_path, checkpoint=ONE)
    assert not (tmp_path / "result").exists()


def test_results_are_measured_again_by_other_metrics(place: Path, tmp_path: Path) -> None:
    """Lines of the log have no names: those of other metrics go, and the stored maps give the new ones."""
    evaluate(REFCLEF._replace(metrics=("map_box",)), place, tmp_path)
    box = log(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "build_model", None)
        evaluate(REFCLEF, place, tmp_path)
        point = log(tmp_path)
        assert len(point) == len(box) == 3
        assert point != box
        evaluate(REFCLEF, place, tmp_path)
        assert log(tmp_path) == point
        evaluate(REFCLEF._replace(metrics=("point", "map_box")), place, tmp_path)
    assert log(tmp_path) == [line for pair in zip(point, box, strict=True) for line in pair]
    folder = ResultFolder(tmp_path / "result")
    assert folder.origin("00")["metrics"] == ["point", "map_box"]


def test_the_demos_refcoco_is_what_it_always_was() -> None:
    for words, name in (([], "RefCOCO+"), (["refcoco"], "RefCOCO+"), (["refcoco+"], "RefCOCO+"), (["own"], "Own data")):
        args = demo.parse_args(["x.jpg", "a dog", *(["--benchmark", *words] if words else [])])
        assert BENCHMARKS[args.benchmark].name == name


# ---- floors


def test_evaluation_loads_no_wing() -> None:
    """Without --report, neither drawing nor pages are needed."""
    code = "import sys, grounding.evaluate; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "grounding.metrics" in loaded
    wings = ("matplotlib", "skimage", "jinja2", "gradio", "pandas", "grounding.report", "grounding.pictures")
    assert not {name for name in loaded if name.startswith((*wings, "grounding.web"))}
