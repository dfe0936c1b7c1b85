"""Configuration: what users' files hold loads, and what does not load is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from config import (
    AMCConfig,
    AugmentConfig,
    BertConfig,
    ConfigError,
    GroundingConfig,
    ModelConfig,
    PretrainConfig,
    load_bert_config,
    load_config,
    naming,
    save_config,
    size_problems,
)

CONFIGS = Path(__file__).parents[1] / "configs"
REFERRED = {  # what each reads of REFER's: dataset and split
    "Grounding_refcoco.yaml": ("refcoco+", "unc"),
    "Grounding_refcoco_unc.yaml": ("refcoco", "unc"),
    "Grounding_refcocog.yaml": ("refcocog", "umd"),
}
GROUNDING = (*REFERRED, "Grounding_refclef.yaml", "Grounding_flickr.yaml", "Grounding_own.yaml")

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
REFER_KEYS = """
test_file: ['val.json', 'test.json']
refcoco_data: 'data'
det_file: 'data/dets.json'
"""
FLICKR_KEYS = """
image_ids_file: ['val.txt', 'test.txt']
phrase_box_file: ['bounding_boxes_val.json', 'bounding_boxes_test.json']
sentences_file: ['sentences_val.json', 'sentences_test.json']
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def pretrain(tmp_path: Path, text: str = RELEASED_PRETRAIN, overrides: list[str] | None = None) -> PretrainConfig:
    return load_config(write(tmp_path, text), PretrainConfig, overrides)


def assert_published_model(config: ModelConfig) -> None:
    assert (config.vision_width, config.vision_depth, config.vision_heads, config.vision_mlp_ratio) == (768, 12, 12, 4)
    assert (config.patch_size, config.embed_dim, config.temp) == (16, 256, 0.07)
    assert (config.queue_size, config.momentum, config.alpha) == (65536, 0.995, 0.4)
    assert (config.optimizer.opt, config.optimizer.lr, config.optimizer.weight_decay) == ("adamW", 1e-5, 0.02)


def assert_published_recipe(config: PretrainConfig) -> None:
    """The values of the published recipe, and the release's side of every quirk."""
    assert_published_model(config)
    names = ("vg_descriptions", "vg_attributes_spatial", "vg_attributes")
    assert config.train_file == [f"data/{name}.json" for name in names]
    assert (config.image_res, config.batch_size, config.mask_size, config.max_words) == (256, 64, 256, 50)
    assert (config.mlm_probability, config.max_tokens) == (0.15, 25)
    assert (config.phrase_input, config.add_gcam, config.mask_all, config.vit_init) == (True, True, False, None)
    assert (config.negative_sharpness, config.empty_captions) == (1, "keep")
    schedule = config.schedular
    assert (schedule.sched, schedule.epochs, schedule.warmup_epochs, schedule.cooldown_epochs) == ("cosine", 30, 20, 0)
    assert (schedule.lr, schedule.min_lr, schedule.warmup_lr, schedule.decay_rate) == (1e-5, 1e-6, 1e-6, 1)
    assert schedule.warmup_interval == 100
    amc = config.amc
    assert (amc.layer, amc.margin_mean, amc.margin_max, amc.weight_mean, amc.weight_max) == (8, 0.1, 0.5, 0.2, 0.8)
    augment = config.augment
    assert (augment.flip_prob, augment.grayscale_prob, augment.jitter_prob) == (0.5, 0.2, 0.5)
    assert (augment.crop_scale, augment.randaugment) == ((0.2, 1.0), True)
    assert (amc.mean_over, amc.empty_box, config.mlm_distill_axis) == ("batch", "zero_mask", "sequence")
    assert (augment.flip_words, augment.jitter) == ("keep", "release")


# ---- the files users have


def test_shipped_pretrain_yaml_is_the_published_recipe() -> None:
    assert_published_recipe(load_config(CONFIGS / "Pretrain.yaml", PretrainConfig))


def test_released_pretrain_yaml_loads_with_the_published_defaults(tmp_path: Path) -> None:
    config = pretrain(tmp_path)
    assert_published_recipe(config)
    assert config.image_root == "vg/"
    assert isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize("name", GROUNDING)
