"""Where the embedded scenes, their shipped model and the models of `make demo` lie, relative to the repository."""

from pathlib import Path

SCENES = Path("data/scenes")  # written by `python prepare.py scenes data/scenes`
TEXT_ENCODER = SCENES / "text_encoder"
BERT_CONFIG = Path("configs/scenes/config_bert.json")
SHIPPED = Path("checkpoints/scenes_stage1.safetensors")  # trained without AMC
SHIPPED_CONFIG = Path("configs/scenes/Grounding_refcoco.yaml")
DEMO = Path("output/scenes")  # written by `make demo`
DEMO_CONTROL, DEMO_AMC = DEMO / "control", DEMO / "amc"
