"""The worked diffs of docs/extending.md: each applies to the tree, and what it adds is trained, logged and reported."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.scenes import files as scenes_files
from tests.training_runs import REPOSITORY, log_rows, step_rows

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```diff\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))
SHORT = ("--max_steps", "1", "--num_workers", "0", "--device", "cpu", "--set", "batch_size=4")
EVALUATION = ("--checkpoint", "checkpoints/scenes_amc.safetensors", "--text_encoder", "configs/scenes")


class Copy:
    """The tree's tracked files in a folder of their own, with the diff of one of the page's sections applied."""

    def __init__(self, folder: Path, section: str) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for name in listed.stdout.split("\0"):
            if name and not name.startswith("tests/") and (REPOSITORY / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPOSITORY / name, folder / name)
        self.folder, self.output = folder, folder / "output"
        self.output.mkdir()
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        subprocess.run(["git", "apply"], cwd=folder, input=DIFFS[section], text=True, env=alone, check=True)

    def run(self, *words: str) -> str:
        """A program of the copy; what it prints."""
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        found = subprocess.run([sys.executable, *words], cwd=self.folder, capture_output=True, text=True, env=alone)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def train(self, *words: str) -> Path:
        """One step of the scenes' training config on tiny data; its folder."""
        scenes_files.generate(self.folder / "data/scenes", seed=5, train=8, annotated=8, evaluation=1, size=96)
        line = ["--config", "configs/scenes/Pretrain.yaml", "--text_encoder", "configs/scenes"]
        self.run("Pretrain.py", *line, "--output_dir", "output/run", *SHORT, *words)
        return self.output / "run"

    def evaluate(self, *words: str) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
        """Lines of log.txt and rows of expressions.csv of an evaluation of the shipped model, with a report."""
        line = ["--output_dir", "output/out", "--report", "--device", "cpu", "--num_workers", "0"]
        self.run("grounding_eval.py", *EVALUATION, *line, *words)
        log = (self.output / "out/result/log.txt").read_text().splitlines()
        with (self.output / "out/expressions.csv").open(newline="", encoding="utf-8") as file:
            return [json.loads(row) for row in log], list(csv.DictReader(file))


def test_every_section_has_a_diff_and_they_are_short() -> None:
    assert list(DIFFS) == re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    assert len(PAGE.splitlines()) <= 150


def test_a_loss_is_trained_logged_and_plotted(tmp_path: Path) -> None:
    copy = Copy(tmp_path, "A loss on the map")
    run = copy.train("--checkpoint", "checkpoints/scenes_stage1.safetensors")
    (row,), (step,) = log_rows(run), step_rows(run)
    assert 0 < row["train_loss_outside"] == step["loss_outside"] < 1
    assert "outside: 0.5" in (run / "config.yaml").read_text()
    code = "from pathlib import Path; from grounding.pictures.panels import loss_figure; from runs import read_runs; "
    code += "print(len(loss_figure(*read_runs([Path('output/run')], False)).axes))"
    assert copy.run("-c", code) == "6\n"


def test_a_metric_is_logged_and_reported(tmp_path: Path) -> None:
    copy = Copy(tmp_path, "A metric")
    (entries,) = re.findall(r"echo '(.*)' > output/own.json", PAGE)
    (copy.output / "own.json").write_text(entries)
    options = ["benchmark=own", "test_file=[output/own.json]", "image_root=docs/images/scenes", "matching_file=[]"]
    sets = [word for option in options for word in ("--set", option)]
    log, (row,) = copy.evaluate("--config", "configs/scenes/Grounding_refcoco.yaml", *sets)
    assert [line["test"] for line in log] == [1, pytest.approx(float(row["near: scenes_amc"]), abs=1e-6), 1]
    assert 0.9 < log[1]["test"] < 1
    assert "near test" in (copy.output / "out/report.html").read_text(encoding="utf-8")


def test_a_benchmark_is_evaluated_and_reported(tmp_path: Path) -> None:
    copy = Copy(tmp_path, "A benchmark")
    (lines,) = re.findall(r"printf '(.*)' > output/lines.tsv", PAGE)
    (copy.output / "lines.tsv").write_text(lines.replace("\\t", "\t").replace("\\n", "\n"))
    log, rows = copy.evaluate("--config", "configs/scenes/Grounding_lines.yaml")
    assert [row["phrase"] for row in rows] == ["the small red triangle", "biggest square"]
    assert [line["test"] for line in log][-1] == 1
    assert "Lines" in (copy.output / "out/report.html").read_text(encoding="utf-8")


def test_a_vit_is_trained_and_explained(tmp_path: Path) -> None:
    """A training step, and maps of both modes from the checkpoint that it leaves."""
    copy = Copy(tmp_path, "A ViT")
    (row,) = log_rows(copy.train())
    assert row["train_loss_cam2"] > 0
    code = (
        "from pathlib import Path; from dataset.photos import read_photo; from grounding.explain import ground; "
        "from grounding.load import open_model; opened = open_model('output/run/checkpoint_00.pth', device='cpu'); "
        "image = read_photo(Path('docs/images/scenes/100000.jpg')); "
        "print(*(ground(opened.explainer(mode), image, 'triangle').small.shape "
        "for mode in ('itm', 'itc')), opened.config.vision_model)"
    )
    assert copy.run("-c", code).splitlines()[-1] == "(6, 6) (6, 6) vit_tiny_patch16_224"