def test_shipped_grounding_yaml(name: str) -> None:
    config = load_config(CONFIGS / name, GroundingConfig)
    assert_published_model(config)
    assert config.image_res == (256 if "flickr" in name else 384)
    assert (config.batch_size, config.on_bbox, config.distill, config.warm_up) == (8, False, True, True)
    if "flickr" in name:
        config.require("image_ids_file", "phrase_box_file", "sentences_file")
        assert len(config.image_ids_file) == len(config.phrase_box_file) == len(config.sentences_file) == 2
    else:
        config.require("test_file", *([] if "own" in name else ["refcoco_data"]))
    assert bool(config.det_file) == ("refcoco" in name)


@pytest.mark.parametrize("name", REFERRED)
def test_shipped_configs_of_refcoco_and_its_like(name: str) -> None:
    config = load_config(CONFIGS / name, GroundingConfig)
    dataset, split = REFERRED[name]
    assert (config.refer_dataset, config.refer_split) == (dataset, split)
    assert config.test_file == [f"data/{dataset}/{dataset}_{part}.json" for part in ("val", "test")]
    assert (config.refcoco_data, config.det_file) == ("data/refer", f"data/{dataset}/dets.json")
    same = load_config(CONFIGS / "Grounding_refcoco.yaml", GroundingConfig)
    own = {"benchmark", "refer_dataset", "refer_split", "test_file", "det_file"}
    assert config.model_dump(exclude=own) == same.model_dump(exclude=own)


@pytest.mark.parametrize("more", [REFER_KEYS, FLICKR_KEYS])
def test_released_grounding_yaml_loads(tmp_path: Path, more: str) -> None:
    config = load_config(write(tmp_path, RELEASED_GROUNDING + more), GroundingConfig)
    assert_published_model(config)
    assert (config.image_res, config.schedular.epochs, config.schedular.warmup_lr) == (384, 10, 1e-5)
    if more == REFER_KEYS:
        assert (config.test_file, config.refcoco_data) == (["val.json", "test.json"], "data")
        assert (config.refer_dataset, config.refer_split) == ("refcoco+", "unc")
        assert config.det_file == "data/dets.json"
    else:
        assert config.image_ids_file == ["val.txt", "test.txt"]
        assert config.phrase_box_file == ["bounding_boxes_val.json", "bounding_boxes_test.json"]
        assert config.sentences_file == ["sentences_val.json", "sentences_test.json"]


def test_no_shipped_file_is_left_out() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {"Pretrain.yaml", *GROUNDING}  # those tested above


def test_required_keys_of_a_benchmark(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RELEASED_GROUNDING + REFER_KEYS), GroundingConfig)
    config.require("test_file", "det_file")
    with pytest.raises(ConfigError, match="lacks 'phrase_box_file', which this benchmark needs"):
        config.require("test_file", "phrase_box_file", "sentences_file")


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "1.0e-5", "0.00001"])
def test_numbers_are_numbers_however_yaml_reads_them(tmp_path: Path, text: str) -> None:
    config = pretrain(tmp_path, RELEASED_PRETRAIN.replace("lr: 1e-5, weight", f"lr: {text}, weight"))
    assert config.optimizer.lr == 1e-5


def test_shipped_bert_config() -> None:
    config = load_bert_config(CONFIGS / "config_bert.json")
    assert (config.fusion_layer, config.encoder_width, config.num_hidden_layers) == (6, 768, 12)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
    assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (30522, 512, 2)
    assert (config.layer_norm_eps, config.initializer_range, config.pad_token_id) == (1e-12, 0.02, 0)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert config.hidden_act == "gelu"


