"""Write the student of a checkpoint into a folder to give away, in the layout of the Hugging Face hub.

    python export.py CHECKPOINT OUT [--half] [--results EVALUATION_OUTPUT_DIR ...]

OUT holds model.safetensors, config.json (sizes, image size, AMC's layer), the vocabulary, and README.md, a model card
with the accuracies of the evaluations named. Every program takes OUT as its --checkpoint, or the name of the hub's
repository that it is uploaded to (docs/sharing.md). Teacher, queues and the optimizer's state stay behind.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from config import ConfigError, GroundingConfig, ModelConfig, load_any_config, load_config, parse_config
from grounding import identity
from grounding.load import build_model, choose_text_encoder, vocabulary_for
from grounding.results import ResultError, ResultFolder, percent
from model_sizes import StudentConfig, load_bert_config, student_json
from models.checkpoint import load_weights, read_checkpoint, student_of
from models.interface import check_layer
from models.student import check_free, is_student, local_checkpoint, write_student
from system.errors import megabytes

CARD = """---
tags: [visual-grounding, vision-language]
---
# {name}

Finds the place of a phrase in an image. A vision-language model, {model}, {tuned} Attention Mask Consistency, AMC
(Yang et al., CVPR 2023, [arXiv 2206.15462](https://arxiv.org/abs/2206.15462)). The place is read off the GradCAM map
of layer {layer}'s cross-attention.

This folder holds the student alone: {count:,} weights in {precision} ({size}), their sizes (config.json) and the
vocabulary. It holds no code: {needs}.

## Use

```sh
python demo.py IMAGE PHRASE --checkpoint OWNER/{name}
python grounding_eval.py --config configs/Grounding_own.yaml --checkpoint OWNER/{name} --output_dir OUT
```

```python
from pathlib import Path
from dataset.photos import read_photo
from grounding.explain import ground
from grounding.load import open_model

found = ground(open_model("OWNER/{name}").explainer(), read_photo(Path("IMAGE.jpg")), "a phrase")
found.map, found.point, found.boxes, found.match
```

A local folder does in place of OWNER/{name}.

## Training

{facts}

## Accuracy

{accuracies}
"""
# Name and paper; what maps and model need.
MODELS = {
    "albef": ("ALBEF\n([arXiv 2107.07651](https://arxiv.org/abs/2107.07651))", "it needs the code of AMC"),
    "blip": (
        "BLIP\n([arXiv 2201.12086](https://arxiv.org/abs/2201.12086))",
        """maps need the code of AMC. The weights are also those of
transformers' BlipForImageTextRetrieval, which leaves out `temp`, the temperature of contrast; a text to match begins
with [ENC], the last id of BLIP's vocabulary, in place of [CLS]""",
    ),
}
TUNED = {True: "tuned by", False: "not yet tuned by", None: "for use with"}
ROUNDED = "Measured on the checkpoint itself, before its weights were rounded to half precision."
# Of the training config, what the card tells: no paths, for they are of a private machine.
TOLD = (
    "image_res",
    "batch_size",
    "optimizer",
    "schedular",
    "add_gcam",
    "amc",
    "augment",
    "mask_all",
    "mlm_probability",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a checkpoint's student into a folder to give away.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or another student")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--half", action="store_true", help="half precision: half the size; maps change slightly")
    parser.add_argument("--config", help="a YAML file with the sizes (default: the config inside the checkpoint)")
    vocabulary = "hub name or folder of the vocabulary (default: the checkpoint's, the scenes' or bert-base-uncased)"
    parser.add_argument("--text_encoder", help=vocabulary)
    results = "--output_dir of evaluations of CHECKPOINT, for the model card"
    parser.add_argument("--results", nargs="+", default=[], type=Path, metavar="FOLDER", help=results)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a folder of this program")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_free(args.out, args.force)
    checkpoint = local_checkpoint(args.checkpoint)
    content = read_checkpoint(checkpoint)
    sizes = load_any_config(args.config).model_dump(mode="json") if args.config else content.get("config")
    config, bert_config = student_config(sizes, args.config or checkpoint)
    text_encoder = args.text_encoder or choose_text_encoder(checkpoint, bert_config)
    vocabulary = Path(vocabulary_for(bert_config, text_encoder).source)
    state = student_of(content["model"], checkpoint, torch.float16 if args.half else torch.float32)
    own = config.model_dump(exclude={"bert_config", "amc"})
    model = build_model(ModelConfig(bert_config=bert_config, **own))
    load_weights(model, state, checkpoint)  # what does not fit is said here, not where the folder is opened
    if (key := "vision_model.embeddings.position_embedding") in state:  # transformers resizes none
        state[key] = model.visual_encoder.embeddings.position_embedding.detach().to(state[key].dtype)
    check_layer(model, "itm", config.amc.layer)
    rows = [row for folder in args.results for row in accuracy_rows(folder, checkpoint)]
    size, precision = sum(tensor.nbytes for tensor in state.values()), "half precision" if args.half else "float32"
    trained = content.get("config")
    card = CARD.format(
        name=args.out.resolve().name,
        model=MODELS[config.model][0],
        needs=MODELS[config.model][1],
        tuned=TUNED[trained.get("add_gcam", not is_student(checkpoint) or None) if isinstance(trained, dict) else None],
        layer=config.amc.layer,
        count=sum(tensor.numel() for tensor in state.values()),
        precision=precision,
        size=megabytes(size),
        facts=facts(content),
        accuracies=table(rows) + ("\n\n" + ROUNDED if args.half and rows else ""),
    )
    write_student(args.out, state, student_json(config, bert_config), vocabulary, card, args.force)
    print(f"{args.out}: {len(state)} tensors in {precision}, {megabytes(size)}; vocabulary: {vocabulary}")
    print(f"README.md is its model card, with {len(rows)} accuracies; read it through before you give it away")


def student_config(values: Any, source: str | Path) -> tuple[StudentConfig, str]:
    """The config of a student, and the file of its bert_config, from a training or evaluation config."""
    if not isinstance(values, dict) or not isinstance(values.get("bert_config"), str):
        raise ConfigError(f"{source}: does not say the sizes of its model; pass --config, for instance a Pretrain.yaml")
    keys = {key: values[key] for key in StudentConfig.model_fields if key in values}
    if "block_num" in values:  # of evaluation
        keys["amc"] = {"layer": values["block_num"]}
    bert = load_bert_config(values["bert_config"]).model_dump()
    return parse_config(source, StudentConfig, {**keys, "bert_config": bert}), values["bert_config"]


# ---- the model card


def facts(content: dict[str, Any]) -> str:
    """What a checkpoint tells of its training, as a list; without the paths of its config, which are private."""
    found = {}
    if type(epoch := content.get("epoch")) is int:
        progress = content.get("progress")
        step = progress.get("step") if isinstance(progress, dict) else 0
        found["epochs"] = f"{epoch + 1}, and {step} steps of the next" if step else epoch + 1
    for values, keys in ((content.get("run"), None), (content.get("config"), TOLD)):
        if isinstance(values, dict):
            found |= {key: values[key] for key in keys or values if key in values}
    lines = [f"- {key}: `{json.dumps(value, default=str)}`" for key, value in found.items()]
    return "\n".join(lines) or "The checkpoint does not tell."


def accuracy_rows(folder: Path, checkpoint: Path) -> list[list[str]]:
    """The accuracies that an evaluation's --output_dir holds of a checkpoint: benchmark, metric, split, %, how.

    Raises:
        ResultError: it holds no complete result of that very checkpoint.
    """
    results = ResultFolder(folder / "result")
    pairs = [Path(file).stem for file in load_config(folder / "config.yaml", GroundingConfig).matching_file]
    origins = {epoch: results.origin(epoch) for epoch in results.epochs()}
    digest = identity.of_checkpoint(checkpoint, origins.values())[identity.CHECKPOINT]
    rows = []
    for epoch, origin in origins.items():
        if origin.get(identity.CHECKPOINT) == digest:
            how = "{gradcam_mode} at layer {block_num}, {image_res} pixels, {precision}".format_map(origin)
            found = results.accuracies(epoch, [*results.metrics(epoch, ()), *pairs])
            rows += [
                [origin["benchmark"], metric, split, percent(value), how] for (metric, split), value in found.items()
            ]
    if not rows:
        held = ", ".join(str(origin.get("checkpoint", "unknown")) for origin in origins.values()) or "none"
        raise ResultError(f"--results {folder}: holds no complete result of {checkpoint} (its results are of: {held})")
    return rows


def table(rows: list[list[str]]) -> str:
    """Accuracies as a table in Markdown."""
    if not rows:
        return "Not measured."
    lines = [
        ["benchmark", "metric", "split", "accuracy in %", "explained"],
        ["---", "---", "---", "---:", "---"],
        *rows,
    ]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    utils.run(main, parse_args())
