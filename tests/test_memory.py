"""What the C library does with freed memory, as the programs set it."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import utils
from grounding import load
from Pretrain import parse_args, prepare_model

ROOT = Path(__file__).parents[1]
# In a process of its own: memory that other tests have left free would be used first.
PAGES = """
import resource, torch, utils

def pages_of_next_block():  # of 16 MB, after one of its size was freed
    torch.zeros(2**22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

utils.return_freed_memory()
given_back = pages_of_next_block()
utils.keep_freed_memory()
print(given_back, min(pages_of_next_block() for _ in range(20)))  # the first ones are new
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_given_back_or_used_again() -> None:
    ran = subprocess.run([sys.executable, "-c", PAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, used_again = map(int, ran.stdout.split())
    assert used_again < given_back / 4


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
