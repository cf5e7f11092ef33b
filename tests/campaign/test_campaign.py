"""The short form of both campaigns; the full ones are commands of their own (CONTRIBUTING.md)."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the campaigns fork")
@pytest.mark.parametrize("name", ["kill", "storage"])
def test_no_run_is_lost(name):
    """In a process of its own: the campaign forks, which one that has trained already can't do."""
    command = [sys.executable, "-m", f"tests.campaign.{name}", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " right, 0 wrong" in done.stdout
