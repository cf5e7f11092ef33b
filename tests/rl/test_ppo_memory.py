"""Memory that runs out in PPO's first update: the roles read the answers again in smaller micro-batches, then it goes
on."""

import pytest
import torch

from qalign.data.collate import MicroBatchLimit
from qalign.rl.ppo_trainer import PPOTrainer
from tests.rl.conftest import assert_alike
from tests.train.test_first_step import small_card


def curves(trainer: PPOTrainer) -> list[dict]:
    # A ratio that rounding takes across the bound is a token more or less.
    return [{name: value for name, value in trainer.iterate()[1].items() if "clipfrac" not in name} for _ in range(2)]


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_the_first_update_goes_on_with_smaller_micro_batches(value, trainer_of, monkeypatch, capsys):
    keys = {"value": value, "reward_scaling": "running", "mini_batches": 1}
    expected = curves(trainer_of(limit=MicroBatchLimit(pairs=4), **keys))
    trainer, read = trainer_of(limit=MicroBatchLimit(pairs=4), **keys), []
    seen = small_card(monkeypatch, 1)
    monkeypatch.setattr(
        trainer, "_read_all", lambda *given: read.append(str(trainer.limit)) or PPOTrainer._read_all(trainer, *given)
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.iterate()
    assert (read, str(trainer.limit)) == (["4 at a time", "2 at a time", "1 at a time"], "1 at a time")
    monkeypatch.undo()

    trainer = trainer_of(limit=MicroBatchLimit(pairs=4), **keys)
    small_card(monkeypatch, max(seen) - 1)
    assert_alike(curves(trainer), expected, 2e-4)
    assert str(trainer.limit) == "2 at a time"
    assert "out of memory in the first step: it goes on with 2 at a time" in capsys.readouterr().out


def test_after_an_optimiser_step_it_ends(trainer_of, monkeypatch):
    trainer = trainer_of(limit=MicroBatchLimit(pairs=4), mini_batches=2)
    small_card(monkeypatch, 1, after=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.iterate()
    assert str(trainer.limit) == "4 at a time"
