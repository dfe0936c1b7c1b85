"""What the C library does with freed memory, as the programs set it."""

import resource
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import utils
from grounding import load
from Pretrain import parse_args, prepare_model

MEGABYTES_16 = 2**22  # numbers of float32


@pytest.fixture
def own_setting() -> Iterator[None]:
    """Back to what glibc does by itself once it has met blocks of 32 MB."""
    yield
    utils.return_freed_memory(2**25)


def pages_of_next_block() -> int:
    """How many pages the system hands out for a block, after one of its size was freed."""
    torch.zeros(MEGABYTES_16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MEGABYTES_16)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_given_back_or_used_again(own_setting: None) -> None:
    utils.return_freed_memory()
    given_back = pages_of_next_block()
    utils.keep_freed_memory()
    assert min(pages_of_next_block() for _ in range(20)) < given_back / 4  # the first ones are new


def test_programs_keep_it_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, give_back = mock.Mock(), mock.Mock()
    monkeypatch.setattr(utils, "keep_freed_memory", keep)
    monkeypatch.setattr(utils, "return_freed_memory", give_back)
    monkeypatch.setattr(load, "load_weights", mock.Mock())
    cpu, other = torch.device("cpu"), torch.device("meta")
    for device in (cpu, other):
        prepare_model(mock.MagicMock(), parse_args([]), device)
        load.ready(mock.MagicMock(), {"model": {}}, "a.pth", device)
        assert (keep.call_count, give_back.call_count) == (2, 0)  # the CPU's
    prepare_model(mock.MagicMock(), parse_args(["--grad_checkpointing"]), cpu)
    assert (keep.call_count, give_back.call_count) == (2, 1)
