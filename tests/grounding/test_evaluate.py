"""The evaluation program on a tiny model and tiny scenes: files, order, interruptions, options, messages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import GroundingConfig, load_config
from dataset.expressions import Expression
from dataset.reading import DataError, read_image
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from dataset.transforms import normalise
from grounding import evaluate as program
from grounding import questions
from grounding.batches import Loaded, answer_pairs
from grounding.benchmarks import FLICKR, REFCLEF, REFCOCO_PLUS, Benchmark
from grounding.questions import EvaluationError
from grounding.results import ResultError, ResultFolder
from models.albef import build_albef
from tests.data_keys import data_keys
from tests.small_model import BERT, SIZES
from utils import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes under data/, three checkpoints under ckpt/, and a config per benchmark."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = folder / "data"
    scenes_files.generate(data, seed=1, train=1, annotated=1, evaluation=5, size=48)
    (folder / "bert.json").write_text(json.dumps(BERT))
    sizes = {**SIZES, "bert_config": str(folder / "bert.json"), "block_num": 2}
    for name in ("refcoco", "refclef", "flickr"):
        write_config(folder / f"{name}.yaml", {**sizes, **data_keys(name, data)})
    (folder / "ckpt").mkdir()
    for epoch in range(3):
        torch.manual_seed(epoch)
        model = build_albef(load_config(folder / "refcoco.yaml", GroundingConfig))
        torch.save({"model": model.state_dict(), "epoch": epoch}, folder / "ckpt" / f"checkpoint_{epoch:02d}.pth")
    return folder


def write_config(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))  # JSON is YAML


def evaluate(benchmark: Benchmark, place: Path, output: Path, *words: str, checkpoint: str = "ckpt") -> None:
    args = ["--config", str(place / f"{NAMES[benchmark.name]}.yaml"), "--checkpoint", str(place / checkpoint)]
    args += ["--output_dir", str(output), "--text_encoder", str(place / "data" / "text_encoder")]
    program.evaluate(benchmark, program.parse_args(benchmark, [*args, "--device", "cpu", "--num_workers", "0", *words]))


ONE = "ckpt/checkpoint_01.pth"
NAMES = {"RefCOCO+": "refcoco", "RefCLEF": "refclef", "Flickr30k": "flickr"}  # of configs


def results(output: Path, epoch: str = "00") -> list[dict[str, Any]]:
    return torch.load(output / "result" / f"epoch{epoch}.pth", weights_only=True)


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "result" / "log.txt").read_text().splitlines()]


# ---- files and lines


@pytest.mark.parametrize(
    ("benchmark", "keys", "lines"),
    [
        (REFCOCO_PLUS, {"ref_id", "pred", "image_path"}, [{"val_d", "testA_d", "testB_d", "epoch"}] * 2),
        (REFCLEF, {"ref_id", "pred", "image_path", "split"}, [{"val_d", "test", "epoch"}]),
        (FLICKR, {"ref_id", "pred", "image_height", "image_width", "split"}, [{"val_d", "test", "epoch"}]),
    ],
    ids=["refcoco", "refclef", "flickr"],
)
def test_result_files(benchmark: Benchmark, keys: set[str], lines: list[set[str]], place: Path, tmp_path: Path) -> None:
    evaluate(benchmark, place, tmp_path, checkpoint=ONE)
    config = load_config(place / f"{NAMES[benchmark.name]}.yaml", GroundingConfig)
    expressions, records = benchmark.load(config), results(tmp_path)
    assert [record["ref_id"] for record in records] == [expression.ref_id for expression in expressions]
    for record in records:
        assert record.keys() == keys
        assert record["pred"].shape == (3, 3)
        assert record["pred"].dtype == torch.float32
        assert record["pred"].min() >= 0
        assert record["pred"].untyped_storage().nbytes() == 36  # its own memory, not a view that keeps a batch alive
    assert [set(line) for line in log(tmp_path)] == lines
    assert all(line["epoch"] == "00" for line in log(tmp_path))
    assert load_config(tmp_path / "config.yaml", GroundingConfig) == config
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 42


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_maps_are_those_of_each_pair_alone(mode: str, place: Path, tmp_path: Path) -> None:
    """Grouped by image, padded and shared, an expression has the map that it has alone, up to a factor."""
    block = 2 if mode == "itm" else 1
    evaluate(REFCOCO_PLUS, place, tmp_path, "--gradcam_mode", mode, "--block_num", str(block), checkpoint=ONE)
    config = load_config(place / "refcoco.yaml", GroundingConfig)
    model = build_albef(config)
    model.load_state_dict(torch.load(place / ONE, weights_only=True)["model"])
    model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(str(place / "data" / "text_encoder"))
    compared = 0
    for expression, record in list(zip(REFCOCO_PLUS.load(config), results(tmp_path), strict=True))[::5]:
        image = normalise(REFCOCO_PLUS.resize(read_image(expression.image, ""), config.image_res))[None]
        cam = model.explain(model.encode(image), None, tokenizer([expression.text]), mode, block).maps
        assert (record["pred"].max() > 0) == (cam.max() > 0)
        compared += int(cam.max() > 0)  # the tiny random model gives some maps that are 0 everywhere
        assert torch.allclose(record["pred"] / (record["pred"].max() + 1e-12), cam[0] / (cam.max() + 1e-12), atol=1e-4)
    assert compared >= 3


def test_accuracies_are_those_of_the_maps(place: Path, tmp_path: Path) -> None:
    """The log against the points of the result file, found by hand."""
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    expressions = REFCLEF.load(load_config(place / "refclef.yaml", GroundingConfig))
    right: dict[str, list[bool]] = {"val": [], "test": []}
    for expression, record in zip(expressions, results(tmp_path), strict=True):
        image = read_image(expression.image, "")
        cam = torch.nn.functional.interpolate(
            record["pred"][None, None], (image.height, image.width), mode="bicubic", align_corners=False
        )[0, 0].numpy()
        y, x = np.unravel_index(cam.argmax(), cam.shape)
        bx, by, w, h = expression.boxes[0]
        right[record["split"] if record["split"] == "val" else "test"].append(bx < x < bx + w and by < y < by + h)
    expected = {"val_d": np.mean(right["val"]), "test": np.mean(right["test"]), "epoch": "00"}
    assert log(tmp_path) == [expected]


def test_a_folder_of_checkpoints(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(FLICKR, place, tmp_path)
    assert [line["epoch"] for line in log(tmp_path)] == ["00", "01", "02"]
    best = max(log(tmp_path), key=lambda line: line["val_d"])["epoch"]
    assert f"{best}*" in capsys.readouterr().out
    assert not torch.equal(results(tmp_path, "00")[0]["pred"], results(tmp_path, "01")[0]["pred"])


# ---- done, interrupted, changed


def test_a_result_without_its_metrics_is_not_skipped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release skips a checkpoint whose result exists, though an interruption kept its metrics from the log."""
    evaluate(REFCOCO_PLUS, place, tmp_path)
    path = tmp_path / "result" / "log.txt"
    complete = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*complete[:3], complete[4][:20]]))  # "01" lacks a line, "02" is cut off
    monkeypatch.setattr(questions, "build_model", None)  # the maps are there already
    evaluate(REFCOCO_PLUS, place, tmp_path)
    assert sorted(path.read_text().splitlines()) == sorted(line.strip() for line in complete)


