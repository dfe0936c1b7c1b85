"""What the page begins with: checkpoints and example pictures."""

import json
from pathlib import Path

import pytest

from dataset.scenes.paths import SHIPPED, SHIPPED_AMC, SHOWN
from grounding.web.examples import Offer, examples, offered
from utils import UserError


def test_checkpoints_of_the_page(tmp_path: Path) -> None:
    shipped = [Offer("stage 1 (before AMC)", SHIPPED, "configs/scenes/Grounding_refcoco.yaml")]
    shipped.append(Offer("AMC", SHIPPED_AMC))
    assert offered(demo=tmp_path) == shipped
    for name in ("amc/checkpoint_00.pth", "amc/checkpoint_02.pth", "control/checkpoint_01.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    control, trained = tmp_path / "control/checkpoint_01.pth", tmp_path / "amc/checkpoint_02.pth"
    left = [Offer("make demo: control", control), Offer("make demo: AMC", trained)]
    assert offered(demo=tmp_path) == [*shipped, *left]
    assert [offer.config for offer in offered(config="my.yaml", demo=tmp_path)] == ["my.yaml"] * 4


def test_checkpoints_that_are_named(tmp_path: Path) -> None:
    one, two = tmp_path / "a/checkpoint_01.pth", tmp_path / "b/checkpoint_01.pth"
    for path in (one, two):
        path.parent.mkdir()
        path.touch()
    assert offered([str(one), str(two), str(SHIPPED), str(one)]) == [
        Offer("a/checkpoint_01.pth", one),
        Offer("b/checkpoint_01.pth", two),
        Offer("checkpoints/scenes_stage1.safetensors", SHIPPED, "configs/scenes/Grounding_refcoco.yaml"),
    ]
    assert offered([str(SHIPPED)], "my.yaml") == [Offer("scenes_stage1.safetensors", SHIPPED, "my.yaml")]
    with pytest.raises(UserError, match=r"none\.pth: no such checkpoint"):
        offered([str(tmp_path / "none.pth")])


def test_examples() -> None:
    found = examples()
    names = [f"scene {number}" for number in range(1, 5)] + ["astronaut", "coffee", "cat", "rocket"]
    assert [example.name for example in found] == names
    assert all(example.phrases and example.path.is_file() for example in found)
    assert [bool(example.credit) for example in found] == [False] * 4 + [True] * 4
    known = {(entry["image"], entry["text"]) for entry in json.loads((SHOWN / "phrases.json").read_text())}
    assert {(example.path.name, phrase) for example in found[:4] for phrase in example.phrases} <= known