# ---- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("image_rez: 256", "unknown key 'image_rez'; did you mean 'image_res'?"),
        ("scheduler: {sched: cosine}", "unknown key 'scheduler'; did you mean 'schedular'?"),
        ("amc: {margin_man: 1}", "unknown key 'amc.margin_man'; did you mean 'amc.margin_mean'?"),
        ("augment: {flip_porb: 1}", "unknown key 'augment.flip_porb'; did you mean 'augment.flip_prob'?"),
        ("flip_words: swap", "unknown key 'flip_words'; did you mean 'augment.flip_words'?"),
        ("zzzzzz: 1", "unknown key 'zzzzzz'"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        pretrain(tmp_path, RELEASED_PRETRAIN + line)
    assert str(error.value) == f"{tmp_path / 'some.yaml'}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train_file: []", "key 'image_root' is missing"),
        (b"train_file: [unclosed\nimage_root: x", "not valid YAML"),
        (b"alpha: 0.1\nalpha: 0.1\n", 'not valid YAML(.|\n)*duplicate key "alpha"'),
        (b"image_root: 2020-13-45", r"not valid YAML: month must be in 1\.\.12"),
        *((text, r"expected 'key: value' lines, found \w+") for text in (b"", b"- 1\n- 2\n", b"just words", b"3")),
        (b"\x80\x81\xff", "not a text file"),
        (gzip.compress(b"alpha: 1"), r"not a text file \(it is compressed by gzip: unpack it first"),
        (None, "cannot read the config"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "some.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"some\.yaml: {message}"):
        load_config(path, PretrainConfig)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        pretrain(tmp_path, "train_file: []\nimage_rez: 1\nalpha: high\n")
    lines = str(error.value).split("\n")
    assert len(lines) == 3
    assert all("some.yaml: " in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (
            '{"fusion_layer": 6, "encoder_width": 8, "fusion_layer": 7}',
            "an object holds the key 'fusion_layer' more than",
        ),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "an integer has thousands of digits"),
        ("[]", "config_bert.json: key '"),
        ('{"encoder_width": 8}', "key 'fusion_layer' is missing"),
        ('{"fusion_layer": "six", "encoder_width": 8}', "key 'fusion_layer'"),
        ('{"fusion_layer": 6, "encoder_width": 8, "hidden_act": "relu"}', "key 'hidden_act'"),
        ("\x80\x81\xff", "not a text file"),
        (None, "cannot read bert_config"),
    ],
)
def test_bad_bert_config(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config_bert.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        load_bert_config(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


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


@pytest.mark.parametrize(
    "text", ["[" * 3000, "{a: " * 3000, "? [a]\n: b", "!!python/object:os.system {}", "!!binary [1]"]
)
def test_odd_yaml_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"some\.yaml: "):
        pretrain(tmp_path, text)
    with pytest.raises(ConfigError, match=r"--set alpha=.*not a valid YAML value|key 'alpha'"):
        pretrain(tmp_path, overrides=[f"alpha={text}"])


def test_config_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    config = pretrain(tmp_path)
    with pytest.raises(ValidationError):
        config.alpha = 0.5
    with pytest.raises(ValidationError):
        config.amc.layer = 3


# ---- --set


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "batch_size=4",
        "optimizer.lr=1e-4",
        "amc.layer=3",
        "amc.mean_over=sample",
        "train_file=[a.json, b.json]",
        "image_root=a=b",
        "add_gcam=False",
        " augment.crop_scale =[0.5, 1]",
        "amc.layer=4",
    ]
    config = pretrain(tmp_path, overrides=overrides)
    assert (config.batch_size, config.optimizer.lr, config.add_gcam) == (4, 1e-4, False)
    assert (config.amc.layer, config.amc.mean_over) == (4, "sample")  # the last one counts
    assert config.train_file == ["a.json", "b.json"]
    assert config.image_root == "a=b"
    assert config.augment.crop_scale == (0.5, 1)
    assert (config.optimizer.opt, config.optimizer.weight_decay) == ("adamW", 0.02)  # the rest of the section stays
    assert (config.amc.margin_mean, config.alpha) == (0.1, 0.4)