def test_an_absent_split_is_null(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = str(place / "data" / "refer" / "refcoco+" / "refcoco+_val.json")
    evaluate(REFCOCO_PLUS, place, tmp_path, "--set", f"test_file=[{val}]", checkpoint=ONE)
    assert [line["testB_d"] for line in log(tmp_path)] == [None, None]
    assert [line["val_d"] is None for line in log(tmp_path)] == [False, False]
    assert "testB_d -" in capsys.readouterr().out


# ---- broken images


@pytest.fixture
def broken(place: Path, tmp_path: Path) -> Path:
    """A copy of the images of which the first of val is truncated."""
    images = tmp_path / "images"
    images.mkdir()
    for file in (place / "data" / "images").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    victim = images / "100000.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    return images


def test_a_truncated_image_stops_with_its_name(place: Path, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"100000\.jpg cannot be decoded .*is the download complete"):
        evaluate(REFCLEF, place, tmp_path / "out", "--set", f"image_root={broken}", checkpoint=ONE)


@pytest.mark.parametrize("benchmark", [REFCOCO_PLUS, REFCLEF, FLICKR], ids=lambda benchmark: benchmark.name)
def test_missing_images_are_skipped_as_broken_ones(
    benchmark: Benchmark,
    place: Path,
    broken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first image of val is broken, the second is missing: results, metrics and report go on without either."""
    (broken / "100001.jpg").unlink()
    words = ["--set", f"image_root={broken}", "--set", f"matching_file=[{place / 'data' / 'matching_val.json'}]"]
    with pytest.raises(DataError, match=r"(?s)does not exist; check image_root .*--skip_broken - 1 found.*100001\.jpg"):
        evaluate(benchmark, place, tmp_path / "strict", *words, checkpoint=ONE)
    evaluate(benchmark, place, tmp_path / "out", *words, "--skip_broken", "--report", checkpoint=ONE)
    printed = capsys.readouterr().out
    assert "100000.jpg cannot be decoded" in printed
    assert "100001.jpg does not exist" in printed
    expressions = benchmark.load(load_config(place / f"{NAMES[benchmark.name]}.yaml", GroundingConfig))
    kept = [e.ref_id for e in expressions if e.image.name not in ("100000.jpg", "100001.jpg")]
    assert [record["ref_id"] for record in results(tmp_path / "out")] == kept
    assert f"{len(expressions) - len(kept)} expressions of unreadable images are left out" in printed
    pairs = json.loads((place / "data" / "matching_val.json").read_text())
    gone = sum(pair["image"] in ("100000.jpg", "100001.jpg") for pair in pairs)
    assert f"matching_val: {gone} pairs of unreadable images are left out" in printed
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"<td>fp32</td><td>{len(expressions) - len(kept)}</td>" in html
    assert ">nan<" not in html
    monkeypatch.setattr(questions, "build_model", None)  # nothing is computed again
    evaluate(benchmark, place, tmp_path / "out", *words, "--skip_broken", checkpoint=ONE)
    assert "already evaluated" in capsys.readouterr().out


def test_nothing_but_missing_images(place: Path, tmp_path: Path) -> None:
    words = ["--set", f"image_root={tmp_path}", "--skip_broken"]
    with pytest.raises(DataError, match=r"none of the \d+ images can be read; check image_root"):
        evaluate(REFCLEF, place, tmp_path / "out", *words, checkpoint=ONE)


# ---- several processes, reduced precision


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(place: Path, tmp_path: Path, one_thread: None) -> None:
    """Five images a split in batches of two: the processes have unequally many, and the last batch is short."""
    options = ["--set", f"matching_file=[{place / 'data' / 'matching_val.json'}]", "--set", "batch_size=2"]
    evaluate(REFCOCO_PLUS, place, tmp_path / "one", *options)
    words = ["--config", str(place / "refcoco.yaml"), "--checkpoint", str(place / "ckpt"), "--device", "cpu"]
    words += ["--output_dir", str(tmp_path / "two"), "--text_encoder", str(place / "data" / "text_encoder")]
    repository = Path(program.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(repository / "grounding_eval_singlegpu.py"), *words, "--num_workers", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 02 point: ") == 1  # one process speaks
    logs = [(tmp_path / name / "result" / "log.txt").read_bytes() for name in ("one", "two")]
    assert logs[0] == logs[1]
    for epoch in ("00", "01", "02"):
        one, two = results(tmp_path / "one", epoch), results(tmp_path / "two", epoch)
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.pop("pred"), b.pop("pred"))
            assert a == b


@pytest.mark.parametrize(("mode", "half"), [("itm", "bf16"), ("itc", "bf16"), ("itm", "fp16")])
def test_image_encoder_in_half_precision(mode: str, half: str, place: Path, tmp_path: Path) -> None:
    block = ("--gradcam_mode", mode, "--block_num", "2" if mode == "itm" else "1")
    evaluate(REFCOCO_PLUS, place, tmp_path / "fp32", *block, checkpoint=ONE)
    evaluate(REFCOCO_PLUS, place, tmp_path / half, *block, "--precision", half, "--force_precision", checkpoint=ONE)
    with pytest.raises(ResultError, match=rf"precision {half} \(asked for now: fp32\)"):
        evaluate(REFCOCO_PLUS, place, tmp_path / half, *block, checkpoint=ONE)
    exact, rounded = (torch.stack([row["pred"] for row in results(tmp_path / name)]) for name in ("fp32", half))
    assert not torch.equal(exact, rounded)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.1 * exact.max()


# ---- what cannot be done


def test_text_that_the_model_has_no_positions_for(place: Path, tmp_path: Path) -> None:
    """Said before anything is computed, with the text; one that just fits is evaluated."""
    folder = place / "data" / "refer" / "refclef"
    row = json.loads((folder / "refclef_val.json").read_text())[0]
    (tmp_path / "bert.json").write_text(json.dumps({**BERT, "max_position_embeddings": 27}))
    model = build_albef(load_config(place / "refclef.yaml", GroundingConfig, [f"bert_config={tmp_path}/bert.json"]))
    torch.save({"model": model.state_dict()}, tmp_path / "short.pth")
    for letters, fits in ((26, True), (27, False)):
        text = "red " + " ".join(chr(ord("a") + k % 26) for k in range(letters - 1))
        (tmp_path / "rows.json").write_text(json.dumps([row, {**row, "text": text}]))
        words = ["--set", f"test_file=[{tmp_path}/rows.json]", "--set", f"bert_config={tmp_path}/bert.json"]
        if fits:
            evaluate(REFCLEF, place, tmp_path, *words, checkpoint=str(tmp_path / "short.pth"))
            assert len(results(tmp_path)) == 2
        else:
            with pytest.raises(EvaluationError, match=r"expression 'red a b .* has 28 word pieces, .* at most 27"):
                evaluate(REFCLEF, place, tmp_path / "no", *words, checkpoint=str(tmp_path / "short.pth"))


def test_vocabulary_larger_than_the_models(place: Path, tmp_path: Path, bert_vocab: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(bert_vocab.read_bytes())
    with pytest.raises(UserError, match=r"vocab\.txt: 30522 word pieces, and bert_config's vocab_size is \d+;"):
        evaluate(REFCLEF, place, tmp_path, "--text_encoder", str(tmp_path), checkpoint=ONE)
    assert not (tmp_path / "result").exists()


# ---- parts


def test_each_different_pair_is_asked_once() -> None:
    pairs = [(Path("a"), "x"), (Path("b"), "x"), (Path("a"), "x"), (Path("c"), "x"), (Path("a"), "y")]
    batches = [[Loaded(Path("a"), torch.tensor([10.0])), Loaded(Path("b"), torch.tensor([20.0]))], []]
    asked: list[tuple[float, str]] = []

    def function(images: torch.Tensor, index: list[int], texts: list[str]) -> torch.Tensor:
        asked.extend((float(images[i]), text) for i, text in zip(index, texts, strict=True))
        return images[index, 0] + torch.tensor([len(text) for text in texts])

    answers = dict(answer_pairs(function, pairs, batches))
    assert asked == [(10.0, "x"), (10.0, "y"), (20.0, "x")]
    assert {position: float(value) for position, value in answers.items()} == {0: 11, 2: 11, 4: 11, 1: 21}


def test_the_table_marks_the_best_epoch(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    assert folder.table(["point"], ("point", "val_d")) == "no checkpoint has been evaluated"
    for epoch, value in (("00", 0.25), ("01", 0.5), ("02", None)):
        folder.write_lines(epoch, [{"val_d": value, "test": 0.125}])
    folder.write_lines("01", [{"val_d": 0.75, "test": 0.125}])
    header, *rows, _ = folder.table(["point"], ("point", "val_d")).splitlines()
    assert header.split() == ["epoch", "point", "val_d", "point", "test"]
    assert [row.split() for row in rows] == [["00", "25.00", "12.50"], ["02", "-", "12.50"], ["01*", "75.00", "12.50"]]


def test_an_expression_without_annotated_size_uses_the_file(place: Path, tmp_path: Path) -> None:
    image = place / "data" / "images" / "100000.jpg"
    size = read_image(image, "").size[::-1]
    box = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert Expression(image, "x", 0, "val", box).size == size
    assert Expression(image, "x", 0, "val", box, annotated_size=(7, 9)).size == (7, 9)


# ---- the report


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [REFCOCO_PLUS, REFCLEF, FLICKR], ids=["refcoco", "refclef", "flickr"])
def test_the_reports_numbers_are_the_logs(benchmark: Benchmark, place: Path, tmp_path: Path) -> None:
    evaluate(benchmark, place, tmp_path, "--report")
    rows = re.findall(r"<tr>(.*?)</tr>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in rows]
    for epoch in ("00", "01", "02"):
        logged = [value for line in log(tmp_path) if line["epoch"] == epoch for value in list(line.values())[:-1]]
        assert cells[1 + int(epoch)] == [
            f"checkpoint_{epoch}",
            *("-" if v is None else f"{100 * v:.2f}" for v in logged),
        ]


@pytest.mark.slow
def test_compare_puts_another_folders_results_into_the_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    evaluate(REFCLEF, place, one, checkpoint=ONE)
    assert not (one / "report.html").exists()
    evaluate(REFCLEF, place, other, "--compare", str(one), checkpoint="ckpt/checkpoint_02.pth")
    assert f"The report is {other / 'report.html'}" in capsys.readouterr().out
    html = (other / "report.html").read_text(encoding="utf-8")
    assert "<h3>checkpoint_01 and checkpoint_02</h3>" in html
    assert not (one / "report.html").exists()
    with pytest.raises(ResultError, match="nowhere: no complete results"):
        evaluate(REFCLEF, place, other, "--compare", "nowhere", checkpoint="ckpt/checkpoint_02.pth")
