"""Configuration that does not load: what is no config, keys, values and sizes that do not fit, each named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError, PretrainConfig, load_any_config, load_config, naming
from model_sizes import load_bert_config, size_problems

TRAINING = {"train_file": ["a.json"], "image_root": "images"}
EVALUATION = {"test_file": ["a.json"], "image_root": "images"}


def refusal(load: Callable[..., object], path: Path, content: Any, *more: Any) -> str:
    """What loading a file of this content is refused with, without the file's name, which each line begins with."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError) as refused:
        load(path, *more)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith((f"{path}: ", "--set "))
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train_file: []", "key 'image_root' is missing"),
        (b"train_file: [unclosed\nimage_root: x", "not valid YAML: while parsing a flow sequence"),
        (b"image_root: 2020-13-45", "not valid YAML: month must be in 1..12"),
        *((text, "expected 'key: value' lines, found ") for text in (b"", b"- 1\n- 2\n", b"just words", b"3")),
        (b"\x80\x81\xff", "not a text file"),
        (gzip.compress(b"alpha: 1", mtime=0), "not a text file (it is compressed by gzip: unpack it first"),
        (None, "cannot read the config (No such file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    assert refusal(load_config, tmp_path / "some.yaml", content, PretrainConfig).startswith(message)


def test_a_repeated_key(tmp_path: Path) -> None:
    said = refusal(load_config, tmp_path / "some.yaml", b"alpha: 0.1\nalpha: 0.1\n", PretrainConfig)
    assert 'duplicate key "alpha"' in said


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "{a: " * 3000, "? [a]\n: b", "!!python/object:os.system {}", "!!binary [1]", "%YAML 1.5\n--- a"],
)
def test_odd_yaml_is_one_message(tmp_path: Path, text: str) -> None:
    """Some makes ruamel.yaml raise errors that are not its own."""
    path = tmp_path / "some.yaml"
    assert refusal(load_config, path, text.encode(), PretrainConfig)
    said = refusal(load_config, path, TRAINING, PretrainConfig, [f"alpha={text}"])
    assert said.startswith(("--set alpha=", "key 'alpha'"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"fusion_layer": 6, "fusion_layer": 7}', "an object holds the key 'fusion_layer' more than once"),
        (b"[" * 100_000, "lists or objects are nested too deeply"),
        (b"9" * 5000, "an integer has thousands of digits"),
        (b"[]", "key '"),
        ({"encoder_width": 8}, "key 'fusion_layer' is missing"),
        *(({"fusion_layer": bad, "encoder_width": 8}, "key 'fusion_layer': ") for bad in ("six", -1)),
        *(
            ({"fusion_layer": 6, "encoder_width": 8, key: bad}, f"key '{key}': ")
            for key, values in {
                **dict.fromkeys(("vocab_size", "num_hidden_layers", "intermediate_size"), (0,)),
                **dict.fromkeys(("max_position_embeddings", "hidden_size", "num_attention_heads"), (0,)),
                **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), (-0.1, 1, 2)),
                "layer_norm_eps": (0, -1),
                "pad_token_id": (-1, None),
                "hidden_act": ("relu",),
            }.items()
            for bad in values
        ),
        (b"\x80\x81\xff", "not a text file"),
        (None, "cannot read bert_config"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_bert_config(tmp_path: Path, content: Any, message: str) -> None:
    assert refusal(load_bert_config, tmp_path / "config_bert.json", content).startswith(message)


# ---- keys


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_rez", 256, "unknown key 'image_rez'; did you mean 'image_res'?"),
        ("scheduler", {"sched": "cosine"}, "unknown key 'scheduler'; did you mean 'schedular'?"),
        ("amc", {"margin_man": 1}, "unknown key 'amc.margin_man'; did you mean 'amc.margin_mean'?"),
        ("augment", {"flip_porb": 1}, "unknown key 'augment.flip_porb'; did you mean 'augment.flip_prob'?"),
        ("flip_words", "swap", "unknown key 'flip_words'; did you mean 'augment.flip_words'?"),
        ("zzzzzz", 1, "unknown key 'zzzzzz'"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, value: Any, message: str) -> None:
    assert refusal(load_config, tmp_path / "some.yaml", {**TRAINING, key: value}, PretrainConfig) == message


def test_every_problem_is_listed(tmp_path: Path) -> None:
    wrong = {"train_file": [], "image_rez": 1, "alpha": "high"}
    said = refusal(load_config, tmp_path / "some.yaml", wrong, PretrainConfig)
    assert sorted(line.split("'")[1] for line in said.splitlines()) == ["alpha", "image_rez", "image_root"]


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
    assert refusal(load_any_config, tmp_path / "some.yaml", values).startswith(message)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("batch_size", "--set batch_size: write key=value"),
        ("alpha.x=1", "--set alpha.x=1: 'alpha' is a single value, not a section"),
        ("amc.layr=1", "unknown key 'amc.layr'; did you mean 'amc.layer'?"),
        ("batch_size=many", "key 'batch_size'"),
        ("train_file=[a", "--set train_file=[a: not valid YAML"),
        ("image_root=2020-13-45", "--set image_root=2020-13-45: not valid YAML: month must be in 1..12"),
        ("image_root=~", "key 'image_root': Input should be a valid string"),
    ],
)
def test_bad_overrides(tmp_path: Path, item: str, message: str) -> None:
    values = {**TRAINING, "alpha": 0.4}
    assert refusal(load_config, tmp_path / "some.yaml", values, PretrainConfig, [item]).startswith(message)


