"""The short form of the matrix of model families; the full one is `python -m tests.matrix`."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the matrix forks")


def test_what_the_document_says_can_be_read_again():
    from tests.matrix.__main__ import COMMANDS, PAIRS, SHARE, Row, document, recorded, worse

    good = Row("llama", {**dict.fromkeys(COMMANDS, "yes"), PAIRS: "packed (Mixer)", SHARE: "97%"})
    bad = Row("llama", good.cells | {"dpo": "FAILS", "fit": "no", PAIRS: "padded: for a reason", SHARE: "96%"})
    before = recorded(document([good]))["llama"]

    assert before == good.cells
    assert worse(good, before) == [] == worse(good, bad.cells)
    assert [line.partition(":")[0] for line in worse(bad, before)] == [
        f"llama, {column}" for column in ("dpo", "fit", PAIRS, SHARE)
    ]


@pytest.mark.slow
def test_no_family_became_worse_than_the_document_says():
    """In a process of its own: the matrix forks, which one that has trained already can't do."""
    command = [sys.executable, "-m", "tests.matrix", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "\n0 became worse" in done.stdout
