"""benchmarks/ablation.py: which runs it asks for, and what it makes of their results."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

import scenes_demo
from benchmarks import ablation
from config import PretrainConfig, load_config
from grounding.results import ResultFolder
from model_sizes import load_bert_config, size_problems


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[str]]]:
    """Stands for the programs: the (config, options) of each training; its evaluation gives its number as results."""
    asked: list[tuple[str, Sequence[str]]] = []

    def train(output: Path, config: Path, start: list[str], processes: int, options: Sequence[str]) -> Path:
        assert (start, processes) == (["--checkpoint", str(scenes_demo.SHIPPED)], 2)
        asked.append((config.name, options))
        return output / "checkpoint_02.pth"

    def run_step(name: str, words: list[str], logs: Path) -> None:
        if name == "scenes":
            return
        assert words[0] == "grounding_eval.py"
        folder = Path(words[words.index("--output_dir") + 1])
        assert words[words.index("--checkpoint") + 1] == str(folder.parent / "checkpoint_02.pth")
        value = len(asked) / 100
        accuracies = {"val_d": value, "testA_d": 2 * value, "testB_d": 3 * value}
        point = {key: 5 * number for key, number in accuracies.items()}
        results = ResultFolder(folder / "result")
        results.folder.mkdir(parents=True)
        matching = [] if "matching_file=[]" in words else [{"matching_val": 0.5}, {"matching_testB": 0.5}]
        results.write_lines("00", [accuracies, point, *matching])

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "run_step", run_step)
    return asked


def test_variants_and_seeds(
    runs: list[tuple[str, Sequence[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["both terms, published margins", "control"]
    ablation.main(argparse.Namespace(variants=variants, seeds=[7, 8], short=False, output_dir=tmp_path))
    margins = ["--set", "amc.margin_mean=0.1", "--set", "amc.margin_max=0.5"]
    assert runs == [
        ("Pretrain.yaml", ["--seed", "7", *margins]),
        ("Pretrain_control.yaml", ["--seed", "7"]),
        ("Pretrain.yaml", ["--seed", "8", *margins]),
        ("Pretrain_control.yaml", ["--seed", "8"]),
    ]
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2:] == [
        "| both terms, published margins | 2 | 10.0 ± 7.1 | 20.0 ± 14.1 | 30.0 ± 21.2 | 2.0 ± 1.4 | 50.0 ± 0.0 |",
        "| control | 2 | 15.0 ± 7.1 | 30.0 ± 14.1 | 45.0 ± 21.2 | 3.0 ± 1.4 | 50.0 ± 0.0 |",
    ]
    assert "\n".join(table) in capsys.readouterr().out


def test_short_runs(runs: list[tuple[str, Sequence[str]]], tmp_path: Path) -> None:
    ablation.main(argparse.Namespace(variants=["mean term only"], seeds=[7], short=True, output_dir=tmp_path))
    assert runs == [("Pretrain.yaml", ["--seed", "7", *scenes_demo.SHORT_TRAINING, "--set", "amc.weight_max=0"])]
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2:] == ["| mean term only | 1 | 5.0 | 10.0 | 15.0 | 1.0 | - |"]


def test_variants_change_what_they_say() -> None:
    found = {}
    for name, (config, changes) in ablation.VARIANTS.items():
        loaded = load_config(config, PretrainConfig, changes)
        amc = loaded.amc
        found[name] = (loaded.add_gcam, amc.weight_mean > 0, amc.weight_max > 0, (amc.margin_mean, amc.margin_max))
    assert found["control"][0] is False
    shipped, published = (0.5, 0.3), (0.1, 0.5)
    selfeq = ("SelfEQ", "SelfEQ, a tenth", "SelfEQ, std_over region", "AMC and SelfEQ")
    for name, amc_too in zip(selfeq, (False, False, False, True), strict=True):
        config, changes = ablation.VARIANTS[name]
        loaded = load_config(config, PretrainConfig, changes)
        assert loaded.paraphrases
        assert (loaded.add_gcam, loaded.amc.layer) == (amc_too, 3)
        assert size_problems(loaded, load_bert_config(loaded.bert_config)) == []
        del found[name]
    masks = ablation.VARIANTS["both terms, on masks"]
    assert load_config(masks[0], PretrainConfig, masks[1]).train_file == ["data/scenes/masks/train_phrases.json"]
    assert {name: values for name, values in found.items() if name != "control"} == {
        "both terms, on masks": (True, True, True, shipped),
        "both terms": (True, True, True, shipped),
        "mean term only": (True, True, False, shipped),
        "max term only": (True, False, True, shipped),
        "neither term": (True, False, False, shipped),
        "both terms, published margins": (True, True, True, published),
    }


def test_spread() -> None:
    assert ablation.spread([]) == "-"
    assert ablation.spread([61.234]) == "61.2"
    assert ablation.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
