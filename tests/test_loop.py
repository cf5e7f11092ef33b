"""Settings as TRL's config, and what the loop says when it can't go on."""

import json
from types import SimpleNamespace

import pytest
import torch

from qalign.errors import UserError
from qalign.journal import Journal
from qalign.loop import micro_batch_size, planned_steps, train_to_the_end
from qalign.recipe import DPO
from tests.helpers import TRAIN


def settings(**keys) -> DPO:
    return DPO(data=TRAIN, **keys)


def test_micro_batch_auto_divides_and_fits():
    assert micro_batch_size(settings(batch_size=12), 1000) == 4  # 4 * 1000 <= 4096 < 6 * 1000
    assert micro_batch_size(settings(batch_size=7), 1000) == 1
    assert micro_batch_size(settings(batch_size=12, micro_batch_size=3), 1000) == 3


def test_planned_steps_count_a_short_last_batch():
    assert planned_steps(settings(batch_size=8), 17) == 3
    assert planned_steps(settings(batch_size=8, epochs=1.5), 17) == 5  # 3 an epoch, 4.5 rounded up
    assert planned_steps(settings(batch_size=8, max_steps=2), 17) == 2


@pytest.mark.parametrize(
    ("batch", "micro", "fix"),
    [(15, 5, "dpo.micro_batch_size=3"), (8, 8, "dpo.micro_batch_size=4"), (4, 1, "model.max_length=150")],
)
def test_out_of_memory_suggests_a_size_that_the_recipe_allows(batch, micro, fix):
    def out_of_memory(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    trainer = SimpleNamespace(train=out_of_memory, args=SimpleNamespace(per_device_train_batch_size=micro))
    run = SimpleNamespace(stage="dpo", settings=settings(batch_size=batch))
    with pytest.raises(UserError, match=rf"{micro} rows of up to 300 tokens .*Try {fix}"):
        train_to_the_end(trainer, run, SimpleNamespace(tokens_seen=0), None, 300)


def test_a_resumed_run_counts_its_tokens_on(tmp_path):
    """TRL's trainers count from zero in each session."""
    journal = Journal(SimpleNamespace(metrics=tmp_path / "metrics.jsonl"), tokens_before=100)
    journal._bar = SimpleNamespace(set_postfix_str=lambda text: None)
    journal.on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": 1.0, "num_tokens": 20.0})
    assert journal.tokens_seen == 120
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["num_tokens"] == 120


def test_a_checkpoint_keeps_no_half_filled_logging_window():
    control = SimpleNamespace(should_save=True, should_log=False)
    journal = Journal(SimpleNamespace(stop=SimpleNamespace(number=None)))
    journal._bar = SimpleNamespace(update=lambda count: None, n=0)
    journal.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), control)
    assert control.should_log
