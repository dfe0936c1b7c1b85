"""The training step: the published procedure against ours, in one run, on the same weights and batch.

    python benchmarks/bench_train.py            full size, batch 8, 256 px, 12 tokens
    python benchmarks/bench_train.py --quick    the small model of the scenes

A step is forward, backward and AdamW, without dropout and at a learning rate of nearly 0, so that every step of every
variant sees the same weights, and the losses can be compared. Rounds of all variants alternate; medians are reported.
Peak memory is that of a process of its own, which does two steps.
"""

import argparse
import functools
import multiprocessing
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from benchmarks import published
from benchmarks.machine import GLIBC_KEEPS, Clock, describe_machine, parser, peak_memory, print_table
from config import OptimizerConfig, PretrainConfig, load_bert_config, load_config
from models.pretrain import Batch, PretrainModel
from models.xbert import Attention
from optim import create_optimizer, parameter_groups

ALPHA = 0.4
STEP_VARIANTS = {  # precision, and whether activations are recomputed
    "published": (torch.float32, False),
    "ours, fp32": (torch.float32, False),
    "ours, bf16": (torch.bfloat16, False),
    "ours, fp32, checkpointing": (torch.float32, True),
    "ours, bf16, checkpointing": (torch.bfloat16, True),
}


def make_batch(size: int, tokens: int, config: PretrainConfig, words: int) -> Batch:
    """Noise, random words of which every sixth is masked, and a box in the middle."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, words, (size, tokens), generator=generator)
    masked, labels = ids.clone(), torch.full_like(ids, -100)
    masked[:, 2::6], labels[:, 2::6] = 4, ids[:, 2::6]
    side, quarter = config.mask_size, config.mask_size // 4
    boxes = torch.zeros(size, side, side)
    boxes[:, quarter : 2 * quarter, quarter : 3 * quarter] = 1
    image = torch.randn(size, 3, config.image_res, config.image_res, generator=generator)
    return Batch(image, ids, torch.ones_like(ids), masked, labels, boxes, torch.ones(size, dtype=torch.bool))


def build_model(config: PretrainConfig) -> PretrainModel:
    torch.manual_seed(0)
    model = PretrainModel(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Attention):
            module.dropout_prob = 0.0
    return model


class Trainer:
    """The model with its batch and optimizers, ready to make a step of any variant."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = Path(__file__).parents[1] / "configs" / ("scenes" if args.quick else "")
        config = load_config(folder / "Pretrain.yaml", PretrainConfig)
        self.config = config.model_copy(update={"negative_sharpness": 1.0})
        self.model = build_model(self.config)
        self.fast = published.fast_copy(self.model)
        self.batch = make_batch(args.batch, args.tokens, self.config, load_bert_config(config.bert_config).vocab_size)
        groups = parameter_groups(self.model, 0.0)
        self.plain = torch.optim.AdamW(groups, lr=1e-30, foreach=False, fused=False)
        self.ours = create_optimizer(OptimizerConfig(opt="adamW", lr=1e-30, weight_decay=0.0), self.model)
        self.ours.state = self.plain.state  # one set of moments
        self.queues = {name: buffer.clone() for name, buffer in self.model.named_buffers() if "queue" in name}

    def reset(self) -> None:
        """The queues as they were at first, the random state that draws the negatives, and glibc's setting."""
        for name, buffer in self.queues.items():
            self.model.get_buffer(name).copy_(buffer)
        torch.manual_seed(2)
        utils.return_freed_memory(GLIBC_KEEPS)

    def step(self, label: str) -> dict[str, float]:
        """Forward, backward and AdamW; returns the losses."""
        if label == "published":
            return self.finish(published.training_losses(self.model, self.batch, ALPHA), self.plain)
        precision, checkpointing = STEP_VARIANTS[label]
        self.fast.checkpoint_activations(checkpointing)
        (utils.return_freed_memory if checkpointing else utils.keep_freed_memory)()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            values = self.fast(self.batch, ALPHA)
        return self.finish(values, self.ours)

    def finish(self, values: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        self.model.total(values).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: float(value.detach()) for name, value in values.items()}


def memory_of(label: str, args: argparse.Namespace) -> float:
    """The most memory, in GB, that this process needs for two steps of a variant."""
    trainer = Trainer(args)
    for _ in range(2):
        trainer.step(label)
    return peak_memory()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    for name, default in {"--rounds": 3, "--batch": 8, "--tokens": 12}.items():
        options.add_argument(name, type=int, default=default)
    args = options.parse_args()
    trainer, clock = Trainer(args), Clock()
    calls = {label: functools.partial(trainer.step, label) for label in STEP_VARIANTS}
    found = clock.in_turns(calls, args.rounds + 1, before=trainer.reset)
    image_res = trainer.config.image_res
    del trainer, calls

    print(describe_machine())
    print(f"batch {args.batch}, {image_res} px, {args.tokens} tokens, {args.rounds} rounds after a first one\n")

    def row(label: str) -> list[str]:
        seconds, losses = clock.median(label, skip=1), found[label]
        error = max(abs(losses[name] - value) for name, value in found["published"].items())
        ratio = clock.median("published", skip=1) / seconds
        memory = processes.apply(memory_of, (label, args))
        return [label, f"{seconds:.2f}", f"{ratio:.2f}", f"{memory:.1f}", f"{error:.1e}"]

    heads = ["", "s per step", "ratio", "peak memory, GB", "losses differ by at most"]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        print_table(heads, map(row, STEP_VARIANTS))


if __name__ == "__main__":
    main()
