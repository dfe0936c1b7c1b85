"""Train ALBEF with Attention Mask Consistency.

    python Pretrain.py --config configs/Pretrain.yaml --output_dir OUT --checkpoint ALBEF.pth
    torchrun --nproc_per_node=8 Pretrain.py ...
    python -m torch.distributed.launch --nproc_per_node=8 --use_env Pretrain.py ...

Leaves in OUT: checkpoint_%02d.pth and a line of log.txt per epoch, a line of steps.jsonl every 20 steps, config.yaml
and run.json (options, versions, git commit, seed); within an epoch, checkpoint_%02d_step_%06d.pth every `--save_every`.
With `relation_file` in the config, epoch 0 is SelfEQ's, and leaves checkpoint_relation_00.pth (docs/method.md).
`--validate` adds accuracies of benchmarks to log.txt, and best.pth (docs/watching.md).
A run that was killed goes on, as if it had not been, with `--resume auto`; SIGTERM and Ctrl-C save and end a run,
SIGUSR1 saves (docs/long_runs.md). `--tensorboard` adds OUT/tensorboard, `--wandb` OUT/wandb (docs/watching.md).
"""

import argparse
import itertools
import math
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import precision
import runs
import utils
from config import Phase, PretrainConfig, load_config, naming, save_config
from dataset.expressions import SHOWN_PROBLEMS
from dataset.loader.workers import EpochOrder, killed_workers_explained
from dataset.text import Tokenizer, check_vocabulary, load_tokenizer
from dataset.vg import TrainingData
from grounding.questions import Asking
from grounding.validate import Validation
from models.checkpoint import check_resumable, diverged
from models.pretrain import Batch
from models.student import local_checkpoint, own_text_encoder
from optim import create_optimizer, moments
from runs import Position
from scheduler import create_scheduler, epoch_time, iteration_time
from signals import Requests, Stopped
from terminal import boolean, integer, positive
from training.log import TrainingLog, WandbRun, is_loss
from training.parts import build_loader, create_model, prepare_model
from training.saving import Every, Saver, interval, on_host
from training.state import (
    TrainingState,
    check_agreement,
    choose_start,
    command_to_go_on,
    earlier_steps,
    load_start,
    phases_left,
    position_after,
    progress_of,
    settings_of,
    way_back,
)

if TYPE_CHECKING:
    from grounding.pictures.tensorboard import Board


class TrainingError(utils.UserError):
    """Training that cannot go on."""


