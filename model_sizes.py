"""The sizes of a model as its own files say them: config_bert.json, or a folder's config.json, of ALBEF or of BLIP.

`size_problems` says what of them would keep the model of a config from being built.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from config import AMCConfig, ConfigError, ModelConfig, ModelSizes, PretrainConfig, parse_config, read_json

BLIP_LAYER = 6  # whose cross-attention LAVIS explains
MOST_LAYERS = 1000
# What BLIP's config.json must have between 1 and these, for transformers takes any value.
MOST = {"num_hidden_layers": MOST_LAYERS, "image_text_hidden_size": 1 << 20} | dict.fromkeys(
    ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings"), 1 << 20
)
MOST |= dict.fromkeys(("image_size", "patch_size"), 1 << 16)


class BertConfig(BaseModel):
    """config_bert.json: transformers' keys for BERT and ALBEF's two, `fusion_layer` and `encoder_width`.

    The file belongs to transformers, which adds keys freely; those that do not concern us are ignored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    model_type: str = Field("bert", exclude=True)
    fusion_layer: int = Field(ge=0)
    encoder_width: int = Field(ge=1)
    vocab_size: int = Field(30522, ge=1)
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1, le=MOST_LAYERS)
    num_attention_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    max_position_embeddings: int = Field(512, ge=1)
    type_vocab_size: int = Field(2, ge=1)
    initializer_range: float = Field(0.02, ge=0)
    layer_norm_eps: float = Field(1e-12, gt=0)
    pad_token_id: int = Field(0, ge=0)

    @property
    def fusion_layers(self) -> range:
        """Indices of the layers with cross-attention."""
        return range(self.fusion_layer, self.num_hidden_layers)


class StudentConfig(ModelSizes):
    """config.json of a folder that export.py writes: what it takes to build the student, and the layer to explain."""

    bert_config: BertConfig
    amc: AMCConfig = AMCConfig()


def load_bert_config(path: str | Path) -> BertConfig:
    """Read config_bert.json, or what a student's or BLIP's config.json holds of it.

    Of BLIP's, two ids lie beyond the vocabulary ([DEC] and [ENC]), and a position is [SEP]'s.

    Raises:
        ConfigError: it is not such a file; names the file and the key.
    """
    values = read_json(path, "bert_config")
    if is_blip(values):
        blip = load_blip_config(path)
        text = blip.text_config.to_dict()
        sizes = {key: text[key] - less for key, less in (("vocab_size", 2), ("max_position_embeddings", 1))}
        values = text | sizes | {"fusion_layer": 0, "encoder_width": blip.vision_config.hidden_size}
    return parse_config(path, BertConfig, values.get("bert_config", values) if isinstance(values, dict) else values)


def is_blip(values: Any) -> bool:
    """Whether these are the values of a config.json of transformers' BLIP."""
    return isinstance(values, dict) and values.get("model_type") == "blip"


def load_blip_config(path: str | Path) -> Any:
    """Read the config.json of transformers' BLIP as its BlipConfig; raises `ConfigError` if it is none."""
    values = read_json(path, "the sizes of BLIP")
    if not is_blip(values):
        raise ConfigError(f"{path}: not a config.json of transformers' BLIP; its model_type must be 'blip'")
    from transformers import BlipConfig  # takes a second

    try:
        found: Any = BlipConfig.from_dict(values)
    except Exception as error:  # of many kinds, by key and version
        raise ConfigError(f"{path}: not a config.json of transformers' BLIP ({error})") from error
    for part in (found, found.text_config, found.vision_config):
        for key, value in part.to_dict().items():
            if key in MOST and not (type(value) is int and 1 <= value <= MOST[key]):
                raise ConfigError(f"{path}: {key} must be an integer from 1 to {MOST[key]}, found {value!r:.40}")
    if found.text_config.sep_token_id not in range(found.text_config.vocab_size):
        raise ConfigError(f"{path}: sep_token_id is {found.text_config.sep_token_id!r:.40}, no id of the vocabulary")
    return found


