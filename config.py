"""Typed configuration, read once from YAML (and `--set key=value`).

The YAML files of the AMC release load as they are; every key beyond them has the published value as its default. An
unknown or missing key, or a value of the wrong type, is a `ConfigError` that names the file, the key and the nearest
known key. Sizes live here and nowhere else: a small model is only another config.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from files import decode_text, parse_json
from utils import UserError, atomic_path


class ConfigError(UserError):
    """A configuration file that cannot be used as it is; the message names the file, the key and the remedy."""


def expand_path(text: str) -> str:
    """A path with `$NAME` and `${NAME}` replaced by environment variables, and then a leading `~` by the home folder.

    Raises:
        PydanticCustomError: a variable is not defined; pydantic says at which key.
    """

    try:
        text = re.sub(r"\$(\w+|\{[^}]*\}?)", lambda found: os.environ[found[1].strip("{}")], text, flags=re.ASCII)
    except KeyError as error:
        message, name = "the environment variable {name} is not defined", {"name": error.args[0]}
        raise PydanticCustomError("undefined_variable", message, name) from None
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(expand_path)]  # the type of every key that names a file or folder


class Section(BaseModel):
    """A group of keys. Lax about types the way YAML is (`"1e-5"` is a number), strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("truth_value", "Input should not be {value}", {"value": str(value)})
        return value


class OptimizerConfig(Section):
    """Keys of `optimizer:`. `opt` is any timm optimizer name, case-insensitive."""

    opt: str = "adamW"
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.02, ge=0)


class ScheduleConfig(Section):
    """Keys of `schedular:` (the release's spelling); time is counted as in `scheduler.epoch_time`."""

    sched: str = "cosine"
    lr: float = Field(1e-5, gt=0)  # a copy of optimizer.lr in the released files; the optimizer's is the one used
    epochs: int = Field(30, ge=1)
    min_lr: float = Field(1e-6, ge=0)
    decay_rate: float = Field(1, gt=0)
    warmup_lr: float = Field(1e-6, ge=0)
    warmup_epochs: int = Field(20, ge=0)
    cooldown_epochs: int = Field(0, ge=0)
    warmup_interval: int = Field(100, ge=1)  # iterations of epoch 0 that count as one warm-up "epoch"
    interval: Literal["epoch", "iteration"] = "epoch"  # when the rate changes after the warm-up; release: "epoch"


class AMCConfig(Section):
    """Keys of `amc:` (AMC, section 3.2): whose attention is explained; margins and weights of the losses on its map."""

    layer: int = Field(8, ge=0)  # BERT layer index whose cross-attention is explained; must be a fusion layer
    margin_mean: float = 0.1
    margin_max: float = 0.5
    weight_mean: float = Field(0.2, ge=0)
    weight_max: float = Field(0.8, ge=0)
    weights: dict[str, Annotated[float, Field(ge=0, strict=True)]] = {}  # of other losses in models.amc.MAP_LOSSES
    # release: "batch", one mean over the pixels of all samples; "sample": a hinge per sample, then averaged, so that
    # a large box does not outweigh a small one.
    mean_over: Literal["batch", "sample"] = "batch"
    # release: "zero_mask", an entry with only an empty box trains against an all-zero mask; "no_box" treats it as an
    # entry without a box.
    empty_box: Literal["zero_mask", "no_box"] = "zero_mask"


class SelfEQConfig(Section):
    """Keys of `selfeq:` (SelfEQ, section 3): the losses on the maps of a caption and of its paraphrase."""

    # Of 0 and 0, the losses are left out. With `relation_file`, the published 1 and 0.5 are the defaults.
    weight_similarity: float = Field(0, ge=0)
    weight_consistency: float = Field(0, ge=0)
    threshold: float = 0.8  # of the sum of both maps, in the region where they must agree
    floor: float = 0.4  # for the mean of each map there
    # release: "batch", one region of all samples; "sample": a region and a loss each, then their mean.
    over: Literal["batch", "sample"] = "batch"
    # release: "all", the deviation counts patches outside the region as zeros; "region": those inside alone.
    std_over: Literal["all", "region"] = "all"
    # release: "text", the group is replaced inside of longer words as well, "cat" in "cattle"; "word": as a word alone.
    replace: Literal["text", "word"] = "text"
    # release: "fixed", the relation epoch stays at warmup_lr of relation_schedular; "schedule": its rate changes by it.
    rate: Literal["fixed", "schedule"] = "fixed"


