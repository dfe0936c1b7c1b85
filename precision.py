"""Precisions by their names on command lines: which one a program computes in, and the flags of PyTorch for it.

tf32: tensors are float32, and GPUs that have TF32 round the operands of products to 10 bits of mantissa; fp32: IEEE
float32; bf16, fp16: autocast. docs/performance.md, Precision, has the errors of each.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

import utils

DTYPES = {"tf32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
# The flags of processors that multiply in it. AVX-512 alone does not: oneDNN converts, and two linear layers took 2.3
# times as long in bf16 as in fp32, and 4 times with AVX2 (measured).
UNITS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


class PrecisionError(utils.UserError):
    """A precision that the device does not have."""


def add_options(parser: argparse.ArgumentParser, default: str | None, note: str) -> None:
    """Add --precision, whose help is `note`, and --force_precision; what becomes of them: `choose`."""
    parser.add_argument("--precision", choices=DTYPES, default=default, help=note)
    force = "compute in bf16 or fp16 also where the processor has no units for it, and is slower than in fp32"
    parser.add_argument("--force_precision", action="store_true", help=force)


def choose(asked: str | None, device: torch.device, force: bool = False) -> str:
    """The precision to compute in, one for all processes: the one asked for, with two exceptions (a collective call).

    None is tf32 where all devices have it, else fp32. bf16 and fp16 become fp32, with a word, on a processor without
    units for them, where they are slower, unless `force`.

    Raises:
        PrecisionError: tf32 is asked for, and a device has none.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    lacking = [name for name in utils.gather_objects("" if has_tf32(device) else name) if name]
    if asked is None:
        return "fp32" if lacking else "tf32"
    if asked == "tf32" and lacking:
        raise PrecisionError(
            f"--precision tf32: {lacking[0]} has no TF32, NVIDIA GPUs do from the A100 on; use --precision fp32"
        )
    if not force and not all(utils.gather_objects(has_units(asked, device))):
        utils.log(
            f"--precision {asked}: this processor has no units for it and is several times slower in it than in fp32: "
            f"computing in fp32 (--force_precision computes in {asked})"
        )
        return "fp32"
    return asked


def has_tf32(device: torch.device) -> bool:
    """Whether a device can multiply in TF32."""
    return (
        device.type == "cuda"
        and torch.cuda.is_available()  # a simulated device has nothing to ask
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def has_units(name: str, device: torch.device) -> bool:
    """Whether a device is made for a precision; of GPUs, all count as made for all."""
    if device.type != "cpu" or name not in UNITS:
        return True
    with contextlib.suppress(OSError):
        return not UNITS[name].isdisjoint(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", bool)  # not Linux
    return bool(supported())


@contextlib.contextmanager
def use(name: str, device: torch.device, training: bool = False) -> Iterator[None]:
    """Within it, float32 products and convolutions on GPUs are what a precision says.

    tf32: TF32. fp32: IEEE. bf16, fp16: what stays in float32 is IEEE in evaluation. In training it is the AMC part, and
    TF32 where the device has it: the rest is rounded by far more.

    The caller autocasts to `DTYPES[name]`. The flags are the process's, not a thread's.
    """
    half = DTYPES[name] != torch.float32
    # These two names exist in all versions of PyTorch from 2.4 on; `fp32_precision` is newer, and must not be mixed
    # with them.
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = name == "tf32" or (half and training and has_tf32(device))
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
