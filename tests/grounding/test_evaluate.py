"""The evaluation program on a tiny model and tiny scenes: files, order, interruptions, options, messages."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import ConfigError, GroundingConfig, load_config
from dataset.expressions import Expression
from dataset.matching import load_pairs
from dataset.reading import DataError, read_image
from dataset.scenes import files as scenes_files
from dataset.transforms import normalise, resize_bilinear_image
from grounding import evaluate as program
from grounding.batches import Loaded, answer_pairs
from grounding.benchmarks import BENCHMARKS, FLICKR, REFCLEF, REFCOCO_PLUS, Benchmark, benchmark_of
from grounding.evaluate import EvaluationError, find_checkpoints
from grounding.results import ResultError, ResultFolder
from models.albef import build_albef
from models.checkpoint import CheckpointError
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
    name = {"RefCOCO+": "refcoco", "RefCLEF": "refclef", "Flickr30k": "flickr"}[benchmark.name]
    args = ["--config", str(place / f"{name}.yaml"), "--checkpoint", str(place / checkpoint)]
    args += ["--output_dir", str(output), "--text_encoder", str(place / "data" / "text_encoder")]
    program.evaluate(benchmark, program.parse_args(benchmark, [*args, "--device", "cpu", "--num_workers", "0", *words]))


ONE = "ckpt/checkpoint_01.pth"


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
    name = {"RefCOCO+": "refcoco", "RefCLEF": "refclef", "Flickr30k": "flickr"}[benchmark.name]
    expressions = benchmark.load(load_config(place / f"{name}.yaml", GroundingConfig))
    records = results(tmp_path)
    assert [record["ref_id"] for record in records] == [expression.ref_id for expression in expressions]
    for record in records:
        assert record.keys() == keys
        assert record["pred"].shape == (3, 3)
        assert record["pred"].dtype == torch.float32
        assert record["pred"].min() >= 0
        assert record["pred"].untyped_storage().nbytes() == 36  # its own memory, not a view that keeps a batch alive
    assert [set(line) for line in log(tmp_path)] == lines
    assert all(line["epoch"] == "00" for line in log(tmp_path))
    assert load_config(tmp_path / "config.yaml", GroundingConfig) == load_config(
        place / f"{name}.yaml", GroundingConfig
    )
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
    tokenizer = program.load_tokenizer(str(place / "data" / "text_encoder"))
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


def test_the_scripts_name_their_benchmarks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("grounding.evaluate.program", lambda *words: called.append(words))
    for name in ("_singlegpu", "_singlegpu_refclef", "_singlegpu_flickr", ""):
        runpy.run_path(f"grounding_eval{name}.py", run_name="__main__")
    assert called == [(REFCOCO_PLUS,), (REFCLEF,), (FLICKR,), ()]


VALUES = {"image_root": "", "test_file": ["x.json"], "refcoco_data": "refer", "det_file": "dets.json"}


def test_the_benchmark_that_a_config_asks_for() -> None:
    def asked(script: Benchmark | None, **keys: str) -> Benchmark:
        return benchmark_of(GroundingConfig.model_validate({**VALUES, **keys}), script)

    for benchmark in (REFCOCO_PLUS, REFCLEF, FLICKR):
        assert asked(benchmark) is benchmark
    for benchmark in (REFCLEF, FLICKR):  # `refer_dataset` is RefCOCO+'s script's alone
        assert asked(benchmark, refer_dataset="refcoco") is benchmark
    assert REFCOCO_PLUS.splits == {"val": "val_d", "testA": "testA_d", "testB": "testB_d"}
    found = asked(REFCOCO_PLUS, refer_dataset="refcoco")
    assert found == BENCHMARKS["refcoco"]._replace(splits={"val": "val", "testA": "testA", "testB": "testB"})
    found = asked(REFCOCO_PLUS, refer_dataset="refcocog", refer_split="umd")
    assert found == BENCHMARKS["refcocog"]._replace(splits={"val": "val", "test": "test"})
    assert asked(REFCOCO_PLUS, refer_dataset="refcocog", refer_split="google").splits == {"val": "val"}
    for name, title in (("refcoco", "RefCOCO"), ("refcocog", "RefCOCOg")):
        assert (BENCHMARKS[name].name, BENCHMARKS[name][2:4], BENCHMARKS[name].metrics) == (
            *(title, REFCOCO_PLUS[2:4], REFCOCO_PLUS.metrics),
        )

    for name in ("refcoco+", "refclef", "flickr", "own"):
        assert asked(None, benchmark=name) is BENCHMARKS[name]
    for script in (None, REFCOCO_PLUS):
        assert asked(script, benchmark="refcoco") == asked(REFCOCO_PLUS, refer_dataset="refcoco")
        assert asked(script, benchmark="refcocog", refer_split="umd").splits == {"val": "val", "test": "test"}
        # the published key counts, so that --set refer_dataset=... works with every shipped file
        assert asked(script, benchmark="refcoco+", refer_dataset="refcoco").name == "RefCOCO"
    names = "one of refcoco\\+, refcoco, refcocog, refclef, flickr, own"
    with pytest.raises(ConfigError, match=f"lacks 'benchmark', which says what to evaluate: {names}"):
        asked(None)
    with pytest.raises(ConfigError, match=r"benchmark is 'RefCOCO', which is none of refcoco\+, refcoco, "):
        asked(None, benchmark="RefCOCO")
    for script, name in ((REFCLEF, "flickr"), (REFCOCO_PLUS, "refclef"), (FLICKR, "own")):
        with pytest.raises(ConfigError, match=f"benchmark is '{name}', and this script evaluates {script.name[:4]}"):
            asked(script, benchmark=name)


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("Grounding_*.yaml")), ids=str)
def test_the_shipped_configs_name_their_benchmarks(path: Path) -> None:
    config = load_config(path, GroundingConfig)
    found = benchmark_of(config)
    assert Path(found.config).name == path.name
    assert benchmark_of(GroundingConfig.model_validate(config.model_dump())) == found  # as saved beside the results


def test_a_split_that_a_data_set_does_not_have() -> None:
    for benchmark, keys, message in (
        (
            REFCOCO_PLUS,
            {"refer_dataset": "refcocog"},
            "refcocog is split by umd and by google, not by unc; correct refer_split",
        ),
        (REFCOCO_PLUS, {"refer_split": "google"}, r"refcoco\+ is split by unc, not by google"),
        (REFCLEF, {"refer_split": "umd"}, "refclef is split by unc and by berkeley, not by umd"),
    ):
        config = GroundingConfig.model_validate({**VALUES, **keys})
        with pytest.raises(DataError, match=message):
            benchmark.load(config)
    with pytest.raises(DataError, match="refcocog is split by"):
        benchmark_of(GroundingConfig.model_validate({**VALUES, "refer_dataset": "refcocog"}), REFCOCO_PLUS)


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


def test_the_published_command_line_is_accepted() -> None:
    words = "--checkpoint x --gradcam_mode itm --block_num 8 --text_encoder bert-base-uncased --evaluate --device cuda"
    words += " --seed 42 --world_size 1 --dist_url env:// --distributed True"
    args = program.parse_args(REFCOCO_PLUS, words.split())
    assert (args.config, args.block_num, args.distributed) == ("./configs/Grounding_refcoco.yaml", 8, True)


# ---- done, interrupted, changed


def test_complete_checkpoints_are_skipped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(REFCOCO_PLUS, place, tmp_path)
    before = (tmp_path / "result" / "log.txt").read_text()
    monkeypatch.setattr(program, "build_albef", None)  # would be called to evaluate anything
    evaluate(REFCOCO_PLUS, place, tmp_path)
    assert (tmp_path / "result" / "log.txt").read_text() == before
    assert capsys.readouterr().out.count("already evaluated") == 3


def test_a_result_without_its_metrics_is_not_skipped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release skips a checkpoint whose result exists, though an interruption kept its metrics from the log."""
    evaluate(REFCOCO_PLUS, place, tmp_path)
    path = tmp_path / "result" / "log.txt"
    complete = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*complete[:3], complete[4][:20]]))  # "01" lacks a line, "02" is cut off
    monkeypatch.setattr(program, "build_albef", None)  # the maps are there already
    evaluate(REFCOCO_PLUS, place, tmp_path)
    assert sorted(path.read_text().splitlines()) == sorted(line.strip() for line in complete)


