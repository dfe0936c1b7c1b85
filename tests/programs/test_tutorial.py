"""The pages of docs/ that tell how: their files load, their commands are read by the programs, their pictures exist."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import demo
import prepare
import Pretrain
from config import GroundingConfig, PretrainConfig, load_any_config, load_config
from dataset import vg
from dataset.scenes.world import Scene, draw_scene
from docs import figures
from grounding import evaluate
from grounding.benchmarks import OWN, REFCOCO_PLUS, benchmark_of
from models import amc

DOCS = Path("docs")
PAGES = ("tutorial.md", "gradcam.md", "demo.md")
SHAPES = {"shape": ("circle", "square", "triangle", "star", "cross"), "size": ("small", "big")}
SHAPES["colour"] = ("red", "green", "blue", "yellow", "purple", "orange")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the tutorial has its reader write, and white images of the scenes' sizes."""
    folder = tmp_path_factory.mktemp("own")
    found = re.findall(r"`data/own/([\w.]+)`:\n\n```\w*\n(.*?)```", page("tutorial.md"), flags=re.DOTALL)
    assert [name for name, _ in found] == ["phrases.json", "expressions.json"]
    for name, text in found:
        (folder / name).write_text(text)
    (folder / "images").mkdir()
    for index in range(4000, 4011):
        scene = scene_of(index)
        Image.new("RGB", (scene.width, scene.height), "white").save(folder / "images" / f"{index:06d}.jpg")
    return folder


def scene_of(index: int | str) -> Scene:
    """The training scene of an index or of a file, as `prepare.py scenes data/scenes` draws it."""
    return draw_scene(np.random.default_rng([0, 0, int(Path(str(index)).stem)]))


def shown(image: str, phrase: str) -> list[list[int]]:
    """The boxes [x1, y1, x2, y2] of the things that a plain phrase ("a big star") is true of."""
    said = {key: [word for word in phrase.split() if word in words] for key, words in SHAPES.items()}
    assert sum(map(len, said.values())) >= 1, phrase
    fitting = [t for t in scene_of(image).things if all(w == getattr(t, k) for k, words in said.items() for w in words)]
    return [list(thing.box) for thing in fitting]


def test_the_training_file(own: Path) -> None:
    words = [f"image_root={own / 'images'}", f"train_file=[{own / 'phrases.json'}]"]
    config = load_config("configs/scenes/Pretrain.yaml", PretrainConfig, words)
    entries = vg.load_entries(own / "phrases.json", config)
    assert len(entries) == 8
    for entry in entries:
        for caption in entry.captions:
            assert sorted(shown(entry.image.name, caption)) == sorted(entry.boxes), caption
    assert not {"004008", "004010"} & {entry.image.stem for entry in entries}  # what is evaluated is not trained on
    data = vg.TrainingData(config, seed=0)
    assert all(data[index].has_box for index in range(len(data)))


def test_the_file_of_evaluation(own: Path) -> None:
    expressions = OWN.load(GroundingConfig(test_file=[str(own / "expressions.json")], image_root=str(own / "images")))
    assert [one.split for one in expressions] == ["test"] * 4
    for one in expressions:
        scene = scene_of(one.image.name)
        assert one.size == (scene.height, scene.width)
        corners = [[x, y, x + w, y + h] for x, y, w, h in one.boxes.tolist()]
        assert sorted(corners) == sorted(shown(one.image.name, one.text)), one.text


# ---- commands


def commands(name: str) -> list[list[str]]:
    """The command lines of a page's sh blocks, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page(name), flags=re.DOTALL)
    lines = itertools.chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def read_by_its_program(words: list[str]) -> str:
    """Let the program's own parser and config reader take a command; returns what the program is called."""
    words = words[1:] if words[0] == "python" else words
    if words[0] == "torchrun":
        words = words[2:]
    program, options = words[0], words[1:]
    assert Path(program).is_file(), program
    if program == "Pretrain.py":
        args: Any = Pretrain.parse_args(options)
        load_config(args.config, PretrainConfig, args.set)
    elif program.startswith("grounding_eval"):
        script = REFCOCO_PLUS if program == "grounding_eval_singlegpu.py" else None
        args = evaluate.parse_args(script, options)
        benchmark_of(load_config(*args.config, GroundingConfig, args.set), script)
    elif program == "prepare.py":
        args = prepare.parse_args(options)
        for config in args.configs:
            load_any_config(config, args.set)
    elif program == "demo.py":
        assert len(demo.parse_args(options).image_and_phrases) > 1
    elif program == "docs/figures.py":
        assert figures.question(figures.parse_args(options)) == figures.EXAMPLES[options[0]]
    else:
        assert program == "plot_log.py"
        assert options[1] == "--output"
    return program


def test_the_tutorials_commands() -> None:
    found = [read_by_its_program(words) for words in commands("tutorial.md")]
    assert found == [
        *("demo.py", "prepare.py", "Pretrain.py", "Pretrain.py", "plot_log.py"),
        *("prepare.py", "grounding_eval.py", "grounding_eval.py"),
        *("grounding_eval_singlegpu.py", "demo.py"),
    ]


def test_each_figure_stands_with_its_command() -> None:
    text = page("gradcam.md")
    pairs = re.findall(r"\]\(images/(\w+)\.png\)\n\n```sh\npython docs/figures\.py (\w+)\n```", text)
    assert [picture for picture, _ in pairs] == [command for _, command in pairs] == list(figures.EXAMPLES)
    for words in commands("gradcam.md"):
        read_by_its_program(words)


# ---- what the pages say


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page(name))
    assert links
    for link in links:
        assert (DOCS / link).is_file(), link


def test_the_table_of_amcs_settings() -> None:
    """docs/gradcam.md against the release's defaults and the scenes' config."""
    rows = re.findall(r"\n\| `(\w+)`[^|]*\| (\w[\w.]*) \| (\w[\w.]*) \|", page("gradcam.md"))
    release = load_config("configs/Pretrain.yaml", PretrainConfig).amc.model_dump()
    scenes = load_config("configs/scenes/Pretrain.yaml", PretrainConfig).amc.model_dump()
    assert {key for key, *_ in rows} == set(release) - {"empty_box", "weights"}
    for key, *values in rows:
        for value, config in zip(values, (release, scenes), strict=True):
            known = config[key]
            assert (value if isinstance(known, str) else float(value)) == known, key


def test_names_of_code_that_the_page_mentions() -> None:
    for name in ("gradcam", "token_gradcam", "normalise_map", "resize", "mean_margin_loss", "max_margin_loss"):
        assert f"`{name}`" in page("gradcam.md")
        assert callable(getattr(amc, name))
    for folder, layers in (("configs", (6, 12)), ("configs/scenes", (2, 5))):
        bert = json.loads(Path(folder, "config_bert.json").read_text())
        assert (bert["fusion_layer"], bert["num_hidden_layers"]) == layers
