"""Checkpoints: read (safely), convert, check; `files.save_tensors` writes them.

A checkpoint is a `torch.save` dict with `model` (state dict), `optimizer`, `lr_scheduler`, `config`, `epoch`; or a
student's folder (models/student.py); or a `.safetensors` file with the state dict, and the config in its metadata if
they have it, as those that ship. Others are converted: state dicts under other keys, names with prefixes of wrappers,
ALBEF's fine-tuned names. Loading never hides a mismatch: what is converted, started afresh or left out on purpose is
reported, and anything else that does not fit is an error.
"""

import contextlib
import math
import re
import reprlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from config import ConfigError
from dataset.transforms import MEAN, STD
from files import UnreadableFile, load_tensors, parse_json, verify_archive, why_unreadable
from model_sizes import load_student_config, student_sizes
from models.albef import ALBEF
from models.student import CONFIG, PREPROCESSING, is_student, lacking, weights_of
from models.vit import ViT
from models.xbert import TextEncoder
from utils import UserError

State = dict[str, Tensor]

TEACHER = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
QUEUE = re.compile(r"^(image_queue|text_queue|idx_queue|queue_ptr|queue_ptr_img|queue_ptr_txt)$")
MLM_HEAD = re.compile(r"^text_encoder\.cls\.")
POSITION_EMBEDDING = re.compile(r"^(visual_encoder(_m)?\.)?(pos_embed|embeddings\.position_embedding)$")
BLIP = re.compile(r"\.self_attn\.qkv\.")  # in names of transformers' BLIP, and of models/blip.py
POSITION_IDS = re.compile(r"embeddings\.position_ids$")
# One parameter under two names in the MLM head; a student is written without the first of each pair.
TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}

LARGEST_WEIGHT = 1e6  # those of a sound model stay below 100

# Under which keys state dicts are kept: ALBEF, Lightning, PyTorch's tutorials.
TOP_KEYS = ("model", "state_dict", "model_state_dict")
# What wrappers (DataParallel, torch.compile, FSDP, activation checkpointing) put into names, wherever they wrap.
WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
WITHOUT_BERT = re.compile(r"^(text_encoder(?:_m)?)\.(?=(?:embeddings|encoder)\.)")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Other models, by a key that they have and the model to be loaded has not.
OTHER_MODELS = {
    "a LoRA adapter": r"\.lora_[AB]\.",
    "BLIP of transformers (for that, the config says model: blip)": BLIP.pattern,
    "BLIP": r"^ptr_queue$",
    "CLIP or SigLIP of transformers": r"^(text_model|vision_model)\.",
    "CLIP": r"^visual\.",
    "ALBEF for VQA, or BLIP, with its text decoder": r"^text_decoder\.",
    "ALBEF fine-tuned as a classifier, without match head": r"^cls_head\.",
    "a whole ALBEF": r"^visual_encoder\.",
    "an image encoder alone (DeiT, timm's ViT: the config key vit_init takes it)": r"^patch_embed\.",
    "an image encoder of transformers": r"^(\w+\.)?embeddings\.(cls_token|patch_embeddings)",
    "BERT alone (--text_encoder takes its folder)": r"^(bert\.)?embeddings\.word_embeddings\.",
    "torchvision's ViT": r"^conv_proj\.",
    "a Swin transformer": r"^layers\.0\.blocks\.",
    "X-VLM": r"^(vision_encoder|bbox_head)\.",
    "DETR or MDETR": r"^(bbox|class)_embed\.",
    "a ResNet": r"^layer1\.0\.conv1\.",
}


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file, the keys and the shapes."""


@dataclass
class LoadReport:
    """What became of every key: of the file's, and of the model's."""

    path: str
    loaded: int = 0
    converted: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {"converted": self.converted, "resized": self.resized, "fresh": self.fresh}
        parts["ignored on purpose"] = self.ignored
        notes = [f"\n  {verb}: {note}" for verb, notes in parts.items() for note in notes]
        return "".join([f"{self.path}: {self.loaded} tensors loaded", *notes])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it; `model` is always there, a state dict by the file's own names.

    Raises:
        CheckpointError: missing, damaged, holding other objects than tensors and plain values, or no state dict.
    """
    path = Path(path)
    weights = weights_of(path)
    if not weights.is_file():
        absent = " and ".join(lacking(path))
        folder = f" (it is a folder: give a file; as a student it lacks {absent})" if path.is_dir() else ""
        raise CheckpointError(f"{path}: no such checkpoint{folder}")
    try:
        content = load_tensors(weights)
    except (OSError, UnreadableFile) as error:
        if call := _refused_call(error.__cause__):
            raise CheckpointError(f"{path}: refused, it holds more than tensors and plain values ({call})") from error
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); is the download complete?") from error
    state = content
    for _ in TOP_KEYS:  # as deep as they can lie in one another
        if isinstance(state, dict) and (inside := [state[key] for key in TOP_KEYS if key in state]):
            state = next((value for value in inside if isinstance(value, dict)), inside[0])
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no state dict found, neither under 'model' nor at the top level")
    size = weights.stat().st_size
    for key, value in state.items():
        if fault := "a key that is no text" if not isinstance(key, str) else _fault(value, size):
            shown = f"{key!r:.200}" if isinstance(key, str) else reprlib.repr(key)
            raise CheckpointError(f"{path}: {shown} in its state dict is {fault}")
    rest = {key: value for key, value in content.items() if key not in TOP_KEYS}
    return {"model": state, **(_stated_config(path) if state is content else rest)}