def test_a_truncated_result_is_computed_again(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    path, lines = tmp_path / "result" / "epoch00.pth", log(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    assert "cannot be read" in capsys.readouterr().out
    assert log(tmp_path) == lines
    assert results(tmp_path)


def test_an_interruption_leaves_no_half_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        _[1].write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["epoch00.json"]
    evaluate(REFCLEF, place, tmp_path, checkpoint=ONE)
    assert len(log(tmp_path)) == 1


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


def test_broken_images_are_skipped_on_request(
    place: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--set", f"image_root={broken}", "--skip_broken"]
    evaluate(REFCLEF, place, tmp_path / "out", *words, checkpoint=ONE)
    printed = capsys.readouterr().out
    assert "skipped:" in printed
    assert "expressions of unreadable images are left out" in printed
    expressions = REFCLEF.load(load_config(place / "refclef.yaml", GroundingConfig))
    kept = [e.ref_id for e in expressions if e.image.name != "100000.jpg"]
    assert 0 < len(kept) < len(expressions)
    assert [record["ref_id"] for record in results(tmp_path / "out")] == kept
    monkeypatch.setattr(program, "build_albef", None)
    evaluate(REFCLEF, place, tmp_path / "out", *words, checkpoint=ONE)
    assert "already evaluated" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", [REFCOCO_PLUS, REFCLEF, FLICKR], ids=lambda benchmark: benchmark.name)
def test_missing_images_are_skipped_as_broken_ones(
    benchmark: Benchmark, place: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    name = {"RefCOCO+": "refcoco", "RefCLEF": "refclef", "Flickr30k": "flickr"}[benchmark.name]
    expressions = benchmark.load(load_config(place / f"{name}.yaml", GroundingConfig))
    kept = [e.ref_id for e in expressions if e.image.name not in ("100000.jpg", "100001.jpg")]
    assert [record["ref_id"] for record in results(tmp_path / "out")] == kept
    assert f"{len(expressions) - len(kept)} expressions of unreadable images are left out" in printed
    pairs = json.loads((place / "data" / "matching_val.json").read_text())
    gone = sum(pair["image"] in ("100000.jpg", "100001.jpg") for pair in pairs)
    assert f"matching_val: {gone} pairs of unreadable images are left out" in printed
    assert (tmp_path / "out" / "report.html").is_file()


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


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_image_encoder_in_bfloat16(mode: str, place: Path, tmp_path: Path) -> None:
    block = ("--gradcam_mode", mode, "--block_num", "2" if mode == "itm" else "1")
    evaluate(REFCOCO_PLUS, place, tmp_path / "fp32", *block, checkpoint=ONE)
    evaluate(REFCOCO_PLUS, place, tmp_path / "bf16", *block, "--precision", "bf16", checkpoint=ONE)
    with pytest.raises(ResultError, match=r"precision bf16 \(asked for now: fp32\)"):
        evaluate(REFCOCO_PLUS, place, tmp_path / "bf16", *block, checkpoint=ONE)
    exact, rounded = (torch.stack([row["pred"] for row in results(tmp_path / name)]) for name in ("fp32", "bf16"))
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


# ---- matching


def test_matching_accuracy(place: Path, tmp_path: Path) -> None:
    file = place / "data" / "matching_val.json"
    evaluate(REFCLEF, place, tmp_path, "--set", f"matching_file=[{file}]", checkpoint=ONE)
    line = log(tmp_path)[1]
    kinds = {"matching_val_caption", "matching_val_phrase"}
    assert line.keys() == {"matching_val", *kinds, "epoch"}

    config = load_config(place / "refclef.yaml", GroundingConfig)
    model = build_albef(config)
    model.load_state_dict(torch.load(place / ONE, weights_only=True)["model"])
    model.eval()
    tokenizer = program.load_tokenizer(str(place / "data" / "text_encoder"))
    right: dict[str, list[bool]] = {"caption": [], "phrase": []}
    for row in json.loads(file.read_text()):
        image = read_image(place / "data" / "images" / row["image"], "")
        tokens = model.encode_image(normalise(resize_bilinear_image(image, 48))[None])
        ids, mask = tokenizer([row["text"].replace(",", "")])
        text = model.encode_text(ids, mask)
        fused = model.text_encoder.fuse(text, mask, model.text_encoder.image_keys_values(tokens))
        no, yes = model.match_logits(fused.tokens)[0].tolist()
        right[row["kind"]].append((yes > no) == bool(row["match"]))
    for kind, correct in right.items():
        assert line[f"matching_val_{kind}"] == pytest.approx(np.mean(correct), abs=0.03)  # near-ties may turn
    assert line["matching_val"] == pytest.approx(np.mean(right["phrase"] + right["caption"]), abs=0.03)


@pytest.mark.parametrize(
    ("of_true", "of_false", "accuracy"), [(0.6, 0.4, 1.0), (0.4, 0.3, 0.5), (0.7, 0.6, 0.5), (0.3, 0.7, 0.0)]
)
def test_matching_is_decided_at_one_half(
    of_true: float, of_false: float, accuracy: float, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given probabilities of true and of false pairs."""
    file = place / "data" / "matching_val.json"
    matches = [row["match"] for row in json.loads(file.read_text())]

    def answer(function: Any, asked: Any, batches: Any) -> Any:
        if function.__name__ == "maps":
            return answer_pairs(function, asked, batches)
        return ((i, of_true if match else of_false) for i, match in enumerate(matches))

    monkeypatch.setattr(program, "answer_pairs", answer)
    evaluate(REFCLEF, place, tmp_path, "--set", f"matching_file=[{file}]", checkpoint=ONE)
    assert log(tmp_path)[1]["matching_val"] == accuracy


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.jpg", "text": "cat", "match": 2}], r"must be 0 or 1.*\n.*pairs\.json: entry 0 \(found 2"),
        ([{"image": "a.jpg", "text": "cat"}], r"key 'match' is missing"),
        ([{"image": "a.jpg", "text": "\ud800", "match": 1}], r"key 'text' holds half of a surrogate pair"),
        ([{"image": "a.jpg", "text": "a", "match": 1, "kind": "\ud800"}], r"key 'kind' holds half of a surrogate pair"),
        ([{"image": "x" * 300, "text": "a", "match": 1}], r"does not exist; check image_root"),
        ([{"image": "b.jpg", "text": "cat", "match": 1}], r"does not exist; check image_root"),
        ([], r"holds no entries"),
    ],
)
def test_broken_pairs(rows: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=message):
        load_pairs(str(tmp_path / "pairs.json"), str(tmp_path))


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_texts_without_content_are_evaluated_as_cls_alone(mode: str, place: Path, tmp_path: Path) -> None:
    test, pairs = tmp_path / "test.json", tmp_path / "pairs.json"
    rows = json.loads((place / "data" / "refer" / "refclef" / "refclef_val.json").read_text())
    rows[0]["text"], rows[1]["text"] = "?!", "\u200b"
    test.write_text(json.dumps(rows))
    pairs.write_text(json.dumps([{"image": rows[0]["image"], "text": ".", "match": 1}]))
    words = ["--set", f"test_file=[{test}]", "--set", f"matching_file=[{pairs}]", "--gradcam_mode", mode]
    evaluate(REFCLEF, place, tmp_path / "out", *words, "--block_num", "1", "--report", checkpoint=ONE)
    found = results(tmp_path / "out")
    assert len(found) == len(rows)
    for record, row in zip(found, rows, strict=True):
        assert record["image_path"] == row["image"]
        assert record["pred"].shape == (3, 3)
        assert bool(record["pred"].isfinite().all())
    assert log(tmp_path / "out")[1]["pairs"] in (0.0, 1.0)


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


@pytest.mark.slow
def test_a_report_of_an_evaluation_with_unreadable_images(place: Path, tmp_path: Path) -> None:
    image = load_config(place / "refclef.yaml", GroundingConfig)
    first = REFCLEF.load(image)[0].image
    kept = first.read_bytes()
    try:
        first.write_bytes(b"broken")
        evaluate(REFCLEF, place, tmp_path, "--report", "--skip_broken", checkpoint=ONE)
    finally:
        first.write_bytes(kept)
    left_out = sum(item.image == first for item in REFCLEF.load(image))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<td>fp32</td><td>{left_out}</td>" in html
    assert ">nan<" not in html
    assert "cover nan" not in html
