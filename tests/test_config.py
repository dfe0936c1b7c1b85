"""Configuration that loads: users' files and the shipped ones, paths, `--set`, saving."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from config import (
    ConfigError,
    GroundingConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    load_any_config,
    load_config,
    save_config,
)
from model_sizes import BertConfig, load_bert_config

CONFIGS = Path(__file__).parents[1] / "configs"
# The released files' keys and values, and no others.
RELEASED_PRETRAIN = """
train_file: ['data/vg_descriptions.json',
             'data/vg_attributes_spatial.json',
             'data/vg_attributes.json'
             ]
bert_config: 'configs/config_bert.json'
image_root: 'vg/'
image_res: 256
vision_width: 768
embed_dim: 256
batch_size: 64
temp: 0.07
mlm_probability: 0.15
queue_size: 65536
momentum: 0.995
alpha: 0.4
phrase_input: True
max_words: 50
add_gcam: True
mask_all: False
mask_size: 256
optimizer: {opt: adamW, lr: 1e-5, weight_decay: 0.02}
schedular: {sched: cosine, lr: 1e-5, epochs: 30, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-6, warmup_epochs: 20, cooldown_epochs: 0}
"""  # noqa: E501
RELEASED_GROUNDING = """
image_root: 'images/'
bert_config: 'configs/config_bert.json'
image_res: 384
batch_size: 8
queue_size: 65536
momentum: 0.995
vision_width: 768
embed_dim: 256
temp: 0.07
on_bbox: False
alpha: 0.4
distill: True
warm_up: True
optimizer: {opt: adamW, lr: 1e-5, weight_decay: 0.02}
schedular: {sched: cosine, lr: 1e-5, epochs: 10, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-5, warmup_epochs: 1, cooldown_epochs: 0}
"""  # noqa: E501
# The keys beyond the release's, with the published value, or the release's side of a quirk.
MODEL_DEFAULTS = """
patch_size: 16
vision_depth: 12
vision_heads: 12
vision_mlp_ratio: 4
vision_initializer_range: 0.02
"""
PRETRAIN_DEFAULTS = """
vit_init: null
mlm_distill_axis: sequence
negative_sharpness: 1
empty_captions: keep
max_tokens: 25
amc: {layer: 8, margin_mean: 0.1, margin_max: 0.5, weight_mean: 0.2, weight_max: 0.8, weights: {}, mean_over: batch, empty_box: zero_mask}
relation_file: []
relation_optimizer: {opt: adamW, lr: 1e-5, weight_decay: 0.02}
relation_schedular: {sched: cosine, lr: 1e-5, epochs: 30, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-6, warmup_epochs: 20, cooldown_epochs: 0, warmup_interval: 100, interval: epoch}
selfeq: {weight_similarity: 0, weight_consistency: 0, threshold: 0.8, floor: 0.4, over: batch, std_over: all, replace: text, rate: fixed}
augment: {kind: null, flip_prob: 0.5, flip_words: keep, grayscale_prob: 0.2, jitter_prob: 0.5, jitter: release, crop_scale: [0.2, 1], randaugment: true}
"""  # noqa: E501
SCHEDULE_DEFAULTS = {"warmup_interval": 100, "interval": "epoch"}
PARTS = ("val", "test")


def refer(name: str, **more: str | int | None) -> dict[str, Any]:
    files = {"test_file": [f"data/{name}/{name}_{part}.json" for part in PARTS], "refcoco_data": "data/refer"}
    return {**files, "det_file": f"data/{name}/dets.json", **more}


FLICKR = {
    "image_ids_file": [f"data/flickr30k/{part}.txt" for part in PARTS],
    "phrase_box_file": [f"data/flickr30k/bounding_boxes_{part}.json" for part in PARTS],
    "sentences_file": [f"data/flickr30k/sentences_{part}.json" for part in PARTS],
}
SHIPPED: dict[str, dict[str, Any]] = {  # what each Grounding_*.yaml holds beside the published model
    "refcoco": refer("refcoco+"),
    "refcoco_unc": refer("refcoco", refer_dataset="refcoco"),
    "refcocog": refer("refcocog", refer_dataset="refcocog", refer_split="umd"),
    "refclef": refer("refclef", det_file=None),
    "flickr": FLICKR | {"image_res": 256},
    "own": {"test_file": ["data/own/expressions.json"]},
    "vg": {
        "image_ids_file": ["data/vg/test.txt"],
        "image_data_file": "data/vg/image_data.json",
        "region_file": "data/vg/region_descriptions.json",
    },
    "blip": refer("refcoco+", model="blip", bert_config="configs/config_blip.json", block_num=6),
}


def written(tmp_path: Path, text: str | dict[str, Any]) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")  # JSON is YAML
    return path


def pretrain(tmp_path: Path, text: str = RELEASED_PRETRAIN, overrides: list[str] | None = None) -> PretrainConfig:
    return load_config(written(tmp_path, text), PretrainConfig, overrides)


# ---- the files users have


@pytest.mark.parametrize(
    ("kind", "released", "defaults"),
    [
        (PretrainConfig, RELEASED_PRETRAIN, MODEL_DEFAULTS + PRETRAIN_DEFAULTS),
        (GroundingConfig, RELEASED_GROUNDING, MODEL_DEFAULTS),
    ],
)
def test_released_files_load_with_the_published_defaults(
    kind: type[ModelConfig], released: str, defaults: str, tmp_path: Path
) -> None:
    expected = YAML(typ="safe").load(released + defaults)
    expected["schedular"] |= SCHEDULE_DEFAULTS
    loaded = load_config(written(tmp_path, released), kind).model_dump(mode="json")
    assert {key: loaded[key] for key in expected} == expected
    data = {"benchmark", "test_file", "refcoco_data", "refer_dataset", "refer_split", "det_file", "block_num"}
    data |= {*FLICKR, *SHIPPED["vg"], "matching_file", "metrics", "box_protocol"}
    assert loaded.keys() - expected.keys() == (data if kind is GroundingConfig else set())


def test_the_shipped_recipe_is_the_published_one(tmp_path: Path) -> None:
    shipped = load_config(CONFIGS / "Pretrain.yaml", PretrainConfig)
    assert shipped == pretrain(tmp_path).model_copy(update={"image_root": "data/vg/"})


@pytest.mark.parametrize(("data", "captions"), [("vg", "vg_descriptions"), ("coco", "coco_captions")])
def test_the_shipped_recipes_of_selfeq_differ_in_what_its_paper_says(data: str, captions: str, tmp_path: Path) -> None:
    files = [f"relation_file=[data/{data}_relations.json]", f"train_file=[data/{captions}.json]"]
    changes = [*files, f"image_root=data/{data}/", "batch_size=56", "schedular.warmup_epochs=10"]
    assert load_config(CONFIGS / f"Pretrain_{data}.yaml", PretrainConfig) == pretrain(tmp_path, overrides=changes)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_grounding_files(name: str, tmp_path: Path) -> None:
    shipped = load_config(CONFIGS / f"Grounding_{name}.yaml", GroundingConfig)
    released = load_config(written(tmp_path, RELEASED_GROUNDING), GroundingConfig)
    others = {"benchmark", "image_root", "schedular"}
    expected = released.model_copy(update=SHIPPED[name])
    assert shipped.model_dump(exclude=others) == expected.model_dump(exclude=others)
    assert released.block_num == 8


def test_no_shipped_file_is_left_out() -> None:
    tested = {
        *(f"Pretrain{data}.yaml" for data in ("", "_vg", "_coco")),
        *(f"Grounding_{name}.yaml" for name in SHIPPED),
    }
    assert {path.name for path in CONFIGS.glob("*.yaml")} == tested


def test_required_keys_of_a_benchmark(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, {"image_root": "", **refer("refclef", det_file="x")}), GroundingConfig)
    config.require("test_file", "det_file")
    with pytest.raises(ConfigError, match="lacks 'phrase_box_file', which this benchmark needs"):
        config.require("test_file", "phrase_box_file", "sentences_file")


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "1.0e-5", "0.00001"])
def test_numbers_are_numbers_however_yaml_reads_them(tmp_path: Path, text: str) -> None:
    config = pretrain(tmp_path, RELEASED_PRETRAIN.replace("lr: 1e-5, weight", f"lr: {text}, weight"))
    assert config.optimizer.lr == 1e-5


def test_shipped_bert_config() -> None:
    config = load_bert_config(CONFIGS / "config_bert.json")
    assert config == BertConfig(fusion_layer=6, encoder_width=768)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (768, 12, 12)
    assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (30522, 512, 2)
    assert (config.layer_norm_eps, config.initializer_range, config.pad_token_id) == (1e-12, 0.02, 0)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (config.hidden_act, config.intermediate_size) == ("gelu", 3072)


def test_bert_config_may_hold_more_than_we_read(tmp_path: Path) -> None:
    path = tmp_path / "config_bert.json"
    path.write_text(json.dumps({"fusion_layer": 2, "encoder_width": 8, "use_cache": True, "architectures": ["x"]}))
    assert load_bert_config(path) == BertConfig(fusion_layer=2, encoder_width=8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path: Path, encoding: str) -> None:
    expected = pretrain(tmp_path)
    text = "\ufeff" + RELEASED_PRETRAIN.replace("\n", "\r\n")
    (tmp_path / "some.yaml").write_bytes(text.encode(encoding))
    assert load_config(tmp_path / "some.yaml", PretrainConfig) == expected
    text = '\ufeff{"fusion_layer": 2,\r\n"encoder_width": 8}\r\n'
    (tmp_path / "bert.json").write_bytes(text.encode(encoding))
    assert load_bert_config(tmp_path / "bert.json") == BertConfig(fusion_layer=2, encoder_width=8)


def test_config_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    config = pretrain(tmp_path)
    with pytest.raises(ValidationError):
        config.alpha = 0.5
    with pytest.raises(ValidationError):
        config.amc.layer = 3


@pytest.mark.parametrize(
    ("key", "release", "other"),
    [
        ("amc.mean_over", "batch", "sample"),
        ("amc.empty_box", "zero_mask", "no_box"),
        ("augment.flip_words", "keep", "swap"),
        ("augment.jitter", "release", "standard"),
        ("mlm_distill_axis", "sequence", "vocabulary"),
        ("empty_captions", "keep", "drop"),
    ],
)
def test_quirks_have_two_values_and_the_shipped_config_names_the_release_s(key: str, release: str, other: str) -> None:
    path, name = CONFIGS / "Pretrain.yaml", key.rpartition(".")[2]
    assert f"{name}: {release}" in path.read_text(encoding="utf-8")  # written there, not a silent default
    load_config(path, PretrainConfig, [f"{key}={other}"])
    with pytest.raises(ConfigError, match=f"{release}' or '{other}'"):
        load_config(path, PretrainConfig, [f"{key}=neither"])


# ---- training or evaluation


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_told_apart(path: Path) -> None:
    assert type(load_any_config(path)) is (PretrainConfig if path.name.startswith("Pretrain") else GroundingConfig)


def test_an_override_can_decide_but_not_change_what_a_file_is(tmp_path: Path) -> None:
    path = written(tmp_path, {"image_root": "x"})
    assert type(load_any_config(path, ["train_file=[a]"])) is PretrainConfig
    assert type(load_any_config(path, ["test_file=[a]"])) is GroundingConfig
    path = written(tmp_path, {"image_root": "x", "test_file": ["a"]})
    with pytest.raises(ConfigError, match="unknown key 'amc'"):
        load_any_config(path, ["amc.layer=1", "max_words=3"])


# ---- paths: environment variables and ~


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("$DATA/vg", "/big disk/vg"),
        ("${DATA}vg/$NAME.json", "/big diskvg/some.name.json"),
        ("$NAME$NAME", "some.namesome.name"),
        ("~/vg", "/home/me/vg"),
        ("~", "/home/me"),
        ("$HOMELY/vg", "/home/me/data/vg"),
        ("$EMPTY/vg", "/vg"),
        *((same, same) for same in ("data/~vg", "cost 5$", "a$/b", "plain/path")),
    ],
)
def test_variables_and_home(text: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DATA", "/big disk"), ("NAME", "some.name"), ("HOMELY", "~/data"), ("EMPTY", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(written(tmp_path, {"train_file": [text], "image_root": text}), PretrainConfig)
    assert (config.image_root, config.train_file) == (path, [path])


@pytest.mark.parametrize(("text", "name"), [("${A B}/x", "A B"), ("${OPEN/x", "OPEN/x"), ("${}", ""), ("$_X", "_X")])
def test_a_variable_that_is_not_defined(text: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"key 'train_file\.1': the environment variable {name} is not defined"):
        load_config(written(tmp_path, {"train_file": ["a", text], "image_root": ""}), PretrainConfig)


def test_every_key_that_names_a_file_is_expanded() -> None:
    kinds = (PretrainConfig, GroundingConfig, OptimizerConfig, ScheduleConfig)
    fields = [field for kind in kinds for field in kind.model_fields.items()]
    texts = {name: f"{field.annotation} {field.metadata}" for name, field in fields}
    plain = {name for name, kind in texts.items() if "str" in kind and "expand_path" not in kind}
    # A new key that names a file, and is not expanded, would be here too.
    assert plain == {"vision_model", "benchmark", "opt", "sched", "metrics"}


def test_the_saved_config_is_whole_and_holds_the_paths_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/d")
    overrides = ["amc.layer=7", "optimizer.lr=3e-7", "augment.crop_scale=[0.3, 0.9]", "train_file=[$DATA/a.json]"]
    config = pretrain(tmp_path, overrides=overrides)
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.delenv("DATA")
    assert load_config(tmp_path / "saved.yaml", PretrainConfig) == config
    text = (tmp_path / "saved.yaml").read_text()
    for default in ("mlm_distill_axis: sequence", "mean_over: batch", "warmup_interval: 100", "vision_depth: 12"):
        assert default in text
    grounding = load_config(CONFIGS / "Grounding_flickr.yaml", GroundingConfig)
    save_config(grounding, tmp_path / "grounding.yaml")
    assert load_config(tmp_path / "grounding.yaml", GroundingConfig) == grounding


# ---- --set


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        *("batch_size=4", "optimizer.lr=1e-4", "amc.layer=3", "amc.mean_over=sample", "train_file=[a.json, b.json]"),
        *("image_root=a=b", "add_gcam=False", " augment.crop_scale =[0.5, 1]", "amc.layer=4", "vit_init="),
    ]
    config = pretrain(tmp_path, RELEASED_PRETRAIN + "vit_init: deit.pth\n", overrides)
    assert (config.batch_size, config.optimizer.lr, config.add_gcam) == (4, 1e-4, False)
    assert (config.amc.layer, config.amc.mean_over) == (4, "sample")  # the last one counts
    assert (config.train_file, config.image_root) == (["a.json", "b.json"], "a=b")
    assert config.augment.crop_scale == (0.5, 1)
    assert (config.optimizer.opt, config.optimizer.weight_decay) == ("adamW", 0.02)  # the rest of the section stays
    assert (config.amc.margin_mean, config.alpha) == (0.1, 0.4)
    assert config.vit_init is None  # nothing means none