def check_same_blip(path: str | Path, other: str | Path) -> None:
    """Raise `ConfigError` where two config.json of BLIP differ in what the shapes of weights do not tell."""
    one, two = load_blip_config(path), load_blip_config(other)
    for part in ("text_config", "vision_config"):
        for key in ("num_attention_heads", "layer_norm_eps", "hidden_act", "sep_token_id"):
            values = [getattr(getattr(config, part), key, None) for config in (one, two)]
            if values[0] != values[1]:
                raise ConfigError(f"{path}: {part}'s {key} is {values[0]}, and {values[1]} in {other}")


def student_sizes(path: str | Path) -> dict[str, Any]:
    """What the config.json of a folder with a model says, by the keys of a training config; raises `ConfigError`."""
    if is_blip(read_json(path, "the sizes of the model")):
        size, layer = load_blip_config(path).vision_config.image_size, {"layer": BLIP_LAYER}
        return {"model": "blip", "bert_config": str(path), "image_res": size, "amc": layer}
    return load_student_config(path).model_dump(mode="json") | {"bert_config": str(path)}


def load_student_config(path: str | Path) -> StudentConfig:
    """Read config.json of a student's folder; raises `ConfigError` as `load_bert_config`."""
    return parse_config(path, StudentConfig, read_json(path, "the sizes of the model"))


def width_problems(what: str, width: int, bert: BertConfig) -> list[str]:
    """Whether the fusion layers can read image tokens of a width; `what` names it."""
    if width == bert.encoder_width:
        return []
    return [
        f"{what} is {width} but bert_config has encoder_width {bert.encoder_width}: the cross-attention reads image "
        "tokens, so the two must be equal"
    ]


def size_problems(config: ModelConfig, bert: BertConfig) -> list[str]:
    """What of the sizes would keep the model from being built, each with the keys to change; empty if nothing."""
    problems = []
    parts = [("bert_config's hidden_size", bert.hidden_size, "num_attention_heads", bert.num_attention_heads)]
    if (config.model == "blip") != (bert.model_type == "blip_text_model"):
        problems.append(f"model is {config.model}, and {config.bert_config} is another model's: change one of the two")
    if config.model == "blip" and isinstance(config, PretrainConfig) and config.vit_init:
        problems.append("vit_init is for ALBEF; BLIP starts from a --checkpoint, a folder of transformers")
    if config.model == "blip" and isinstance(config, PretrainConfig) and config.paraphrases:
        problems.append("selfeq and relation_file are for ALBEF; train BLIP without them")
    # another's sizes are known when it is built: models/vit.py, models/blip.py
    plain = config.vision_model is None and config.model == "albef"
    if plain:
        problems += width_problems("vision_width", config.vision_width, bert)
        parts.insert(0, ("vision_width", config.vision_width, "vision_heads", config.vision_heads))
        parts.insert(0, ("image_res", config.image_res, "patch_size", config.patch_size))
    for key, size, of, divisor in parts:
        if size % divisor:
            problems.append(f"{key} is {size}, which its {of} of {divisor} does not divide")
    if plain and int(config.vision_width * config.vision_mlp_ratio) < 1:
        problems.append(
            f"vision_mlp_ratio is {config.vision_mlp_ratio}: it leaves the MLP of the image encoder no width"
        )
    if bert.pad_token_id >= bert.vocab_size:
        problems.append(f"bert_config has pad_token_id {bert.pad_token_id}, and vocab_size is {bert.vocab_size}")
    fusion = bert.fusion_layers
    if config.model == "blip":
        fusion = fusion[:-1]  # in the last, the match depends on [ENC] alone, which is left out of BLIP's maps
    if not fusion:
        layers = bert.num_hidden_layers
        problems.append(f"bert_config has fusion_layer {bert.fusion_layer} of {layers} layers: none sees the image")
    elif (
        isinstance(config, PretrainConfig)
        and (config.add_gcam or config.paraphrases)
        and config.amc.layer not in fusion
    ):
        problems.append(f"amc.layer is {config.amc.layer}; the fusion layers are {fusion.start} to {fusion[-1]}")
    return problems
