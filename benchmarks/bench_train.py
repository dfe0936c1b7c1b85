"""The training step: the published procedure against ours, in one run, on the same weights and batch.

    python benchmarks/bench_train.py            full size, batch 8, 256 px, 12 tokens
    python benchmarks/bench_train.py --quick    the small model of the scenes

A step is forward, backward and AdamW, without dropout and at a learning rate of nearly 0, so that every step of every
variant sees the same weights, and the losses can be compared. Rounds of all variants alternate; medians are reported.
Peak memory is that of the process; weights, gradients and AdamW's moments are most of it in every variant.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import published
from benchmarks.machine import Clock, describe_machine
from config import OptimizerConfig, PretrainConfig, load_config
from models.pretrain import Batch, PretrainModel
from models.xbert import Attention
from optim import create_optimizer, parameter_groups

ALPHA = 0.4
CONFIGS = Path(__file__).parents[1] / "configs"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12)
    args = parser.parse_args()
    config = load_config(CONFIGS / ("scenes" if args.quick else "") / "Pretrain.yaml", PretrainConfig)
    config = config.model_copy(update={"negative_sharpness": 1.0})
    model = build_model(config)
    fast = published.with_onednn(model)
    batch = make_batch(args.batch, args.tokens, config, model.text_encoder.config.vocab_size)
    plain = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-30, foreach=False, fused=False)
    ours = create_optimizer(OptimizerConfig(opt="adamW", lr=1e-30, weight_decay=0.0), model)
    queues = {name: buffer.clone() for name, buffer in model.named_buffers() if "queue" in name}

    def step(losses: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        with torch.no_grad():
            for name, buffer in queues.items():
                model.get_buffer(name).copy_(buffer)
        torch.manual_seed(2)  # for the negatives
        with clock.measure(label):
            values = losses()
            torch.stack([weight * values[name] for name, weight in model.loss_weights.items()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: float(value.detach()) for name, value in values.items()}

    clock, found = Clock(), {}
    variants = {
        "published": (torch.float32, False),
        "ours, fp32": (torch.float32, False),
        "ours, bf16": (torch.bfloat16, False),
        "ours, fp32, checkpointing": (torch.float32, True),
        "ours, bf16, checkpointing": (torch.bfloat16, True),
    }
    for _ in range(args.rounds + 1):
        for label, (precision, checkpointing) in variants.items():
            if label == "published":
                with published.plain_attention(model):
                    found[label] = step(lambda: published.training_losses(model, batch, ALPHA), plain)
                plain.state.clear()  # one set of moments at a time
                continue
            fast.checkpoint_activations(checkpointing)
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                found[label] = step(lambda: fast(batch, ALPHA), ours)
            ours.state.clear()

    print(describe_machine())
    print(f"batch {args.batch}, {config.image_res} px, {args.tokens} tokens, {args.rounds} rounds after a first one\n")
    print("| | s per step | ratio | peak memory, GB | losses differ by at most |\n|---|---:|---:|---:|---:|")
    for label in variants:
        seconds = clock.median(label, skip=1)
        ratio = clock.median("published", skip=1) / seconds
        error = max(abs(found[label][name] - value) for name, value in found["published"].items())
        print(f"| {label} | {seconds:.2f} | {ratio:.2f} | {clock.memory[label]:.1f} | {error:.1e} |")


if __name__ == "__main__":
    main()
