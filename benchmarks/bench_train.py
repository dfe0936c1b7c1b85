"""The training step: the published procedure against ours, in one run, on the same weights and batch.

    python benchmarks/bench_train.py                  full size, batch 8, 256 px, 12 tokens
    python benchmarks/bench_train.py --quick          the small model of the scenes
    python benchmarks/bench_train.py --device cuda    batch 64, 14 tokens, compiled as well
    python benchmarks/bench_train.py --flop --batch 64 --tokens 14 25    instead: count the FLOP of a step

A step is forward, backward and AdamW, without dropout and at a learning rate of nearly 0, so that every step of every
variant sees the same weights, and the losses can be compared. Medians are reported. On the CPU, rounds of all variants
alternate, and peak memory is that of a process of its own, which does two steps. On a GPU each variant has a process of
its own for everything, and a round is several steps in a row: the program does not wait for the device between them.
"""

import argparse
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).parents[1]))

import precision
import utils
from benchmarks import published
from benchmarks.machine import (
    CPU,
    GLIBC_KEEPS,
    Clock,
    count_flop,
    count_launches,
    default_precisions,
    describe_machine,
    device_name,
    device_parser,
    print_table,
    share_of_peak,
    write_trace,
)
from config import OptimizerConfig, PretrainConfig, load_config
from dataset.vg import mlm_targets
from model_sizes import load_bert_config
from models.pretrain import Batch, PretrainModel
from models.xbert import Attention
from optim import create_optimizer, parameter_groups

SERVER = multiprocessing.get_context("forkserver")  # has imported all this once, and has no model
SERVER.set_forkserver_preload(["benchmarks.bench_train"])
ALPHA = 0.4
DEFAULTS = {"cpu": {"batch": 8, "tokens": [12], "rounds": 3, "steps": 1}}
DEFAULTS["cuda"] = {"batch": 64, "tokens": [14], "rounds": 5, "steps": 10}


class Variant(NamedTuple):
    """A way to make a step."""

    procedure: str  # "published" or "ours"
    precision: str  # a key of `precision.DTYPES`
    compiled: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        options = [name for name in ("compiled", "checkpointing") if getattr(self, name)]
        return ", ".join([self.procedure, self.precision, *options])


class Measured(NamedTuple):
    """Of a variant: seconds a step, GB at most, losses by name, and what `count_launches` says of a step."""

    seconds: float
    memory: float
    losses: dict[str, float]
    launches: int
    waits: int


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
    has_box, targets = torch.ones(size, dtype=torch.bool), mlm_targets(labels)
    return Batch(image, ids, torch.ones_like(ids), masked, labels, boxes, has_box, targets)


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
    """The model with its batch and optimizers, ready to make steps of any variant."""

    def __init__(self, args: argparse.Namespace, tokens: int, device: torch.device = CPU) -> None:
        folder = Path(__file__).parents[1] / "configs" / ("scenes" if args.quick else "")
        config = load_config(folder / "Pretrain.yaml", PretrainConfig)
        self.config = config.model_copy(update={"negative_sharpness": 1.0})
        self.device = device
        self.model = build_model(self.config).to(device)
        self.fast = published.fast_copy(self.model)
        words = load_bert_config(config.bert_config).vocab_size
        self.batch = make_batch(args.batch, tokens, self.config, words).to(device)
        groups = parameter_groups(self.model, 0.0)
        self.plain = torch.optim.AdamW(groups, lr=1e-30, foreach=False, fused=False)
        self.ours = create_optimizer(OptimizerConfig(opt="adamW", lr=1e-30, weight_decay=0.0), self.model)
        if device.type == "cpu":  # on a GPU the fused kernel counts its steps there, and the plain one here
            self.ours.state = self.plain.state  # one set of moments
        self.scalers = {fp16: torch.amp.GradScaler(device.type, enabled=fp16) for fp16 in (False, True)}
        self.queues = {name: buffer.clone() for name, buffer in self.model.named_buffers() if "queue" in name}

    @functools.cached_property
    def compiled(self) -> PretrainModel:
        """A copy on the same parameters, compiled."""
        model = published.shared_copy(self.fast)
        model.compile_step()
        return model

    def reset(self) -> None:
        """The queues as they were at first, the random state that draws the negatives, and glibc's setting."""
        for name, buffer in self.queues.items():
            self.model.get_buffer(name).copy_(buffer)
        torch.manual_seed(2)
        utils.return_freed_memory(GLIBC_KEEPS)

    def step(self, variant: Variant, times: int = 1) -> dict[str, Tensor]:
        """So many times forward, backward and AdamW; returns the losses of the last."""
        model, optimizer = (self.compiled if variant.compiled else self.fast), self.ours
        forward: Callable[[Batch, float], dict[str, Tensor]] = model
        if variant.procedure == "published":
            forward, optimizer = functools.partial(published.training_losses, self.model), self.plain
        model.checkpoint_activations(variant.checkpointing)
        (utils.return_freed_memory if variant.checkpointing else utils.keep_freed_memory)()
        dtype, scaler = precision.DTYPES[variant.precision], self.scalers[variant.precision == "fp16"]
        for _ in range(times):
            with precision.use(variant.precision, self.device, training=True):
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    losses = forward(self.batch, ALPHA)
                scaler.scale(self.model.total(losses)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in losses.items()}

    def flop(self) -> int:
        """FLOP of our step, forward and backward; the tensors are simulated, and nothing is computed.

        Products alone, and none twice: what recomputed activations add does not count.
        """
        simulated = FakeTensorMode()
        parts = (*self.model.named_parameters(), *self.model.named_buffers())
        state: dict[str, Tensor] = {name: simulated.from_tensor(tensor) for name, tensor in parts}
        batch = tree_map_only(Tensor, simulated.from_tensor, self.batch)
        self.model.checkpoint_activations(False)
        with simulated:
            return count_flop(lambda: self.model.total(functional_call(self.model, state, (batch, ALPHA))).backward())


