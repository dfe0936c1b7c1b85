"""Open a checkpoint: choose its config and vocabulary, build the model, load the weights."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import utils
from config import VISION_SIZES, ConfigError, GroundingConfig, ModelConfig, load_config, parse_config
from dataset.scenes.paths import BERT_CONFIG, TEXT_ENCODER
from dataset.text import Tokenizer, check_vocabulary, load_tokenizer
from grounding.benchmarks import REFCOCO_PLUS, Benchmark
from grounding.explain import Explainer
from model_sizes import BertConfig, load_bert_config, student_sizes
from models.albef import ALBEF, build_albef
from models.checkpoint import LoadReport, load_weights, read_checkpoint
from models.interface import ExplainableModel, check_layer
from models.kernels.onednn import use_onednn
from models.student import CONFIG, is_student, local_checkpoint, own_text_encoder

CONFIG_FOLDERS = (Path("configs"), Path("configs/scenes"))
# What decides the shapes of the weights, beside bert_config and image_res. A config that is saved has `vision_model` or
# the sizes of the plain ViT.
SHAPE_KEYS = ("model", "vision_model", *(key for key in VISION_SIZES if key != "vision_initializer_range"), "embed_dim")


class OpenedModel(NamedTuple):
    """A checkpoint's model, ready to be asked."""

    model: ExplainableModel
    tokenizer: Tokenizer
    device: torch.device
    config: GroundingConfig  # its `block_num` is the layer explained unless another is asked for
    origin: str  # where that config comes from, for showing
    report: LoadReport  # what became of the file's tensors

    def explainer(self, mode: str = "itm", block: int | None = None, precision: str = "fp32") -> Explainer:
        """Explain by a mode ("itm", "itc") and a layer; raises `LayerError` when the model has no such layer."""
        block = self.config.block_num if block is None else block
        check_layer(self.model, mode, block)
        return Explainer(self.model, self.tokenizer, self.device, mode, block, precision, self.report.path)


def open_model(
    checkpoint: str | Path,
    config: str | Path | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    benchmark: Benchmark = REFCOCO_PLUS,
) -> OpenedModel:
    """Open a checkpoint.

    Args:
        checkpoint: a file, a student's folder, or such a folder's name on the hub.
        config: a Grounding_*.yaml; None: chosen by the config inside the checkpoint (`config_of`).
        text_encoder: hub name or folder; None: `choose_text_encoder`.
        device: "cuda" or "cpu"; None: the GPU if there is one.
        overrides: such as "image_res=256", laid over the config.
        benchmark: whose config is chosen.

    Raises:
        UserError: the checkpoint, the config or the vocabulary is missing or does not fit the others.
    """
    checkpoint = local_checkpoint(checkpoint)
    content = read_checkpoint(checkpoint)
    if config is None:
        chosen, origin = config_of(content, checkpoint, benchmark, list(overrides))
    else:
        chosen, origin = load_config(config, GroundingConfig, [*own_sizes(checkpoint), *overrides]), str(config)
    tokenizer = vocabulary_for(chosen.bert_config, text_encoder or choose_text_encoder(checkpoint, chosen.bert_config))
    model, where = build_model(chosen), utils.choose_device(device)
    return OpenedModel(model, tokenizer, where, chosen, origin, ready(model, content, checkpoint, where))


def build_model(config: ModelConfig) -> ALBEF:
    """The model of a config, for evaluation, with random weights; raises `ConfigError` for sizes that do not fit."""
    if config.model == "blip":
        from models.blip import build_blip  # brings transformers, which takes seconds

        return build_blip(config)
    return build_albef(config)


def choose_text_encoder(checkpoint: str | Path, bert_config: str) -> str:
    """The --text_encoder of a checkpoint: a student's own folder, the scenes' for their models, or BERT's."""
    scenes = str(TEXT_ENCODER) if Path(bert_config).parent == BERT_CONFIG.parent else None
    return own_text_encoder(Path(checkpoint)) or scenes or "bert-base-uncased"