class AugmentConfig(Section):
    """Training augmentation; the release's values are the defaults (docs/method.md, Training)."""

    # Whose; "none": images are resized alone (PIL, bicubic). None: ALBEF's with `add_gcam: False`, else AMC's.
    kind: Literal["amc", "albef", "none"] | None = None
    flip_prob: float = Field(0.5, ge=0, le=1)
    # release: "keep" leaves "left" and "right" in the caption of a flipped image; "swap" exchanges them, so that a
    # spatial phrase stays true.
    flip_words: Literal["keep", "swap"] = "keep"
    grayscale_prob: float = Field(0.2, ge=0, le=1)
    jitter_prob: float = Field(0.5, ge=0, le=1)
    # release: saturation always rises by 153..357 of 255; "standard" is torchvision's ColorJitter at equal strengths.
    jitter: Literal["release", "standard"] = "release"
    # The next two are ALBEF's alone: random resized crop and RandAugment.
    crop_scale: tuple[float, float] = (0.2, 1.0)
    randaugment: bool = True

    @field_validator("crop_scale")
    @classmethod
    def _in_order(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            message = "must be [smallest, largest] part of the image's area, above 0 and at most 1"
            raise PydanticCustomError("crop_scale", message)
        return scale


# Keys of the plain ViT; `vision_model` takes their place.
VISION_SIZES = (
    "patch_size",
    "vision_width",
    "vision_depth",
    "vision_heads",
    "vision_mlp_ratio",
    "vision_initializer_range",
)


class ModelSizes(Section):
    """What decides the model's shapes, beside bert_config."""

    # "blip": BLIP of transformers; bert_config is then its config.json, which says all sizes but image_res.
    model: Literal["albef", "blip"] = "albef"
    image_res: int = Field(256, ge=1)
    patch_size: int = Field(16, ge=1)
    vision_width: int = Field(768, ge=1)
    vision_depth: int = Field(12, ge=1)
    vision_heads: int = Field(12, ge=1)
    vision_mlp_ratio: float = Field(4.0, gt=0)
    vision_initializer_range: float = Field(0.02, gt=0)  # std of the linear layers' first weights, as BERT's key says
    # The image encoder by its name in timm, such as vit_base_patch14_reg4_dinov2; its sizes are then its own, and
    # bert_config's encoder_width must be its width. Any ViT with a CLS token; nothing is downloaded.
    vision_model: str | None = None
    embed_dim: int = Field(256, ge=1)

    @model_serializer(mode="wrap")
    def _one_image_encoder(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved config says `vision_model` or the sizes of the plain ViT, never both, and for BLIP neither."""
        unused: tuple[str, ...] = ("model", "vision_model") if self.vision_model is None else ("model", *VISION_SIZES)
        if self.model == "blip":
            unused = ("vision_model", "embed_dim", *VISION_SIZES)
        return {key: value for key, value in values(self).items() if key not in unused}


class ModelConfig(ModelSizes):
    """The model and how it is trained; shared by training and evaluation."""

    bert_config: PathText = "configs/config_bert.json"
    temp: float = Field(0.07, gt=0)
    queue_size: int = Field(65536, ge=1)
    momentum: float = Field(0.995, ge=0, le=1)
    alpha: float = Field(0.4, ge=0, le=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedular: ScheduleConfig = ScheduleConfig()


class PretrainConfig(ModelConfig):
    """Pretrain.yaml."""

    train_file: list[PathText]
    image_root: PathText
    vit_init: PathText | None = None  # a DeiT-B/16 state dict to start the image encoder from; never downloaded
    batch_size: int = Field(64, ge=2)  # per process; 2 at least, for a hard negative must exist
    mlm_probability: float = Field(0.15, ge=0, le=1)
    # release: "sequence", the student's log-softmax of the distillation term runs over the positions; "vocabulary" is
    # ALBEF's later correction.
    mlm_distill_axis: Literal["sequence", "vocabulary"] = "sequence"
    # Hard negatives for matching are drawn from softmax(sharpness * similarity / temp); 1 is ALBEF's. Lower it where
    # many texts of a batch are true of several of its images: the hardest negatives are false ones there.
    negative_sharpness: float = Field(1.0, ge=0)
    phrase_input: bool = True  # one (caption, box) drawn per entry; False: captions of whole images, without boxes
    mask_all: bool = False  # the mask is the union of the entry's boxes
    max_words: int = Field(50, ge=1)
    # Captions of which cleaning leaves nothing, such as "?!". release: "keep" reads them as [CLS] alone; "drop" leaves
    # them out, and entries without another caption as well. Either is counted in a warning.
    empty_captions: Literal["keep", "drop"] = "keep"
    max_tokens: int = Field(25, ge=1)
    add_gcam: bool = True  # False: plain ALBEF, with ALBEF's augmentation
    mask_size: int = Field(256, ge=1)
    amc: AMCConfig = AMCConfig()
    # SelfEQ's: epoch 0 then trains on these entries' paraphrases, with an optimizer and a schedule of its own; later
    # epochs are plain ALBEF on `train_file`, with AMC's augmentation, whatever `add_gcam` says.
    relation_file: list[PathText] = []
    relation_optimizer: OptimizerConfig = OptimizerConfig()
    relation_schedular: ScheduleConfig = ScheduleConfig()
    selfeq: SelfEQConfig = SelfEQConfig()
    augment: AugmentConfig = AugmentConfig()

    @field_validator("augment")
    @classmethod
    def _boxes_stay_true(cls, augment: AugmentConfig, info: ValidationInfo) -> AugmentConfig:
        if augment.kind in ("albef", "none") and info.data.get("add_gcam") and not info.data.get("relation_file"):
            message = "kind must be amc where add_gcam is True: boxes follow no other augmentation"
            raise PydanticCustomError("augment_kind", message)
        return augment

    @model_validator(mode="before")
    @classmethod
    def _published_weights(cls, values: Any) -> Any:
        """Let the losses of SelfEQ's relation epoch have the published weights, where none are given."""
        given = values.get("selfeq", {}) if isinstance(values, dict) and values.get("relation_file") else None
        if not isinstance(given, dict):
            return values
        return {**values, "selfeq": {"weight_similarity": 1.0, "weight_consistency": 0.5, **given}}

    @property
    def paraphrases(self) -> bool:
        """Whether a step reads paraphrases, for SelfEQ's losses."""
        return bool(self.relation_file or self.selfeq.weight_similarity or self.selfeq.weight_consistency)

    def phases(self) -> "list[Phase]":
        """What a run consists of, in order: with `relation_file` two phases, else one."""
        if not self.relation_file:
            return [Phase(self, range(self.schedular.epochs))]
        relation = {"train_file": self.relation_file, "optimizer": self.relation_optimizer, "add_gcam": False}
        relation |= {"schedular": self.relation_schedular.model_copy(update={"epochs": 1})}
        relation |= {"augment": self.augment.model_copy(update={"kind": "none"})}
        plain = {"relation_file": [], "selfeq": SelfEQConfig(), "add_gcam": False}
        plain |= {"augment": self.augment.model_copy(update={"kind": self.augment.kind or "amc"})}
        return [
            Phase(self.model_copy(update=relation), range(1), "relation", self.selfeq.rate == "fixed"),
            Phase(self.model_copy(update=plain), range(1, self.schedular.epochs)),
        ]


class Phase(NamedTuple):
    """Epochs of a run that have a config of their own, and so their own data, losses, optimizer and schedule."""

    config: PretrainConfig
    epochs: range  # as the whole run counts them
    name: str = ""  # a part of its checkpoints' names
    fixed_rate: bool = False  # the learning rate stays where the schedule begins


class GroundingConfig(ModelConfig):
    """Grounding_*.yaml. Each benchmark needs some of the data keys (`require`)."""

    benchmark: str | None = None  # what grounding_eval.py evaluates, by its name in grounding/benchmarks.py
    image_root: PathText
    batch_size: int = Field(8, ge=1)
    test_file: list[PathText] = []
    refcoco_data: PathText | None = None
    # Which of three data sets grounding_eval_singlegpu.py reads. It says the same as `benchmark`; where both are given,
    # this one counts.
    refer_dataset: Literal["refcoco", "refcoco+", "refcocog"] = "refcoco+"
    refer_split: Literal["unc", "google", "umd", "berkeley"] = "unc"  # whose split: refs(unc).p, ...; RefCLEF's as well
    det_file: PathText | None = None
    image_ids_file: list[PathText] = []
    phrase_box_file: list[PathText] = []
    sentences_file: list[PathText] = []
    image_data_file: PathText | None = None  # Visual Genome's; image_ids_file lists the images to evaluate on
    region_file: PathText | None = None
    # Of several boxes of a phrase, "any" is right, as published; or their smallest common box alone is ("merged").
    box_protocol: Literal["any", "merged"] = "any"
    # Further metrics (grounding/metrics.py), each a log line after those of the benchmark: recall_5, point_15px, ...
    # For those that are called mask_... the segmentations of REFER's data are read as well.
    metrics: list[str] = []
    block_num: int = Field(8, ge=0)  # the layer whose attention is explained; --block_num overrides it
    # balanced pairs (dataset/own.py) on which matching accuracy is measured as well
    matching_file: list[PathText] = []
    # Training keys of the released files that evaluation accepts and ignores.
    on_bbox: bool = False
    distill: bool = True
    warm_up: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_refer_dataset(cls, values: Any) -> Any:
        """Let `benchmark` and `refer_dataset` say the same, where `benchmark` is one of the three."""
        if isinstance(values, dict) and values.get("benchmark") in ("refcoco", "refcoco+", "refcocog"):
            dataset = values.get("refer_dataset", values["benchmark"])
            return {**values, "benchmark": dataset, "refer_dataset": dataset}
        return values

    def require(self, *keys: str) -> None:
        """Raise `ConfigError` naming the first of `keys` that the file left out."""
        for key in keys:
            if not getattr(self, key):
                raise ConfigError(f"the config lacks '{key}', which this benchmark needs")


AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


def load_config(path: str | Path, kind: type[AnyConfig], overrides: list[str] | None = None) -> AnyConfig:
    """Read a YAML file as `kind` (say `PretrainConfig`), with `overrides` such as `"amc.layer=3"` laid over it.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, missing or of the wrong type.
    """
    return parse_config(path, kind, _read_yaml(path), overrides)


def load_any_config(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig | GroundingConfig:
    """Read a YAML file as what it is: of training or of evaluation, whichever knows more of its keys.

    Raises:
        ConfigError: as `load_config`; or the keys do not tell, neither the file's own nor with `overrides`.
    """
    values = _read_yaml(path)
    own = set(values)
    _lay_over(values, overrides)
    for keys in (own, values.keys()):
        training, evaluation = (len(keys & kind.model_fields.keys()) for kind in (PretrainConfig, GroundingConfig))
        if training != evaluation:
            kind: Any = PretrainConfig if training > evaluation else GroundingConfig
            return parse_config(path, kind, values)
    raise ConfigError(
        f"{path}: cannot tell whether it is of training (train_file) or of evaluation (test_file and refcoco_data, "
        "or image_ids_file, phrase_box_file and sentences_file)"
    )


def parse_config(
    source: str | Path, kind: type[AnyConfig], values: Any, overrides: list[str] | None = None
) -> AnyConfig:
    """`load_config` of values that were read already; `source` is what messages name. Raises `ConfigError`."""
    _lay_over(values, overrides)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def read_json(path: str | Path, what: str) -> Any:
    text = _read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        what = "not valid JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{path}: {what}{error}") from error


def _read_yaml(path: str | Path) -> dict[str, Any]:
    values = _parse_yaml(_read_text(path, "the config"), path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def _parse_yaml(text: str, source: str | Path) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # ruamel.yaml has no closed list: damaged texts raised seven kinds besides YAMLError
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def _read_text(path: str | Path, what: str) -> str:
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {what} ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a text file ({error})") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put a config file's name before the messages of `ConfigError`s that only its use brings up."""
    try:
        yield
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def save_config(config: BaseModel, path: str | Path) -> None:
    """Write the whole configuration, defaults included, as YAML that `load_config` reads back."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(config.model_dump(mode="json"), file)


def _lay_over(values: dict[str, Any], overrides: list[str] | None) -> None:
    """Set the keys of `overrides`, each "key=value" or "section.key=value", in `values`."""
    for item in overrides or []:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write key=value, for instance --set optimizer.lr=1e-4")
        *sections, last = key.strip().split(".")
        section: Any = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {item}: '{name}' is a single value, not a section")
        section[last] = _parse_yaml(text, f"--set {item}") if text else None


def _explain(kind: type[BaseModel], location: tuple[int | str, ...], error: str, message: str) -> str:
    key = ".".join(map(str, location))
    if error == "missing":
        return f"key '{key}' is missing"
    if error != "extra_forbidden":
        return f"key '{key}': {message}"
    known = list(_known_keys(kind))
    nearest = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
        str(location[-1]), [name.rpartition(".")[2] for name in known], n=1
    )
    return f"unknown key '{key}'" + (f"; did you mean '{nearest[0]}'?" if nearest else "")


def _known_keys(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield name
        section = field.annotation
        if isinstance(section, type(BaseModel)):  # on Python 3.10, list[str] passes for a class but not as one
            yield from (f"{name}.{key}" for key in _known_keys(section))