def resume_mode(text: str) -> bool | str:
    """An argparse type: a truth value, or "auto"."""
    return "auto" if text.lower() == "auto" else boolean(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train ALBEF with Attention Mask Consistency.")
    parser.add_argument("--config", default="./configs/Pretrain.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--checkpoint", default="", help="weights to start from: a file or a student (export.py)")
    resume = "continue a run: the newest checkpoint of --output_dir, or --checkpoint; auto: if there is one, else begin"
    parser.add_argument("--resume", type=resume_mode, nargs="?", const=True, default=False, help=resume)
    parser.add_argument("--output_dir", default="Pretrain/")
    parser.add_argument("--text_encoder", help="hub name or folder (default: the checkpoint's, or bert-base-uncased)")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: the GPU if there is one)")
    parser.add_argument("--seed", default=42, type=integer(0, 2**63 - 1))
    exact = "default: tf32 on GPUs that have it, else fp32; with bf16 and fp16, the AMC terms stay in tf32 or fp32"
    precision.add_options(parser, None, exact)
    parser.add_argument("--accum_steps", default=1, type=integer(1), help="batches per optimizer step")
    clip = "scale the gradients of a step down to this norm where theirs is larger (default: never)"
    parser.add_argument("--grad_clip", type=positive, metavar="NORM", help=clip)
    parser.add_argument("--grad_checkpointing", action="store_true", help="recompute activations to save memory")
    parser.add_argument("--compile", action="store_true", help="compile the training step (torch.compile)")
    parser.add_argument("--num_workers", default=4, type=integer(0), help="loader processes per process")
    parser.add_argument("--max_steps", type=integer(1), help="stop after this many optimizer steps in all")
    parser.add_argument("--skip_broken", action="store_true", help="replace missing or unreadable images; count them")
    cache = "folder for the packed entries of large training files (default: beside them)"
    parser.add_argument("--cache_dir", metavar="DIR", help=cache)
    save = parser.add_argument_group("checkpoints", "written at the end of each epoch, and in between")
    every = "how often within an epoch: 30m, 2h, 90s, or a number of optimizer steps; 0: never (default: 30m)"
    save.add_argument("--save_every", default=Every(0, 1800), type=interval, metavar="EVERY", help=every)
    last = "checkpoints within epochs to keep (default: 2)"
    save.add_argument("--keep_last", default=2, type=integer(1), metavar="N", help=last)
    epochs = "checkpoints of whole epochs to keep (default: all)"
    save.add_argument("--keep_epochs", type=integer(1), metavar="N", help=epochs)
    validate = parser.add_argument_group(
        "validation", "accuracies of benchmarks in log.txt; best.pth is the best epoch"
    )
    what = "measure these benchmarks, a Grounding_*.yaml each, on their val split; the first decides on best.pth"
    validate.add_argument("--validate", nargs="+", default=[], metavar="CONFIG", help=what)
    often = "epochs from one validation to the next (default: 1)"
    validate.add_argument("--validate_every", default=1, type=integer(1), metavar="N", help=often)
    watch = parser.add_argument_group("watching", "what is shown of the run; its numbers stay the same")
    watch.add_argument("--tensorboard", action="store_true", help="write OUTPUT_DIR/tensorboard: losses and heat maps")
    watch.add_argument(
        "--heat_maps_every", default=500, type=integer(1), metavar="STEPS", help="optimizer steps between maps"
    )
    watch.add_argument(
        "--watch",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "PHRASE"),
        help="draw maps of this phrase instead of training entries; may be repeated",
    )
    project = "log config and scalars to this project of Weights & Biases (pip install wandb)"
    watch.add_argument("--wandb", metavar="PROJECT", help=project)
    launch = parser.add_argument_group("process group", "read from the launcher's environment")
    launch.add_argument("--world_size", default=1, type=int)
    launch.add_argument("--dist_url", default="env://")
    launch.add_argument("--distributed", default=True, type=boolean)
    launch.add_argument("--local_rank", "--local-rank", default=0, type=int)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    config = load_config(args.config, PretrainConfig, args.set)
    device = utils.choose_device(args.device)
    if args.distributed:
        utils.init_distributed(device, args.dist_url)
    with Requests() as requests, runs.claim(Path(args.output_dir)), killed_workers_explained(), naming(args.config):
        if args.checkpoint:
            args.checkpoint = str(local_checkpoint(args.checkpoint))
            args.text_encoder = args.text_encoder or own_text_encoder(Path(args.checkpoint))
        args.text_encoder = args.text_encoder or "bert-base-uncased"
        start = choose_start(args)
        for phase in phases_left(config.phases(), *start):
            train(Run(args, config, device, requests, phase, start))
            start = str(runs.checkpoint_path(Path(args.output_dir), Position(phase.epochs.stop), phase.name)), True
    utils.log(f"Done. Checkpoints and log.txt are in {args.output_dir}")


def train(run: "Run") -> None:
    """Train the epochs of a phase that are left; each ends with a line of log.txt and a checkpoint."""
    run.requests.begin()
    with precision.use(run.args.precision, run.device, training=True):
        train_epochs(run)


def train_epochs(run: "Run") -> None:
    for epoch in itertools.takewhile(run.steps_of, itertools.count(run.start.epoch)):
        run.train_epoch(epoch, run.steps_of(epoch))
        run.check_weights(epoch)
        accuracies = run.validate(epoch)
        # The line first: a resumed run drops the lines of epochs it repeats, but cannot make up a missing one.
        run.log.end_epoch(broken_images=len(run.data.broken_anywhere()), accuracies=accuracies)
        run.save(Position(epoch + 1))
        run.end_if_asked()
    run.saver.finish()
    run.log.close()
    if broken := run.data.replaced():
        shown = ", ".join(broken[:SHOWN_PROBLEMS]) + (", ..." if len(broken) > SHOWN_PROBLEMS else "")
        utils.log(f"{len(broken)} unreadable images were replaced by others: {shown}")


