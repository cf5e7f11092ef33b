"""The files of docs/scaling.md that start a run on several hosts, with stand-ins for the hosts on this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import summary
from tests.train.test_world import opened, write

SCALING = Path(ROOT, "docs", "scaling")
SRUN = '#!/bin/sh\nshift 2\n"$@" & one=$!\n"$@" & other=$!\nwait $one && wait $other\n'  # behind --cpus-per-task N


def scripts(port: int, recipe: str) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """By launcher: the script of each host, and what the launcher sets there."""
    job = {"SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "2"}
    slurm = f"bash {SCALING / 'slurm.sh'} dpo {recipe}", job | {"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    task = yaml.safe_load((SCALING / "skypilot.yaml").read_text())
    sky = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    sky |= task["envs"] | {"RECIPE": recipe}
    run = task["run"].replace("29500", str(port))
    return {"slurm": [slurm], "skypilot": [(run, sky | {"SKYPILOT_NODE_RANK": rank}) for rank in ("0", "1")]}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "skypilot"])
def test_two_hosts_train_one_run(launcher, tiny_folder, tmp_path):
    path, tools = write(tmp_path, tiny_folder, "dpo", limit=6, epochs=1), tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$3"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1] % 10000 + 20000  # as the Slurm file makes them of the job's number
    common = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    hosts = [
        subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=os.environ | common | given)
        for script, given in scripts(port, path)[launcher]
    ]
    assert [host.wait(240) for host in hosts] == [0] * len(hosts)
    assert summary(opened(path))["processes"] == 2
