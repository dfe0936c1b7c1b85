"""Checkpoints: read (safely), convert, check, write (atomically).

A checkpoint is a `torch.save` dict with `model` (state dict), `optimizer`, `lr_scheduler`, `config`, `epoch`; a
`.safetensors` file holds the state dict alone. Loading never hides a mismatch: what is converted, started afresh or
left out on purpose is reported, and anything else that does not fit is an error.
"""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.vit import VisionTransformer
from models.xbert import TextEncoder
from utils import UserError, atomic_path, load_tensors

State = dict[str, Tensor]

TEACHER = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
QUEUE = re.compile(r"^(image_queue|text_queue|queue_ptr|queue_ptr_img|queue_ptr_txt)$")
MLM_HEAD = re.compile(r"^text_encoder\.cls\.")
POSITION_EMBEDDING = re.compile(r"^visual_encoder(_m)?\.pos_embed$")
POSITION_IDS = re.compile(r"embeddings\.position_ids$")

UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, SafetensorError, pickle.UnpicklingError)


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file, the keys and the shapes."""


@dataclass
class LoadReport:
    """What became of every key: of the file's, and of the model's."""

    path: str
    loaded: int = 0
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.loaded} tensors loaded"]
        for verb, notes in (("resized", self.resized), ("fresh", self.fresh), ("ignored on purpose", self.ignored)):
            lines += [f"  {verb}: {note}" for note in notes]
        return "\n".join(lines)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it; `model` is always there.

    Raises:
        CheckpointError: missing, truncated, holding other objects than tensors and plain values, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except UNREADABLE as error:
        if call := _refused_call(error):
            raise CheckpointError(f"{path}: refused, it holds more than tensors and plain values ({call})") from error
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({_reason(error)}); is the download complete?"
        ) from error
    content = content if isinstance(content, dict) and "model" in content else {"model": content}
    model = content["model"]
    if not isinstance(model, dict) or not model or not all(isinstance(value, Tensor) for value in model.values()):
        raise CheckpointError(f"{path}: no state dict found, neither under 'model' nor at the top level")
    content["model"] = {key.removeprefix("module."): value for key, value in model.items()}
    return content


def _refused_call(error: Exception) -> str | None:
    """What a pickle wanted to call, if that is why it was not read."""
    found = re.search(r"\bGLOBAL (\S+)", str(error))
    return found[1] if found else None


def _reason(error: Exception) -> str:
    """A reader's own words, in one line; not PyTorch's advice to read unsafely what it cannot read safely."""
    if isinstance(error, pickle.UnpicklingError):
        return "not a file that PyTorch writes"
    return str(error).split("\n")[0] or type(error).__name__


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def first_not_finite(model: nn.Module) -> str | None:
    """The key of the first tensor of a model that holds NaN or infinity, if any does."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return key
    return None


def export_student(checkpoint: str | Path, out: str | Path) -> None:
    """Write a checkpoint's student alone, in half precision, as safetensors: what to start another training from."""
    state = read_checkpoint(checkpoint)["model"]
    left_out = (TEACHER, QUEUE, POSITION_IDS)
    kept = {key: value for key, value in state.items() if not any(pattern.search(key) for pattern in left_out)}
    with atomic_path(out) as temporary:
        save_file({key: value.half().contiguous().clone() for key, value in kept.items()}, temporary)


def load_weights(model: nn.Module, state: State, path: str | Path) -> LoadReport:
    """Load a state dict into ALBEF, for training or for evaluation.

    Explained differences: position embeddings of another resolution are resized; `queue_ptr` serves for both pointers;
    a queue of another length starts afresh; a training model given student weights alone copies its teacher from them;
    a model without teacher, queues or MLM head leaves those out.

    Raises:
        CheckpointError: any other missing, unexpected or differently shaped key.
    """
    report = LoadReport(str(path))
    target = model.state_dict()
    state = dict(state)
    _convert_queues(state, target, report)
    _convert_teacher(state, target, report)
    for key in [key for key in state if key in target and POSITION_EMBEDDING.match(key)]:
        if state[key].shape != target[key].shape:
            before = state[key].shape[1]
            state[key] = resize_position_embedding(state[key], target[key].shape[1])
            report.resized.append(f"{key}, {before} to {target[key].shape[1]} tokens")
    for key in [key for key in target if key not in state and POSITION_IDS.search(key)]:
        state[key] = target[key]  # a constant that some versions of transformers do not save
    for what, pattern in (("teacher", TEACHER), ("queues", QUEUE), ("MLM head", MLM_HEAD)):
        if any(pattern.match(key) for key in target):
            continue  # the model has one of its own: a tensor too many is no part of it
        extra = [key for key in state if pattern.match(key)]
        if extra:
            report.ignored.append(f"{what}, {len(extra)} tensors")
        for key in extra:
            del state[key]
    _check(state, target, path)
    model.load_state_dict(state)
    report.loaded = len(state)
    return report


