"""Training on two hosts: network namespaces, each with a name and an address of its own. Needs root and `ip`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from tests.training_runs import REPOSITORY, arguments, log_rows, same_weights, saved, train

HOSTS = {"amc-host-a": "10.77.0.1", "amc-host-b": "10.77.0.2"}
ADDRESS, PORT = HOSTS["amc-host-a"], "29577"
WORDS = ("batch_size=4", "--save_every", "2")
SECONDS = 300
pytestmark = pytest.mark.slow


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, ip and unshare")
    remove_hosts()
    first, second = HOSTS
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, address in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", host, "link", "set", device, "up")
        yield list(HOSTS)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r:.200}")
    finally:
        remove_hosts()


class Job:
    """A process on each host, started as docs/long_runs.md starts them under SLURM."""

    def __init__(self, place: Path, output: Path, *words: str, hidden: bool = False) -> None:
        """`hidden`: the second host has another folder under the output's name."""
        program = [sys.executable, str(REPOSITORY / "Pretrain.py"), *arguments(place, output, *WORDS, *words)]
        self.processes = []
        for rank, host in enumerate(HOSTS):
            before = f"mount -t tmpfs none {output}; " if hidden and rank else ""
            shell = ["sh", "-c", f'hostname {host}; {before}exec "$@"', "sh", *program]
            group = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
            address = {"MASTER_ADDR": ADDRESS, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "cable"}
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", *shell],
                    env=os.environ | group | address | {"OMP_NUM_THREADS": "1"},
                    cwd=REPOSITORY,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def ends(self) -> list[tuple[int, str]]:
        """Exit status and output of each process."""
        printed = [process.communicate(timeout=SECONDS)[0] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, printed, strict=True)]


def test_a_host_is_lost_and_the_run_goes_on(place: Path, hosts: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = Job(place, output)
    while not list(output.glob("checkpoint_*_step_*.pth")):
        assert job.processes[0].poll() is None, job.ends()
    job.processes[1].kill()
    (status, text), _ = job.ends()
    assert status == 1
    assert "process 0 of 2 on amc-host-a lost the connection" in text
    assert "--resume auto" in text
    ends = Job(place, output, "--resume", "auto").ends()
    assert [status for status, _ in ends] == [0, 0], ends
    assert [row["epoch"] for row in log_rows(output)] == [0, 1, 2]
    assert list(runs.checkpoints(output))[-1] == (3, 0)


def test_a_folder_that_one_host_does_not_see(place: Path, hosts: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(place, output, *WORDS, "--max_steps", "4")
    before = saved(output, 0)["model"]
    ends = Job(place, output, "--resume", "auto", hidden=True).ends()
    assert all(status == 1 for status, _ in ends)
    assert "checkpoint_00.pth: not seen by process 1 on amc-host-b" in ends[0][1] + ends[1][1]
    assert same_weights(saved(output, 0)["model"], before)