class Run:
    """A phase of a training run: its parts, ready for the first epoch or for the one to resume with."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: PretrainConfig,
        device: torch.device,
        requests: Requests | None = None,
        phase: Phase | None = None,
        start: tuple[str | Path, bool] | None = None,
    ) -> None:
        """Make each part from those above it. The output folder comes last: an error leaves it as it was.

        Args:
            phase: of those that the config has; the first one if it is left out.
            start: what to start from (`choose_start`); what the options say if it is left out.
        """
        args.precision = precision.choose(args.precision, device, args.force_precision)
        self.args, self.given, self.device, self.output = args, config, device, Path(args.output_dir)
        self.phase = phase or config.phases()[0]
        self.config = config = self.phase.config
        tokenizer = load_tokenizer(args.text_encoder)
        self.data = TrainingData(config, args.seed, args.skip_broken, args.cache_dir)
        self.order = EpochOrder(len(self.data), utils.world_size(), utils.rank(), args.seed)
        self.loader = build_loader(self.data, self.order, tokenizer, config, args)
        self.epoch_steps = len(self.loader) // args.accum_steps
        step_samples = config.batch_size * args.accum_steps * utils.world_size()
        utils.seed_everything(args.seed)  # it decides the random weights
        self.model = create_model(config)
        bert = self.model.text_encoder.config
        check_vocabulary(tokenizer, bert.vocab_size, bert.special_ids)
        path, goes_on = start or choose_start(args)
        checkpoint = load_start(self.model, config, args, path)
        self.start, self.progress = runs.BEGINNING, dict[str, Any]()
        if goes_on:
            check_resumable(checkpoint, path)
            self.progress = on_host(progress_of(checkpoint, path))  # not a part of the file, which may go
            self.start = position_after(self.progress, step_samples, self.epoch_steps)
        self.earlier_steps = earlier_steps(checkpoint, self.phase, self.epoch_steps)
        check_agreement(self.model, path, self.start)
        self.validation = self.open_validation()
        self.parallel = prepare_model(self.model, args, device)
        self.optimizer = create_optimizer(config.optimizer, self.model)
        self.schedule = create_scheduler(config.schedular, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        parts = self.data, self.model, self.optimizer, self.schedule, self.scaler, device
        self.state = TrainingState(config, settings_of(args, len(self.data)), step_samples, *parts)
        if self.start > Position(self.phase.epochs.start):  # a phase begins with an optimizer and a schedule of its own
            self.state.restore(checkpoint, path)
        for ended in self.given.phases() if goes_on else []:
            if ended.epochs.stop == self.start.epoch and ended != self.phase:
                self.state.say_changes(checkpoint, path, ended.config)
        self.requests = requests or Requests()
        self.decisive = self.validation.decisive if self.validation else ""
        self.saver = Saver(self.output, args.keep_last, args.keep_epochs, args.save_every, self.decisive)
        here = goes_on and Path(path).resolve().parent == self.output.resolve()
        done = here and not self.steps_of(self.start.epoch)
        total_steps = min(self.steps_before(self.phase.epochs.stop), args.max_steps or sys.maxsize)
        wandb = WandbRun(args.wandb) if args.wandb and utils.rank() == 0 and not done else None
        boards = None if done else self.open_board(tokenizer), wandb
        self.log = TrainingLog(self.output, total_steps, step_samples, device, *boards)
        if done:  # and its folder stays as it is
            utils.log(f"nothing is left to train: {path} is the end of this run")
        else:
            self.open_output(checkpoint.get("log") if here else None)
        if self.decisive and utils.rank() == 0:  # a killed run may not have come to it
            runs.link_best(self.output, runs.read_log(self.output / runs.EPOCHS_LOG), self.decisive)

    def steps_of(self, epoch: int) -> int:
        """The steps of an epoch that this run comes to, done ones included; 0 where nothing of the epoch is left."""
        limit = self.args.max_steps or sys.maxsize
        steps = min(self.epoch_steps, limit - self.steps_before(epoch))
        begun = self.start.step if epoch == self.start.epoch else 0
        return steps if epoch in self.phase.epochs and steps >= max(1, begun) else 0

    def steps_before(self, epoch: int) -> int:
        """The optimizer steps of all epochs before one."""
        return self.earlier_steps + (epoch - self.phase.epochs.start) * self.epoch_steps

    def train_epoch(self, epoch: int, steps: int) -> None:
        """Train the steps of an epoch that are left; raises `TrainingError` when a loss is no longer a number."""
        self.begin_epoch(epoch, steps)
        batches = self.log.waiting_for(iter(self.loader))
        if self.progress and self.start.step:
            self.state.restore_processes(self.progress, self.start, self.log)
            self.progress = {}
        for step in self.log.steps():
            self.log.add({"lr": torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)})
            alpha = self.config.alpha * (1.0 if epoch > 0 else min(1.0, step / self.epoch_steps))
            for micro in range(self.args.accum_steps):
                batch = Batch(*next(batches)).to(self.device)
                self.log.add(self.backward(batch, alpha, micro))
            norm = self.clip_gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # fp16 waits for the device here: it skips steps whose gradients overflow, and so must the log.
            if not self.scaler.is_enabled() or norm.isfinite():
                self.log.add_gradient_norm(norm)
            self.optimizer.zero_grad(set_to_none=True)
            self.set_rate(epoch, step)
            if self.log.is_due(step):
                self.check_losses(epoch, step)
            self.log.end_step(step)
            if step < steps - 1:
                self.save_if_asked(Position(epoch, step + 1))

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Set what decides an epoch: seeds, order of the data, rates; at the start, where it goes on."""
        begin = self.start.step if epoch == self.start.epoch else 0
        utils.seed_everything(self.args.seed, utils.rank(), epoch, *([begin] if begin else []))
        torch.empty((), dtype=torch.int64).random_()  # loaders used to draw it: later numbers stay what they were
        self.data.epoch = self.order.epoch = epoch
        self.order.begin = begin * self.args.accum_steps * self.config.batch_size
        self.parallel.train()
        self.schedule.step(epoch_time(self.config.schedular, epoch))
        for step in range(begin):
            self.set_rate(epoch, step)
        self.log.begin_epoch(epoch, steps, begin, self.steps_before(epoch))

    def set_rate(self, epoch: int, step: int) -> None:
        """Set the learning rate after a step."""
        if self.phase.fixed_rate:
            return
        if (time := iteration_time(self.config.schedular, epoch, step, self.epoch_steps)) is not None:
            self.schedule.step(time)  # type: ignore[arg-type]  # timm counts in fractions of epochs as well

    def backward(self, batch: Batch, alpha: float, micro: int) -> dict[str, Tensor]:
        """Forward and backward of one batch, the `micro`-th of its optimizer step; returns the named losses."""
        last = micro == self.args.accum_steps - 1
        parallel = self.parallel
        alone = parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not last else nullcontext()
        dtype = precision.DTYPES[self.args.precision]
        with alone:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                losses = parallel(batch, alpha, update_teacher=micro == 0)
            self.scaler.scale(self.model.total(losses) / self.args.accum_steps).backward()
        return losses

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to a norm of at most `--grad_clip`, in place; returns their norm before, a scalar.

        Without `--grad_clip` they are read alone: multiplying by 1 would pass all of them through memory.
        """
        self.scaler.unscale_(self.optimizer)
        if self.args.grad_clip:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def check_losses(self, epoch: int, step: int) -> None:
        """Raise `TrainingError` naming a loss that has become NaN or infinite since the last line of steps.jsonl."""
        means = self.log.recent.means()
        if broken := [name for name, mean in means.items() if is_loss(name) and not math.isfinite(mean)]:
            what = f"{' and '.join(broken)} became NaN or infinite in epoch {epoch}, at or shortly before step {step}"
            # The first step's losses are of the very weights that a checkpoint of that position holds.
            began_finite = all(map(math.isfinite, self.log.opening.values()))
            raise TrainingError(f"{what}; {way_back(self.output, Position(epoch, self.log.window), began_finite)}")

    def check_weights(self, epoch: int) -> None:
        """Raise `TrainingError` instead of saving what no run can go on from: losses tell of it one step too late."""
        if problem := diverged(self.model.state_dict()) or diverged(moments(self.optimizer), math.inf):
            raise TrainingError(
                f"the weights diverged in epoch {epoch} ({problem}), and are not saved; "
                f"{way_back(self.output, Position(epoch, self.log.window), True)}"
            )

    def validate(self, epoch: int) -> dict[str, float]:
        """The accuracies of --validate at the end of an epoch, by their names in log.txt; nothing if none are due."""
        due = self.validation and (epoch + 1) % self.args.validate_every == 0
        return self.validation.measure() if self.validation and due else {}

    # ---- checkpoints

    def save_if_asked(self, at: Position) -> None:
        """Between two steps: save if it is time or a signal asks for it, and end if one asks for that."""
        save, stop = self.requests.agreed(self.saver.is_due(self.steps_before(at.epoch) + at.step))
        if save or stop:
            self.save(at)
        self.end_if_asked(stop)

    def end_if_asked(self, stop: int | None = None) -> None:
        """End the run if a signal asks for it, once its checkpoint is written; raises `Stopped`."""
        stop = self.requests.agreed(False)[1] if stop is None else stop
        if not stop:
            return
        self.saver.finish()
        self.log.close()
        utils.log(f"{signal.Signals(stop).name}: saved {self.saver.path}\n  to go on: {command_to_go_on()}")
        raise Stopped(stop)

    def save(self, at: Position) -> None:
        """Begin to write the checkpoint of a position; rank 0 writes while all go on (a collective call)."""
        content = self.state.content(at, self.log)
        if utils.rank() == 0:
            path = runs.checkpoint_path(self.output, at, self.phase.name)
            self.saver.save(path, content | {"log": runs.timeless_log(self.output)})

    def open_validation(self) -> Validation | None:
        """What measures the model for --validate; all that can be wrong with it is an error now."""
        args = self.args
        if not args.validate:
            return None
        asking = Asking(args.text_encoder, args.num_workers, args.skip_broken)
        return Validation(args.validate, self.model, asking, self.device)

    def open_board(self, tokenizer: Tokenizer) -> "Board | None":
        """What draws for --tensorboard; None without it, and on all ranks but 0."""
        args, config = self.args, self.config
        if args.watch and not args.tensorboard:
            raise utils.UserError("--watch draws its maps for TensorBoard: add --tensorboard")
        if not args.tensorboard or utils.rank() != 0:
            return None
        # Imported here: it brings matplotlib and TensorBoard, which no other run needs.
        from grounding.explain import Explainer
        from grounding.pictures.tensorboard import Board, watched_entries, watched_pairs

        explainer = Explainer(self.model, tokenizer, self.device, "itm", config.amc.layer)
        watched = watched_pairs(args.watch) or watched_entries(self.data.entries, self.data.boxed, args.skip_broken)
        return Board(explainer, watched, args.heat_maps_every)

    def open_output(self, earlier_log: Any) -> None:
        """Make the output folder ready, leave config and provenance in it, and say what is about to run."""
        if utils.rank() != 0:
            return
        runs.prepare_output(self.output, self.start, earlier_log)
        save_config(self.given, self.output / "config.yaml")
        runs.write_provenance(self.output / "run.json", self.args.seed, options=vars(self.args))
        samples = f"{self.config.batch_size * self.args.accum_steps} x {utils.world_size()}"
        utils.log(f"{len(self.data)} entries, {self.epoch_steps} steps of {samples} samples an epoch, {self.device}")
        kind = f"the {self.phase.name} epoch: " if self.phase.name else ""
        begin = f"{kind}epochs {self.start.epoch} to {self.phase.epochs[-1]}, {self.args.precision}"
        utils.log(begin + (f", from step {self.start.step} of the first" if self.start.step else ""))
        if board := self.log.board:
            config_text = (self.output / "config.yaml").read_text(encoding="utf-8")
            board.start(self.output / runs.BOARD, self.steps_before(self.start.epoch) + self.start.step, config_text)
            utils.log(f"watch it: tensorboard --logdir {self.output}")
        if wandb := self.log.wandb:
            wandb.start(self.output / runs.WANDB, self.given.model_dump(mode="json"))


if __name__ == "__main__":
    utils.run(main, parse_args())
