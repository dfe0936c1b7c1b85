"""What the C library does with freed memory, as the programs set it."""

import resource
import sys
from collections.abc import Iterator

import pytest
import torch

import utils

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
