"""Paths in configs, `--set` in every program, what a config is of, and sizes that do not fit."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import Pretrain
from config import (
    BertConfig,
    ConfigError,
    GroundingConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    load_any_config,
    load_config,
    save_config,
    size_problems,
)
from grounding import evaluate

ROOT = Path(__file__).parents[1]
TRAINING = {"train_file": ["a.json"], "image_root": "images"}
EVALUATION = {"test_file": ["a.json"], "image_root": "images"}


def write(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "some.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


def read(folder: Path, values: dict[str, Any], kind: type[ModelConfig] = PretrainConfig) -> Any:
    base = TRAINING if kind is PretrainConfig else EVALUATION
    return load_config(write(folder, base | values), kind)


# ---- environment variables and ~


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("$DATA/vg", "/big disk/vg"),
        ("${DATA}vg/$NAME.json", "/big diskvg/some.name.json"),
        ("$NAME$NAME", "some.namesome.name"),
        ("~/vg", "/home/me/vg"),
        ("~", "/home/me"),
        ("$HOMELY/vg", "/home/me/data/vg"),
        ("data/~vg", "data/~vg"),
        ("cost 5$", "cost 5$"),
        ("a$/b", "a$/b"),
        ("$EMPTY/vg", "/vg"),
        ("plain/path", "plain/path"),
    ],
)
def test_variables_and_home(text: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DATA", "/big disk"), ("NAME", "some.name"), ("HOMELY", "~/data"), ("EMPTY", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    assert read(tmp_path, {"image_root": text}).image_root == path


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((PretrainConfig, key) for key in ("train_file", "image_root", "bert_config", "vit_init")),
        *((GroundingConfig, key) for key in ("test_file", "image_root", "bert_config", "refcoco_data", "det_file")),
        *((GroundingConfig, f"{key}_file") for key in ("image_ids", "phrase_box", "sentences", "matching")),
    ],
)
def test_every_key_that_names_a_file_is_expanded(
    kind: type[ModelConfig], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_list = "list" in str(kind.model_fields[key].annotation)
    place = f"{key}.1" if is_list else key
    value = ["a", "$AMC_DATA/b"] if is_list else "$AMC_DATA/b"
    monkeypatch.delenv("AMC_DATA", raising=False)
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, {key: value}, kind)
    said = f"key '{place}': the environment variable AMC_DATA is not defined"
    assert str(refused.value) == f"{tmp_path / 'some.yaml'}: {said}"
    monkeypatch.setenv("AMC_DATA", "/d")
    assert getattr(read(tmp_path, {key: value}, kind), key) == (["a", "/d/b"] if is_list else "/d/b")


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    config = read(tmp_path, {"optimizer": {"opt": "~/$NOTHING"}, "schedular": {"sched": "$NOTHING"}})
    assert (config.optimizer.opt, config.schedular.sched) == ("~/$NOTHING", "$NOTHING")
    plain = [
        name
        for kind in (PretrainConfig, GroundingConfig, OptimizerConfig, ScheduleConfig)
        for name, field in kind.model_fields.items()
        if "str" in (kinds := f"{field.annotation} {field.metadata}") and "expand_path" not in kinds
    ]
    # A new key that names a file, and is not expanded, would be here too.
    assert plain == ["vision_model", "vision_model", "benchmark", "opt", "sched"]


@pytest.mark.parametrize(("text", "name"), [("${A B}/x", "A B"), ("${OPEN/x", "OPEN/x"), ("${}", ""), ("$_X", "_X")])
def test_what_is_no_variable(text: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"key 'image_root': the environment variable {name} is not defined"):
        read(tmp_path, {"image_root": text})


def test_the_saved_config_holds_the_paths_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/d")
    config = read(tmp_path, {"train_file": ["$DATA/a.json"]})
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.delenv("DATA")
    assert load_config(tmp_path / "saved.yaml", PretrainConfig) == config


# ---- --set


class Reached(Exception):
    """Carries the config to the test, in place of a run."""


WORDS = [
    *("--set", "image_res=48", "--set", "optimizer.lr=3e-4", "--set", "image_root=$AMC_IMAGES/x"),
    *("--set", "bert_config = other.json"),
]
EVALUATION_WORDS = [*("--set", "test_file=[a.json, 'b c.json']"), *("--set", "on_bbox=true")]
TRAINING_WORDS = [*("--set", "train_file=[a.json, 'b c.json']"), *("--set", "add_gcam=False", "--set", "amc.layer=9")]
SCRIPTS = ["grounding_eval_singlegpu.py", "grounding_eval_singlegpu_refclef.py", "grounding_eval_singlegpu_flickr.py"]


def reach(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, position: int) -> None:
    """Make a call of `owner.name` end the program, with its argument at `position`."""

    def stop(*arguments: Any) -> None:
        raise Reached(arguments[position])

    monkeypatch.setattr(owner, name, stop)


def assert_overridden(config: Any) -> None:
    assert (config.image_res, config.optimizer.lr, config.optimizer.weight_decay) == (48, 3e-4, 0.02)
    assert (config.image_root, config.bert_config) == ("/images/x", "other.json")


@pytest.mark.parametrize("script", SCRIPTS)
def test_set_in_evaluation(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMC_IMAGES", "/images")
    (tmp_path / "some.pth").touch()
    words = ["--checkpoint", str(tmp_path / "some.pth"), "--device", "cpu", *WORDS, *EVALUATION_WORDS]
    monkeypatch.setattr(sys, "argv", [script, *words])
    reach(monkeypatch, evaluate.Evaluation, "__init__", 2)
    with pytest.raises(Reached) as reached:
        runpy.run_path(script, run_name="__main__")
    (config,) = reached.value.args
    assert_overridden(config)
    assert (config.test_file, config.on_bbox) == (["a.json", "b c.json"], True)


def test_set_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMC_IMAGES", "/images")
    reach(monkeypatch, Pretrain, "Run", 1)
    with pytest.raises(Reached) as reached:
        Pretrain.main(Pretrain.parse_args(["--device", "cpu", *WORDS, *TRAINING_WORDS]))
    (config,) = reached.value.args
    assert_overridden(config)
    assert (config.train_file, config.add_gcam, config.amc.layer) == (["a.json", "b c.json"], False, 9)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_in_set_is_one_message(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "some.pth").touch()
    words = ["--checkpoint", str(tmp_path / "some.pth"), "--device", "cpu", "--set", "image_rez=1"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit, match=r"^error: .*unknown key 'image_rez'; did you mean 'image_res'\?$"):
        runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("image_root=2020-13-45", "--set image_root=2020-13-45: not a valid YAML value (month must be in 1..12)"),
        ("image_root=!!python/object:os.system x", "--set image_root=!!python/object:os.system x: not a valid YAML"),
        ("image_root=~", "key 'image_root': Input should be a valid string"),
    ],
)
def test_values_are_safe_yaml(item: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, TRAINING), PretrainConfig, [item])
    assert message in str(refused.value)


# ---- training or evaluation


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=str)
def test_shipped_configs_are_told_apart(path: Path) -> None:
    assert type(load_any_config(path)) is (PretrainConfig if path.name.startswith("Pretrain") else GroundingConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_root": "x", "mlm_probability": 0.1}, "key 'train_file' is missing"),
        ({"test_file": ["x"], "det_file": "y"}, "key 'image_root' is missing"),
        ({**TRAINING, "max_wrods": 3}, "unknown key 'max_wrods'; did you mean 'max_words'?"),
        ({**EVALUATION, "on_box": True}, "unknown key 'on_box'; did you mean 'on_bbox'?"),
        ({"image_root": "x"}, "cannot tell whether it is of training (train_file) or of evaluation (test_file"),
        ({"image_root": "x", "train_file": ["a"], "test_file": ["b"]}, "cannot tell"),
    ],
)
def test_a_config_of_neither_kind(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_any_config(write(tmp_path, values))
    assert message in str(refused.value)


def test_an_override_can_decide(tmp_path: Path) -> None:
    path = write(tmp_path, {"image_root": "x"})
    assert type(load_any_config(path, ["train_file=[a]"])) is PretrainConfig
    assert type(load_any_config(path, ["test_file=[a]"])) is GroundingConfig


def test_an_override_does_not_change_what_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'amc'"):
        load_any_config(write(tmp_path, {"image_root": "x", "test_file": ["a"]}), ["amc.layer=1", "max_words=3"])


# ---- sizes


@pytest.mark.parametrize(
    ("keys", "bert", "problems"),
    [
        ({}, {}, []),
        ({"vision_width": 12}, {}, ["vision_width is 12 but bert_config has encoder_width 8: the cross-attention"]),
        ({"image_res": 10}, {}, ["image_res is 10, which its patch_size of 4 does not divide"]),
        ({"vision_heads": 3}, {}, ["vision_width is 8, which its vision_heads of 3 does not divide"]),
        (
            {},
            {"num_attention_heads": 5},
            ["bert_config's hidden_size is 16, which its num_attention_heads of 5 does not divide"],
        ),
        ({}, {"fusion_layer": 3}, ["bert_config has fusion_layer 3 of 3 layers: none sees the image"]),
        ({"amc": {"layer": 0}}, {}, ["amc.layer is 0; the fusion layers are 1 to 2"]),
        ({"amc": {"layer": 3}}, {}, ["amc.layer is 3; the fusion layers are 1 to 2"]),
        ({"amc": {"layer": 3}, "add_gcam": False}, {}, []),
        ({"image_res": 10, "amc": {"layer": 9}}, {}, ["image_res is 10", "amc.layer is 9"]),
    ],
)
def test_sizes_that_do_not_fit(
    keys: dict[str, Any], bert: dict[str, Any], problems: list[str], tiny_config: Callable[..., Any]
) -> None:
    config = tiny_config(PretrainConfig, bert, **keys)
    found = size_problems(config, BertConfig.model_validate_json(Path(config.bert_config).read_text()))
    assert len(found) == len(problems)
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start)
