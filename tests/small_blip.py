"""A small BLIP of transformers that reads the scenes' words: its config.json, itself, and a folder of it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from dataset.scenes import files as scenes_files
from tests.models.plain import randomise

WORDS = len(scenes_files.vocabulary())
SIZES: dict[str, Any] = {
    "model_type": "blip",
    "image_text_hidden_size": 8,
    "text_config": {
        "vocab_size": WORDS + 2,
        "bos_token_id": WORDS,
        "sep_token_id": 3,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 33,
        "initializer_range": 0.1,
    },
    "vision_config": {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "image_size": 48,
        "patch_size": 16,
        "initializer_range": 0.1,
    },
}


def transformers_blip(seed: int = 3) -> Any:
    """Transformers' own, with weights far from their start."""
    model = BlipForImageTextRetrieval(BlipConfig.from_dict(json.loads(json.dumps(SIZES))))
    randomise(model, seed, 0.35)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model.eval().requires_grad_(False)


def write_folder(folder: Path, model: Any, safetensors: bool = True) -> Path:
    """The files that transformers writes, with the scenes' vocabulary."""
    model.save_pretrained(folder)
    if not safetensors:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    return folder
