"""What a full or broken disk does to a run: one line, and how to go on."""

import errno
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from qalign.errors import UserError, disk_problem
from tests.train.runs import FRESH, OVERWRITE, begun, finished, folder

SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left on device; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; free some space"),
        (OSError(errno.EIO, "Input/output error", "a.pt"), "a.pt: Input/output error; check this path"),
        (SAFETENSORS, "No space left on device; free some space"),
        (None, "Input/output error; check this path"),  # of torch.save, which names no reason
    ],
)
def test_what_a_disk_refuses_while_a_run_goes_on_is_one_line_that_says_how_to_go_on(recipe, error, words):
    run = folder(recipe)

    def stage():
        with run.held():
            run.claim(**FRESH)
            begun(recipe)
            run.log({"step": 1})
            if error is None:
                torch.save({}, run.path / "nowhere" / "optimizer.pt")
            raise error

    with pytest.raises(UserError) as raised:
        stage()
    (line,) = raised.value.lines
    assert words in line
    assert line.endswith("then go on with: python -m qalign.dpo recipe.yaml --resume")


def test_a_disk_that_refuses_a_new_run_leaves_the_old_one_and_says_so(recipe, capsys):
    finished(recipe)
    run = folder(recipe, beta=0.5)

    def stage():
        with run.held():
            run.claim(**OVERWRITE)
            run.begin([])
            run.log({"step": 1})
            raise OSError(errno.ENOSPC, "No space left on device", "a.pt")

    with pytest.raises(UserError, match=r"free some space; nothing was lost$"):
        stage()
    assert run.complete
    assert "is back" in capsys.readouterr().out


def test_a_bug_is_not_taken_for_a_disk(recipe):
    with pytest.raises(RuntimeError, match="shapes"), folder(recipe).held():
        raise RuntimeError("shapes don't match")
    assert disk_problem(OSError("can't reach the hub")) is None
    assert disk_problem(FileNotFoundError(errno.ENOENT, "No such file")) is None


SAVES = [
    "torch.save(weights, sys.argv[1])",
    "safetensors.torch.save_file(weights, sys.argv[1])",
    "tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(9999)})).save(sys.argv[1])",
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """What each of `SAVES` raises in a process that may write small files only, as `disk_problem` says it."""
    code = (
        "import resource, sys, safetensors.torch, tokenizers, torch\nfrom pathlib import Path\n"
        "from qalign.errors import disk_problem\nweights = {'a': torch.zeros(99999)}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    ) + "".join(f"try: {save}\nexcept Exception as error: print(disk_problem(error, Path('runs')))\n" for save in SAVES)
    words = [sys.executable, "-c", code, tmp_path_factory.mktemp("disk") / "file"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("save", SAVES)
def test_what_torch_safetensors_and_tokenizers_raise_when_the_disk_refuses_is_known(save, problems):
    """They raise errors of their own, which name no file; a new version may word them differently."""
    assert len(problems) == len(SAVES)
    said = problems[SAVES.index(save)]
    assert said.startswith("runs: "), f"HOOK BROKEN: {said}"
    assert "; " in said