def test_override_with_nothing_means_none(tmp_path: Path) -> None:
    text = RELEASED_PRETRAIN + "vit_init: deit.pth\n"
    assert pretrain(tmp_path, text).vit_init == "deit.pth"
    assert pretrain(tmp_path, text, ["vit_init="]).vit_init is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("batch_size", "--set batch_size: write key=value"),
        ("alpha.x=1", "--set alpha.x=1: 'alpha' is a single value, not a section"),
        ("amc.layr=1", "unknown key 'amc.layr'; did you mean 'amc.layer'?"),
        ("batch_size=many", "key 'batch_size'"),
        ("amc.mean_over=pixel", "key 'amc.mean_over'"),
        ("train_file=[a", "--set train_file=[a"),
    ],
)
def test_bad_overrides(tmp_path: Path, item: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        pretrain(tmp_path, overrides=[item])
    assert message in str(error.value)


# ---- saving


def test_saved_config_reads_back(tmp_path: Path) -> None:
    overrides = ["amc.layer=7", "optimizer.lr=3e-7", "augment.crop_scale=[0.3, 0.9]", "mlm_distill_axis=vocabulary"]
    config = pretrain(tmp_path, overrides=overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", PretrainConfig) == config
    grounding = load_config(CONFIGS / "Grounding_flickr.yaml", GroundingConfig)
    save_config(grounding, tmp_path / "grounding.yaml")
    assert load_config(tmp_path / "grounding.yaml", GroundingConfig) == grounding


def test_saved_config_holds_the_defaults_too(tmp_path: Path) -> None:
    save_config(pretrain(tmp_path), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for key in ("mlm_distill_axis: sequence", "mean_over: batch", "warmup_interval: 100", "vision_depth: 12"):
        assert key in text


# ---- quirks


@pytest.mark.parametrize(
    ("section", "key", "release", "other"),
    [
        (AMCConfig, "amc.mean_over", "batch", "sample"),
        (AMCConfig, "amc.empty_box", "zero_mask", "no_box"),
        (AugmentConfig, "augment.flip_words", "keep", "swap"),
        (AugmentConfig, "augment.jitter", "release", "standard"),
        (PretrainConfig, "mlm_distill_axis", "sequence", "vocabulary"),
        (PretrainConfig, "empty_captions", "keep", "drop"),
    ],
)
def test_quirks_have_two_values_and_the_shipped_config_names_the_release_s(
    section: type[BaseModel], key: str, release: str, other: str
) -> None:
    def read(config: Any) -> str:
        for name in key.split("."):
            config = getattr(config, name)
        return config

    path, name = CONFIGS / "Pretrain.yaml", key.rpartition(".")[2]
    assert read(load_config(path, PretrainConfig)) == release
    assert f"{name}: {release}" in path.read_text(encoding="utf-8")  # written there, not a silent default
    assert section.model_fields[name].default == release
    assert read(load_config(path, PretrainConfig, [f"{key}={other}"])) == other
    with pytest.raises(ConfigError, match=f"{release}' or '{other}'"):
        load_config(path, PretrainConfig, [f"{key}=neither"])


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
        ("add_gcam", "perhaps"),
        *(("schedular.decay_rate", value) for value in ("0", "-1")),
        ("schedular.cooldown_epochs", "-1"),
        ("schedular.epochs", "0"),
        ("optimizer.weight_decay", "-1"),
        ("train_file", "vg.json"),
        ("add_gcam", "2"),
    ],
)
def test_a_value_that_makes_no_sense_names_file_and_key(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        pretrain(tmp_path, overrides=[f"{key}={value}"])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{tmp_path / 'some.yaml'}: key '{key}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("vocab_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")),
        *((key, 0) for key in ("hidden_size", "num_attention_heads")),
        *((key, value) for key in ("hidden_dropout_prob", "attention_probs_dropout_prob") for value in (-0.1, 1, 2)),
        *(("layer_norm_eps", value) for value in (0, -1)),
        *(("pad_token_id", value) for value in (-1, None)),
        *(("fusion_layer", value) for value in (-1, "six")),
    ],
)
def test_a_bert_value_that_makes_no_sense_names_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "bert.json"
    path.write_text(json.dumps({"fusion_layer": 6, "encoder_width": 768, key: value}))
    with pytest.raises(ConfigError, match=rf"bert.json: key '{key}': "):
        load_bert_config(path)


def test_an_error_that_only_the_use_of_a_config_brings_up_names_its_file() -> None:
    with pytest.raises(ConfigError, match=r"^a\.yaml: two\na\.yaml: lines$"), naming("a.yaml"):
        raise ConfigError("two\nlines")
    with pytest.raises(ConfigError, match=r"^a\.yaml: known$"), naming("a.yaml"):
        raise ConfigError("a.yaml: known")


def test_sizes_that_leave_nothing(tiny_config: Any) -> None:
    config = tiny_config(PretrainConfig, {"pad_token_id": 30}, vision_mlp_ratio=0.01)
    found = size_problems(config, load_bert_config(config.bert_config))
    assert any(problem.startswith("vision_mlp_ratio is 0.01") for problem in found)
    assert any("pad_token_id 30, and vocab_size is 30" in problem for problem in found)
