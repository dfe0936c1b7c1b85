"""The parts of a training run that come from its config and its options alone: model, batches."""

import argparse
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from config import PretrainConfig
from dataset.loader.workers import EpochOrder, check_shared_memory, spare_memory
from dataset.reading import DataError
from dataset.text import Tokenizer
from dataset.vg import Collate, TrainingData
from models.kernels.compiling import token_sizes
from models.kernels.onednn import use_onednn
from models.pretrain import PretrainModel
from signals import ignore_in_worker


def create_model(config: PretrainConfig) -> PretrainModel:
    """The model to train, with random weights."""
    if config.model == "blip":
        from models.blip import PretrainBlip  # brings transformers, which takes seconds

        return PretrainBlip(config)
    return PretrainModel(config)


def build_loader(
    data: TrainingData, order: EpochOrder, tokenizer: Tokenizer, config: PretrainConfig, args: argparse.Namespace
) -> DataLoader[Any]:
    """This process's batches; raises `DataError` where they do not fill a step."""
    tokens, flags = (7, 2) if config.paraphrases else (5, 1)  # tensors of `Batch`
    sample_bytes = 3 * config.image_res**2 + config.mask_size**2 + tokens * 8 * config.max_tokens + flags
    check_shared_memory(args.num_workers, len(data) // config.batch_size, config.batch_size * sample_bytes)
    loader = DataLoader(
        data,
        batch_size=config.batch_size,
        sampler=order,
        num_workers=args.num_workers,
        collate_fn=Collate(tokenizer, config),
        worker_init_fn=begin_worker,
        persistent_workers=args.num_workers > 0,
        generator=torch.Generator(),  # not the one that `begin_epoch` seeds
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
    if len(loader) < args.accum_steps:
        needed = config.batch_size * utils.world_size() * args.accum_steps
        raise DataError(f"{len(data)} training entries do not fill one step of {needed}; lower batch_size")
    return loader


def begin_worker(worker: int) -> None:
    """Called at a loader process's start."""
    ignore_in_worker(worker)
    spare_memory(worker)


def prepare_model(model: PretrainModel, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Move the model to its device, and apply what saves memory or time there.

    Returns:
        the model itself, or with several processes, its wrapper that averages their gradients.
    """
    model.checkpoint_activations(args.grad_checkpointing)
    if args.grad_checkpointing:
        utils.return_freed_memory()
    elif device.type == "cpu":
        utils.keep_freed_memory()
    model.to(device)
    use_onednn(model)
    if args.compile and model.config.paraphrases:
        raise utils.UserError("--compile: SelfEQ's losses cannot be compiled; leave it out, or train without selfeq")
    if args.compile and model.config.model == "blip":
        raise utils.UserError("--compile: is for ALBEF alone; train BLIP without it")
    if args.compile:
        model.compile_step()
        sizes = ", ".join(map(str, token_sizes(model.config.max_tokens)))
        utils.log(f"--compile: the first step at each length of captions, padded to {sizes} tokens, takes minutes")
    if utils.world_size() == 1:
        return model
    # The queues are equal on all processes by construction: nothing to broadcast at each step. Newer versions of
    # PyTorch have renamed the option for it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)
