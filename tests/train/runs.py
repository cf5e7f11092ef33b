"""Run folders and runs of any stage, for the tests of training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalign.config.stages import RL_STAGES
from qalign.train import run_folder as runs
from tests.helpers import TEST, metrics, slow
from tests.reward_runs import write_recipe

FACTS = {"tokens_per_second": 1.0, "peak_bytes": 1, "reference": "none"}
FRESH = {"resume": False, "overwrite": False}
RESUME, OVERWRITE = FRESH | {"resume": True}, FRESH | {"overwrite": True}
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo")
EACH_STAGE = [*STAGES[:-1], slow("grpo")]  # which runs the code of ppo
PPO_KEYS = {"samples_per_prompt": 2, "max_new_tokens": 4, "max_steps": 3, "kl_stop": None}
CLOCK = ("tokens_per_second", "share/")  # figures that differ from run to run
WEIGHTS = "adapter_model.safetensors"
HELD_OUT = {"path": TEST, "limit": 4}


def folder(recipe, **dpo) -> runs.RunFolder:
    """The DPO run of the recipe, with other settings of its section."""
    changed = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update=dpo)})
    return runs.RunFolder(changed, "dpo", "recipe.yaml")


def begun(recipe, refused=(), **dpo) -> runs.RunFolder:
    run = folder(recipe, **dpo)
    run.begin(list(refused))
    return run


def finished(recipe) -> runs.RunFolder:
    run = begun(recipe)
    run.adapter.mkdir()
    run.finish("next", "base", {run.adapter: "model = ..."}, **FACTS)
    return run


def write_checkpoint(run: runs.RunFolder, step: int, *, whole: bool = True, tokens: int = 200) -> Path:
    place = run.checkpoints / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "optimizer.pt").write_bytes(b"moments" * 99)
    if whole:
        run.mark_whole(step, tokens)
    return place


def recipe_of(folder: Path, base: str, stage: str, **keys) -> str:
    """A recipe of any stage; the reward of PPO and GRPO is the length of an answer. A pair gives KTO two rows."""
    if stage == "kto":
        keys = {"max_steps": 3, **keys}
    if stage in RL_STAGES:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.py").write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
        keys = {"reward": f"{folder}/mine.py:length", **PPO_KEYS, **keys}
    return write_recipe(folder, base, stage, **keys)


def assert_same_run(run: runs.RunFolder, expected: runs.RunFolder) -> None:
    """The metrics without what the clock says, and the weights."""
    one, other = metrics(run), metrics(expected)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for name, value in line.items():
            if not name.startswith(CLOCK):
                near = pytest.approx(wanted[name], rel=1e-6, abs=1e-6) if isinstance(value, float) else wanted[name]
                assert value == near, (line["step"], name)
    weights = (load_file(folder.adapter / WEIGHTS) for folder in (run, expected))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that read a tensor, in the order in which they are called from now on. Each waits until
    all that was launched before it is done."""
    reads: list[str] = []
    for name in WAITS:
        real = getattr(torch.Tensor, name)
        note = lambda self, *args, _name=name, _real=real: reads.append(_name) or _real(self, *args)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, note)
    return reads