def vocabulary_for(bert_config: str, text_encoder: str) -> Tokenizer:
    """The tokenizer of a --text_encoder; raises `UserError` unless it has the word pieces that bert_config says."""
    tokenizer, bert = load_tokenizer(text_encoder), load_bert_config(bert_config)
    if tokenizer.vocab_size != bert.vocab_size:
        raise ConfigError(
            f"{tokenizer.source}: {tokenizer.vocab_size} word pieces, and {bert_config} says {bert.vocab_size}; pass "
            "the --text_encoder that the model was trained with"
        )
    check_vocabulary(tokenizer, bert.vocab_size, bert.special_ids)
    return tokenizer


def own_sizes(checkpoint: Path) -> list[str]:
    """The sizes that a student's folder states, as overrides of a config's; none of another checkpoint.

    Of BLIP's, image size and layer too: its maps are made of images of that size.
    """
    if not is_student(checkpoint):
        return []
    sizes = {"vision_model": None, **student_sizes(checkpoint / CONFIG)}
    keys = ["bert_config", *(key for key in SHAPE_KEYS if key in sizes)]
    if sizes.get("model") == "blip":
        keys += ["image_res", "block_num"]
        sizes["block_num"] = sizes["amc"]["layer"]
    return [f"{key}={json.dumps(sizes[key], ensure_ascii=False)}" for key in keys]


def ready(model: ALBEF, content: dict[str, Any], path: str | Path, device: torch.device) -> LoadReport:
    """Load a checkpoint's weights into `model` and make it ready: frozen, in evaluation mode, on `device`."""
    report = load_weights(model, content["model"], path)
    model.requires_grad_(False).eval().to(device)
    use_onednn(model)
    if device.type == "cpu":
        utils.keep_freed_memory()
    return report


def check_config(config: GroundingConfig, mode: str, block: int) -> None:
    """Raise `ConfigError` for sizes that do not fit, `LayerError` for a missing layer; no weights are made."""
    with torch.device("meta"):
        check_layer(build_model(config), mode, block)


def config_of(
    content: dict[str, Any], checkpoint: str | Path, benchmark: Benchmark, overrides: list[str]
) -> tuple[GroundingConfig, str]:
    """The config to evaluate a checkpoint by, from the config that it was trained with, and a word on where it is from.

    It is the benchmark's file under configs/ or configs/scenes/ that describes a model of the same sizes (the published
    evaluation looks at images of another size than training does). If there is none, it is made of the sizes, the
    image size and the AMC layer of training.

    Raises:
        ConfigError: the checkpoint holds no config that says its sizes.
    """
    trained = content.get("config")
    if not isinstance(trained, dict) or not isinstance(trained.get("bert_config"), str):
        names = " or ".join(str(folder / Path(benchmark.config).name) for folder in CONFIG_FOLDERS)
        raise ConfigError(f"{checkpoint}: does not say the sizes of its model; pass --config, for instance {names}")
    for folder in CONFIG_FOLDERS:
        path = folder / Path(benchmark.config).name
        if path.exists() and _sizes(load_config(path, GroundingConfig).model_dump()) == _sizes(trained):
            return load_config(path, GroundingConfig, overrides), f"{path}, by the checkpoint's sizes"
    keys = {key: trained[key] for key in ("bert_config", "image_res", *SHAPE_KEYS) if key in trained}
    amc = trained.get("amc")
    layer = {"block_num": amc["layer"]} if isinstance(amc, dict) and "layer" in amc else {}
    values = {"image_root": "", **keys, **layer}
    return parse_config(checkpoint, GroundingConfig, values, overrides), f"the sizes in {checkpoint}"


def _sizes(config: dict[str, Any]) -> tuple[Any, ...]:
    sizes = config if config.get("vision_model") else ModelConfig().model_dump() | config
    bert: BertConfig | Path = Path(config["bert_config"])
    with contextlib.suppress(ConfigError):  # of a machine where it lay elsewhere
        bert = load_bert_config(config["bert_config"])
    return bert, *(sizes.get(key) for key in SHAPE_KEYS)


def of_scenes(config: GroundingConfig) -> bool:
    """Whether a model is of the sizes that the embedded scenes' models have: it then knows nothing of photographs."""
    return Path(config.bert_config).parent == BERT_CONFIG.parent