# ---- values that make no sense


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("temp", "optimizer.lr", "momentum", "alpha") for value in (".inf", "-.inf", ".nan")),
        *(("temp", value) for value in ("0", "-0.07")),
        *((f"amc.{name}", value) for name in ("weight_mean", "weight_max") for value in ("-0.1", ".inf", ".nan")),
        *((f"amc.{name}", ".nan") for name in ("margin_mean", "margin_max")),
        *(("amc.weights", f"{{some_loss: {value}}}") for value in ("-0.1", ".nan", "True", "much")),
        *(("vision_mlp_ratio", value) for value in ("0", "-1", ".inf")),
        *(
            ("augment.crop_scale", value)
            for value in ("[1.0, 0.2]", "[0, 1]", "[-1, 1]", "[0.2, 1.5]", "[0.2]", "[.nan, 1]")
        ),
        *(("batch_size", value) for value in ("True", "1", "2.5", "")),
        *(("image_res", value) for value in ("0", "yes", "[256]", "large", "3.5")),
        *(("momentum", value) for value in ("1.1", "-0.1")),
        ("amc.layer", "-1"),
        ("amc", "3"),
        ("augment.flip_prob", "1.5"),
        ("image_root", ""),
        *(("add_gcam", value) for value in ("perhaps", "2")),
        *(("schedular.decay_rate", value) for value in ("0", "-1")),
        ("schedular.cooldown_epochs", "-1"),
        ("schedular.epochs", "0"),
        ("optimizer.weight_decay", "-1"),
        ("train_file", "vg.json"),
    ],
)
def test_a_value_that_makes_no_sense_names_file_and_key(tmp_path: Path, key: str, value: str) -> None:
    said = refusal(load_config, tmp_path / "some.yaml", TRAINING, PretrainConfig, [f"{key}={value}"])
    assert said.startswith(f"key '{key}")
    assert len(said.splitlines()) == 1


def test_an_error_that_only_the_use_of_a_config_brings_up_names_its_file() -> None:
    with pytest.raises(ConfigError, match=r"^a\.yaml: two\na\.yaml: lines$"), naming("a.yaml"):
        raise ConfigError("two\nlines")
    with pytest.raises(ConfigError, match=r"^a\.yaml: known$"), naming("a.yaml"):
        raise ConfigError("a.yaml: known")


# ---- sizes


@pytest.mark.parametrize(
    ("keys", "bert", "problems"),
    [
        ({}, {}, []),
        ({"vision_width": 12}, {}, ["vision_width is 12 but bert_config has encoder_width 8: the cross-attention"]),
        ({"image_res": 10}, {}, ["image_res is 10, which its patch_size of 4 does not divide"]),
        ({"vision_heads": 3}, {}, ["vision_width is 8, which its vision_heads of 3 does not divide"]),
        ({"vision_mlp_ratio": 0.01}, {}, ["vision_mlp_ratio is 0.01"]),
        (
            {},
            {"num_attention_heads": 5},
            ["bert_config's hidden_size is 16, which its num_attention_heads of 5 does not divide"],
        ),
        ({}, {"pad_token_id": 30}, ["bert_config has pad_token_id 30, and vocab_size is 30"]),
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
    found = size_problems(config, load_bert_config(config.bert_config))
    assert len(found) == len(problems)
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start)
