"""Where the embedded scenes, their shipped models and the models of `make demo` lie, relative to the repository."""

from pathlib import Path

SCENES = Path("data/scenes")  # written by `python prepare.py scenes data/scenes`
SHOWN = Path("docs/images/scenes")  # some held-out scenes that ship, with phrases
CONFIGS = Path("configs/scenes")
BERT_CONFIG = CONFIGS / "config_bert.json"
TEXT_ENCODER = CONFIGS  # holds vocab.txt
SHIPPED = Path("checkpoints/scenes_stage1.safetensors")  # trained without AMC
SHIPPED_CONFIG = CONFIGS / "Grounding_refcoco.yaml"
SHIPPED_AMC = Path("checkpoints/scenes_amc.safetensors")
DEMO = Path("output/scenes")  # written by `make demo`
DEMO_CONTROL, DEMO_AMC = DEMO / "control", DEMO / "amc"