def _stated_config(path: Path) -> dict[str, Any]:
    """{"config": ...} of a student's folder, or of a safetensors file with a training config in its metadata, else {}.

    In place of a folder's bert_config stands the path of its config.json, for `load_bert_config`.
    """
    if is_student(path):
        _check_normalisation(path / PREPROCESSING)
        return {"config": student_sizes(path / CONFIG)}
    with contextlib.suppress(SafetensorError, ValueError, KeyError), safe_open(path, framework="pt") as file:
        return {"config": parse_json((file.metadata() or {})["config"])}
    return {}


def _check_normalisation(path: Path) -> None:
    """Raise `CheckpointError` where a folder of transformers normalises images otherwise than by CLIP's numbers."""
    if not path.exists():
        return
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        pairs = [(key, found.get(key, known), known) for key, known in (("image_mean", MEAN), ("image_std", STD))]
        odd = [f"{key} is {value}" for key, value, known in pairs if not np.allclose(value, known, atol=1e-4)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: says no normalisation of images ({error})") from error
    if odd:
        raise CheckpointError(f"{path}: {odd[0]}; here, images are normalised by {MEAN} and {STD}")


def _refused_call(error: BaseException | None) -> str | None:
    """What a pickle wanted to call, if that is why it was not read."""
    found = re.search(r"\bGLOBAL (\S+)", str(error))
    return found[1] if found else None


def _fault(value: Any, file_size: int) -> str | None:
    """Why a value of a state dict cannot be a weight; None where it can."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"of type {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        kind = "a quantized" if value.is_quantized else f"a {value.device.type} {str(value.layout)[6:]}"
        return f"{kind} tensor; store it as a plain one"
    if value.nbytes > file_size:
        return f"larger than the file: its shape is {list(value.shape)}"
    return None


def _by_our_names(state: State, report: LoadReport) -> State:
    """Without the prefixes of wrappers, and with the `bert.` that ALBEF's fine-tuned models lack."""
    names = {key: WRAPPER.sub("", key) for key in state}
    if prefixes := sorted({found for key in state for found in WRAPPER.findall(key)}):
        count = sum(key != name for key, name in names.items())
        report.converted.append(f"{count} names without {', '.join(prefixes)}")
    if all(name.startswith("model.") for name in names.values()):  # Lightning's module around the model
        names = {key: name.removeprefix("model.") for key, name in names.items()}
        report.converted.append(f"{len(names)} names without model.")
    if any(map(BLIP.search, names.values())):
        if count := sum(name.startswith("vision_model.") for name in names.values()):
            names = {key: re.sub(r"^vision_model\.", "visual_encoder.", name) for key, name in names.items()}
            report.converted.append(f"{count} names with visual_encoder. for vision_model., as transformers has it")
    elif count := sum(bool(WITHOUT_BERT.match(name)) for name in names.values()):
        names = {key: WITHOUT_BERT.sub(r"\1.bert.", name) for key, name in names.items()}
        report.converted.append(
            f"{count} names with text_encoder.bert. for text_encoder., as ALBEF's fine-tuning has it"
        )
    keys: dict[str, str] = {}
    for key, name in names.items():
        if name in keys:
            raise CheckpointError(f"{report.path}: its keys {keys[name]} and {key} are both {name}, by their prefixes")
        keys[name] = key
    return {name: state[key] for name, key in keys.items()}


def check_resumable(content: dict[str, Any], path: str | Path) -> None:
    """Raise `CheckpointError` unless a checkpoint holds what a training run goes on with, each of its type."""
    parts: dict[str, type] = {"optimizer": dict, "lr_scheduler": dict, "epoch": int}
    advice = "drop --resume to use its weights"
    if lacking := [key for key in parts if key not in content]:
        raise CheckpointError(f"{path}: cannot resume, it lacks {', '.join(lacking)}; {advice}")
    parts |= {"scaler": dict} if content.get("scaler") is not None else {}
    for key, kind in parts.items():
        if (found := type(content[key])) is not kind:
            raise CheckpointError(
                f"{path}: cannot resume, its {key!r} is of type {found.__name__}, not {kind.__name__}; {advice}"
            )
    if content["epoch"] < (-1 if "progress" in content else 0):  # -1: within the first epoch
        raise CheckpointError(f"{path}: cannot resume, its 'epoch' is {content['epoch']}; {advice}")


def diverged(tensors: Mapping[str, Tensor], largest: float = LARGEST_WEIGHT) -> str | None:
    """Which tensor first holds NaN, infinity or a value as large as `largest`, in words; None if all are sound."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(value) for value in tensor.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{name} holds NaN or infinity"
            if not -largest < low <= high < largest:
                return f"{name} reaches from {low:.3g} to {high:.3g}"
    return None


def student_of(state: State, path: str | Path, dtype: torch.dtype) -> State:
    """The student's weights out of a state dict, as `dtype` (float32 or float16), each in its own memory.

    Without teacher, queues and position ids, and without the second name of a tied parameter. BLIP's are named as
    transformers has it.

    Raises:
        CheckpointError: weights are not sound, or too large for `dtype`.
    """
    state = _by_our_names(state, LoadReport(str(path)))
    left_out = (TEACHER, QUEUE, POSITION_IDS)
    kept = {key: value for key, value in state.items() if not any(pattern.search(key) for pattern in left_out)}
    for name, other in TIED.items():
        if name in kept and other in kept and torch.equal(kept[name], kept[other]):
            del kept[name]
    if any(map(BLIP.search, kept)):
        kept = {re.sub(r"^visual_encoder\.", "vision_model.", key): value for key, value in kept.items()}
    student = {key: value.to(dtype, copy=True, memory_format=torch.contiguous_format) for key, value in kept.items()}
    if problem := diverged(student):
        raise CheckpointError(f"{path}: not to be given away, {problem} in {str(dtype).removeprefix('torch.')}")
    return student


def load_weights(model: ALBEF, state: State, path: str | Path) -> LoadReport:
    """Load a state dict into ALBEF or BLIP, for training or for evaluation.

    Explained differences: position embeddings of another resolution are resized; `queue_ptr` serves for both pointers;
    a parameter with two names may stand under one of them;
    a queue of another length starts afresh; a training model given student weights alone copies its teacher from them;
    a model without teacher, queues, MLM head or position ids leaves those out; transformers' BLIP has no temperature.

    Raises:
        CheckpointError: any other missing, unexpected or differently shaped key.
    """
    report = LoadReport(str(path))
    target, state = model.state_dict(), _by_our_names(state, report)
    _convert_queues(state, target, report)
    _convert_tied(state, target, report)
    _convert_teacher(state, target, report)
    _fit_positions(state, target, report, model.visual_encoder)
    state |= {key: target[key] for key in target.keys() - state if POSITION_IDS.search(key)}  # not always saved
    if "temp" not in state and any(map(BLIP.search, state)):
        report.fresh.append("temperature (missing in the file)")
        state["temp"] = target["temp"]
    parts = {"teacher": TEACHER, "queues": QUEUE, "MLM head": MLM_HEAD, "position ids": POSITION_IDS}
    for what, pattern in parts.items():
        extra = [key for key in state if pattern.search(key)]
        if extra and not any(map(pattern.search, target)):  # else a tensor too many is an error
            report.ignored.append(f"{what}, {len(extra)} tensors")
            state = {key: value for key, value in state.items() if key not in extra}
    return _load(model, state, report)


def _convert_queues(state: State, target: State, report: LoadReport) -> None:
    if "image_queue" not in target:
        return
    names = ("image_queue", "text_queue", "queue_ptr_img", "queue_ptr_txt")
    if (single := state.pop("queue_ptr", None)) is not None:
        for name in names[2:]:
            state.setdefault(name, single.reshape(-1).clone())
    lengths = [state[name].shape[1:] for name in names[:2] if name in state]
    if not lengths:
        was = "missing"
    elif len(lengths) == 2 and len(lengths[0]) == 1 and lengths[0] == lengths[1] != target["image_queue"].shape[1:]:
        was = f"of length {lengths[0][-1]}"
    else:
        return  # they fit, or `_load` says what does not
    report.fresh.append(f"queues ({was} in the file, {target['image_queue'].shape[1]} here)")
    state.update({name: target[name] for name in names})


def _convert_tied(state: State, target: State, report: LoadReport) -> None:
    absent = [name for name, other in TIED.items() if name in target and name not in state and other in state]
    if absent:
        report.converted.append(f"{len(absent)} tensors of the MLM head, tied to others")
        state.update({name: state[TIED[name]] for name in absent})


def _convert_teacher(state: State, target: State, report: LoadReport) -> None:
    wanted = {key: key.replace("_m.", ".", 1) for key in target if TEACHER.match(key)}
    if wanted and not any(TEACHER.match(key) for key in state):
        report.fresh.append("teacher (copied from the student; the file has none)")
        state.update({key: state[student] for key, student in wanted.items() if student in state})


def _fit_positions(state: State, target: State, report: LoadReport, encoder: ViT) -> None:
    """Resize position embeddings (1, P + g * g, W) of another resolution, bicubically; the first P stay.

    Only from square grid to square grid: `_load` says what else is wrong with them.
    """
    grid = list(encoder.patch_embed.grid_size)
    for key in [key for key in target if key in state and POSITION_EMBEDDING.match(key)]:
        old, (_, tokens, width) = state[key].shape, target[key].shape
        if len(old) != 3 or (old[0], old[2]) != (1, width) or old[1] == tokens:
            continue
        prefix = tokens - math.prod(grid)
        patches = old[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches and grid[0] == grid[1]:
            state[key] = resample_abs_pos_embed(state[key], grid, num_prefix_tokens=prefix, antialias=False)
            report.resized.append(f"{key}, {old[1]} to {tokens} tokens")


def _load(module: nn.Module, state: State, report: LoadReport) -> LoadReport:
    """Load a state dict that fits; raises `CheckpointError` naming everything about it that does not."""
    target, path = module.state_dict(), report.path
    missing, unexpected = [key for key in target if key not in state], [key for key in state if key not in target]
    for name, pattern in OTHER_MODELS.items():
        match = re.compile(pattern).search
        if (other := next(filter(match, unexpected), None)) and not any(map(match, target)):
            raise CheckpointError(f"{path}: holds {name}, not the model of this config (by its key {other})")
    pairs = [(key, state[key], target[key]) for key in state if key in target]
    shapes = [(key, list(own.shape), list(wanted.shape)) for key, own, wanted in pairs if own.shape != wanted.shape]
    # position_ids may be of any type: their numbers are known, and compared below
    odd = [found for found in pairs if not (_same_kind(*found[1:]) or POSITION_IDS.search(found[0]))]
    types = [(key, own.dtype, wanted.dtype) for key, own, wanted in odd]
    problems = {"missing": missing, "unexpected": unexpected}
    for what, differences in (("of another shape", shapes), ("of another type", types)):
        problems[what] = [f"{key} is {own}, the model has {wanted}" for key, own, wanted in differences]
    if any(problems.values()):
        lines = [f"\n  {what}: {_listing(found)}" for what, found in problems.items() if found]
        raise CheckpointError(f"{path}: does not fit the model of this config{''.join(lines)}")
    for key in filter(POSITION_IDS.search, state):
        if (state[key] != target[key]).any():
            raise CheckpointError(f"{path}: {key} does not count from 0: the file is damaged")
    module.load_state_dict(state)
    report.loaded = len(state)
    return report


def _same_kind(stored: Tensor, wanted: Tensor) -> bool:
    """Whether copying keeps the numbers, but for rounding: a quantized weight's integers are not its numbers."""
    if wanted.dtype in FLOATS:
        return stored.dtype in FLOATS
    return not stored.is_floating_point() and not stored.is_complex()


def _listing(items: list[str], most: int = 5) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def init_image_encoder(encoder: ViT, path: str | Path) -> LoadReport:
    """Start the image encoder from a DeiT or timm ViT state dict; its classifier is left out."""
    report = LoadReport(str(path))
    weights = _by_our_names(read_checkpoint(path)["model"], report)
    state = {key: value for key, value in weights.items() if not key.startswith("head")}
    if heads := len(weights) - len(state):
        report.ignored.append(f"classifier, {heads} tensors")
    _fit_positions(state, encoder.state_dict(), report, encoder)
    return _load(encoder, state, report)


def init_text_encoder(encoder: TextEncoder, text_encoder: str) -> LoadReport:
    """Start the text encoder from a pretrained BERT, a hub name or a local folder; cross-attention stays random.

    A folder without weights leaves everything random, and the report says so.
    """
    report = LoadReport(text_encoder)
    folder = Path(text_encoder)
    with contextlib.suppress(ConfigError):  # as for a BERT
        load_student_config(folder / CONFIG)
        raise CheckpointError(f"--text_encoder {text_encoder}: holds a whole model; pass it as --checkpoint")
    weights = ("[!.]*.safetensors", "pytorch_model*.bin")
    if folder.is_dir() and not any(file for pattern in weights for file in folder.glob(pattern)):
        report.fresh.append("text encoder (WARNING: the folder holds no weights, all of them are random)")
        return report
    from transformers import BertForMaskedLM

    try:
        for file in folder.glob("*.bin"):  # transformers does not look at checksums
            if zipfile.is_zipfile(file):
                verify_archive(file)
        loaded: Any = BertForMaskedLM.from_pretrained(text_encoder, output_loading_info=True)
    except Exception as error:  # transformers raises whatever a damaged file makes it
        raise CheckpointError(
            f"--text_encoder {text_encoder}: no BERT weights there ({_refused_call(error) or why_unreadable(error)}); "
            "give a local folder, or start from a --checkpoint, which holds them"
        ) from error
    bert, found = loaded
    if absent := sorted(found["missing_keys"]):
        report.fresh.append(f"WARNING: {_listing(absent)} (random: the folder holds no such weights)")
    state, target = bert.state_dict(), encoder.state_dict()
    new = {key: target[key] for key in target if ".crossattention." in key or POSITION_IDS.search(key)}
    if fresh := new.keys() - state:
        report.fresh.append(f"cross-attention, {len(fresh)} tensors (random: BERT has none)")
    _load(encoder, {**new, **state}, report)
    report.loaded = len(state)
    return report