def _convert_queues(state: State, target: State, report: LoadReport) -> None:
    if "image_queue" not in target:
        return
    single = state.pop("queue_ptr", None)
    names = ("image_queue", "text_queue", "queue_ptr_img", "queue_ptr_txt")
    if single is not None:
        for name in names[2:]:
            state.setdefault(name, single.reshape(1).clone())
    lengths = [state[name].shape[-1:] for name in names[:2] if name in state]
    if not lengths:
        was = "missing"
    elif len(lengths) == 2 and lengths[0] == lengths[1] != target["image_queue"].shape[-1:]:
        was = f"of length {lengths[0][-1]}"
    else:
        return  # they fit, or `_check` says what does not
    report.fresh.append(f"queues ({was} in the file, {target['image_queue'].shape[1]} here)")
    state.update({name: target[name] for name in names})


def _convert_teacher(state: State, target: State, report: LoadReport) -> None:
    wanted = [key for key in target if TEACHER.match(key)]
    if not wanted or any(TEACHER.match(key) for key in state):
        return
    report.fresh.append("teacher (copied from the student; the file has none)")
    for key in wanted:
        student = key.replace("_m.", ".", 1)
        if student in state:
            state[key] = state[student]


def _check(state: State, target: State, path: str | Path) -> None:
    problems = []
    if missing := [key for key in target if key not in state]:
        problems.append(f"missing: {_listing(missing)}")
    if unexpected := [key for key in state if key not in target]:
        problems.append(f"unexpected: {_listing(unexpected)}")
    reshaped = [key for key in state if key in target and state[key].shape != target[key].shape]
    if reshaped:
        shapes = (f"{key} is {list(state[key].shape)}, the model has {list(target[key].shape)}" for key in reshaped)
        problems.append(f"of another shape: {_listing(list(shapes))}")
    if problems:
        raise CheckpointError(f"{path}: does not fit the model of this config\n  " + "\n  ".join(problems))


def _listing(items: list[str], most: int = 5) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """(1, 1 + g * g, W) -> (1, tokens, W): bicubic on the patch grid, align_corners False; the CLS position stays."""
    old, new = (round((count - 1) ** 0.5) for count in (embedding.shape[1], tokens))
    if old * old + 1 != embedding.shape[1] or new * new + 1 != tokens:
        raise CheckpointError(f"position embeddings of {embedding.shape[1]} tokens: not a square grid and a CLS token")
    cls, patches = embedding[:, :1], embedding[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = F.interpolate(patches.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def init_image_encoder(encoder: VisionTransformer, path: str | Path) -> LoadReport:
    """Start the image encoder from a DeiT or timm ViT state dict; its classifier is left out."""
    state = read_checkpoint(path)["model"]
    report = LoadReport(str(path))
    target = encoder.state_dict()
    heads = [key for key in state if key.startswith("head")]
    if heads:
        report.ignored.append(f"classifier, {len(heads)} tensors")
    state = {key: value for key, value in state.items() if key not in heads}
    if "pos_embed" in state and state["pos_embed"].shape != target["pos_embed"].shape:
        report.resized.append(f"pos_embed, {state['pos_embed'].shape[1]} to {target['pos_embed'].shape[1]} tokens")
        state["pos_embed"] = resize_position_embedding(state["pos_embed"], target["pos_embed"].shape[1])
    _check(state, target, path)
    encoder.load_state_dict(state)
    report.loaded = len(state)
    return report


def init_text_encoder(encoder: TextEncoder, text_encoder: str) -> LoadReport:
    """Start the text encoder from a pretrained BERT, a hub name or a local folder; cross-attention stays random.

    A folder without weights leaves everything random, and the report says so.
    """
    report = LoadReport(text_encoder)
    folder = Path(text_encoder)
    weights = ("*.safetensors", "pytorch_model*.bin")
    if folder.is_dir() and not any(file for pattern in weights for file in folder.glob(pattern)):
        report.fresh.append("text encoder (WARNING: the folder holds no weights, all of them are random)")
        return report
    from transformers import BertForMaskedLM

    try:
        loaded: Any = BertForMaskedLM.from_pretrained(text_encoder, output_loading_info=True)
    except UNREADABLE as error:
        raise CheckpointError(
            f"--text_encoder {text_encoder}: no BERT weights there ({_refused_call(error) or _reason(error)}); give a "
            "local folder, or start from a --checkpoint, which holds them"
        ) from error
    bert, found = loaded
    if absent := sorted(found["missing_keys"]):
        report.fresh.append(f"WARNING: {_listing(absent)} (random: the folder holds no such weights)")
    state = bert.state_dict()
    target = encoder.state_dict()
    fresh = _new_to_bert(target, state)
    if fresh:
        report.fresh.append(f"cross-attention, {len(fresh)} tensors (random: BERT has none)")
    _check({**state, **{key: target[key] for key in fresh}}, target, text_encoder)
    encoder.load_state_dict({**state, **{key: target[key] for key in fresh}})
    report.loaded = len(state)
    return report


def _new_to_bert(target: State, state: State) -> list[str]:
    return [key for key in target if key not in state and (".crossattention." in key or POSITION_IDS.search(key))]