def alone(variant: Variant, args: argparse.Namespace, device: torch.device) -> Measured | str:
    """Measure a variant in this process, which does nothing else; where it fails, why."""
    try:
        trainer, clock = Trainer(args, args.tokens[0], device), Clock(device)
        call = functools.partial(trainer.step, variant, args.steps)
        trainer.step(variant)  # compiles, and makes the moments
        rounds = args.rounds if device.type == "cuda" else 1
        losses = clock.in_turns({"": call}, rounds, before=trainer.reset)[""]
        found = {name: float(value) for name, value in losses.items()}
        counted = count_launches(functools.partial(trainer.step, variant), device)
        if args.profile:
            write_trace(functools.partial(trainer.step, variant), device, args.profile, f"train {variant}")
        return Measured(clock.median("") / args.steps, clock.memory[""], found, *counted)
    except Exception as error:  # of a compiler, or of a kernel that is missing: the others are measured all the same
        return "out of memory" if "out of memory" in str(error) else f"failed: {error!r}"


def variants(args: argparse.Namespace) -> list[Variant]:
    """The published procedure in the first precision, then ours in all of them."""
    ours = [Variant("ours", name) for name in args.precisions]
    compiled = [variant._replace(compiled=True) for variant in ours] if args.compile else []
    return [Variant("published", args.precisions[0]), *ours, *compiled, *(v._replace(checkpointing=True) for v in ours)]


def measure_all(asked: list[Variant], args: argparse.Namespace, device: torch.device) -> Iterator[Measured | str]:
    """Each variant's measurements, or why it failed; the times on the CPU are those of `in_rounds`."""
    for variant in asked:
        with ProcessPoolExecutor(1, SERVER) as pool:
            try:
                yield pool.submit(alone, variant, args, device).result()
            except BrokenProcessPool:
                yield "failed: its process was killed"


def in_rounds(trainer: Trainer, asked: list[Variant], rounds: int) -> dict[Variant, float]:
    """Seconds a step of each variant, in alternating rounds after a first one."""
    clock = Clock()
    calls = {str(variant): functools.partial(trainer.step, variant) for variant in asked}
    clock.in_turns(calls, rounds + 1, before=trainer.reset)
    return {variant: clock.median(str(variant), skip=1) for variant in asked}


def main(args: argparse.Namespace) -> None:
    device = utils.choose_device(args.device)
    for name, value in DEFAULTS[device.type].items():
        setattr(args, name, getattr(args, name) or value)
    args.precisions = args.precisions or default_precisions(device)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.flop:
        for tokens in args.tokens:
            flop = Trainer(args, tokens).flop()
            print(f"batch {args.batch}, {tokens} tokens: {flop / 1e12:.2f} TFLOP a step", flush=True)
        return
    asked, trainer = variants(args), Trainer(args, args.tokens[0])
    flop, image_res = trainer.flop(), trainer.config.image_res
    seconds = in_rounds(trainer, asked, args.rounds) if device.type == "cpu" else {}
    del trainer

    print(describe_machine(device))
    shape = f"batch {args.batch}, {image_res} px, {args.tokens[0]} tokens, {flop / 1e12:.4g} TFLOP a step"
    print(f"{shape}; {args.rounds} rounds of {args.steps} steps after a first one\n")
    heads = ["", "s per step", "images/s", "ratio", "of the peak", "launches", "waits", "peak memory, GB"]
    found: dict[Variant, Measured] = {}
    failures = []

    def row(variant: Variant, measured: Measured | str) -> list[str]:
        if isinstance(measured, str):
            failures.extend([f"{variant}: {measured}"] if measured.startswith("failed") else [])
            return [str(variant), measured.partition(":")[0], *["-"] * (len(heads) - 1)]
        found[variant] = measured = measured._replace(seconds=seconds.get(variant, measured.seconds))
        own, first = measured.seconds, next(iter(found.values()))
        share = share_of_peak(flop, own, device_name(device), variant.precision, args.peak_tflops)
        error = max(abs(measured.losses[name] - value) for name, value in first.losses.items())
        cells = [f"{own:.3f}", f"{args.batch / own:.4g}", f"{first.seconds / own:.2f}", share]
        told = device.type == "cuda" or not variant.compiled
        cells += [str(measured.launches) if told else "-", str(measured.waits) if told else "-"]
        return [str(variant), *cells, f"{measured.memory:.1f}", f"{error:.1e}"]

    rows = (row(*pair) for pair in zip(asked, measure_all(asked, args, device), strict=True))
    print_table([*heads, "losses differ by at most"], rows)
    if args.profile:
        print(f"\ntraces: {args.profile}/*.json; open them in https://ui.perfetto.dev")
    if failures:
        raise utils.UserError("\n".join(failures))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = device_parser(__doc__)
    add = options.add_argument
    add("--batch", type=int, help="images in a step (default: 8 on the CPU, 64 on a GPU)")
    add("--tokens", type=int, nargs="+", help="of a text (default: 12 on the CPU, 14 on a GPU); several with --flop")
    add("--rounds", type=int, help="after a first one (default: 3 on the CPU, 5 on a GPU)")
    add("--steps", type=int, help="in a round, without waiting for the device between (default: 1 and 10)")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps too (default: on a GPU)")
    add("--flop", action="store_true", help="count a step's FLOP, and end")
    return options.parse_args(argv)


if __name__ == "__main__":
    utils.run(main, parse_args())
