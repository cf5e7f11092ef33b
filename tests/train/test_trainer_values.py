"""Values under `trainer:`: whatever transformers and TRL raise about one is a line with its key, before a base is
loaded or a finished run is touched."""

import pytest

from qalign.config.recipe import Recipe
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder
from qalign.train.trainers.adapter import built, naming_trainer, try_out
from tests.helpers import train

STAGES = ("sft", "reward", "dpo", "kto")


def run_of(stage: str, trainer: dict) -> RunFolder:
    section = {"data": "org/rows", "trainer": trainer} | ({"reward": "m:f"} if stage == "ppo" else {})
    return RunFolder(Recipe.model_validate({"model": {"base": "org/base"}, "output": "runs/x", stage: section}), stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr_scheduler_kwargs", {"nothing": 1}, "unexpected keyword argument 'nothing'"),
        ("lr_scheduler_kwargs", {"num_cycles": "x"}, "'x'"),
        ("lr_scheduler_kwargs", 5, "is 5; expected a dictionary"),
        ("optim", "lomo", "lomo"),
        ("optim", "schedule_free_adamw", "schedulefree"),
        ("optim", "nosuch", "nosuch is not a valid OptimizerNames"),
        ("optim", None, "is None; expected"),
        ("optim_args", "garbage", "unpack"),
        ("weight_decay", "x", "is 'x'; expected a number"),
        ("max_grad_norm", "x", "is 'x'; expected a number"),
        ("adam_beta1", 5.0, "Invalid beta"),
        ("adam_epsilon", -1.0, "Invalid epsilon"),
        ("logging_strategy", "nosuch", "nosuch is not a valid IntervalStrategy"),
        ("save_strategy", "nosuch", "nosuch is not a valid SaveStrategy"),
        ("log_level", "loud", "KeyError: 'loud'"),
        ("run_name", 5, "is 5; expected a string"),
        ("dataloader_prefetch_factor", 2, "dataloader_num_workers"),
        ("dataloader_multiprocessing_context", "nosuch", "num_workers"),
        ("dataloader_persistent_workers", True, "num_workers"),
        ("torch_compile_backend", "nosuch", "nosuch"),
        ("torch_compile_mode", "nosuch", "nosuch"),
        ("debug", "nosuch", "nosuch is not a valid DebugOption"),
    ],
)
def test_a_value_that_can_not_be_built_is_named(stage, key, value, words):
    with pytest.raises(UserError, match=rf"^{stage}\.trainer: {key}\b") as raised:
        try_out(run_of(stage, {"weight_decay": 0.1, key: value, "adam_beta2": 0.9}))
    (line,) = raised.value.lines
    assert words in line


@pytest.mark.parametrize("stage", [*STAGES, "ppo"])
@pytest.mark.parametrize(
    "trainer",
    [
        {}, {"optim": "adafactor"}, {"optim": "adamw_8bit", "weight_decay": 0.01}, {"max_grad_norm": 1},
        {"optim": "sgd", "optim_args": "momentum=0.9"}, {"lr_scheduler_kwargs": {"num_cycles": 0.7}},
    ],
)  # fmt: skip
def test_values_that_can_be_built_are_taken(stage, trainer):
    try_out(run_of(stage, trainer))


def test_an_error_that_is_not_the_users_is_not_blamed_on_the_recipe():
    def build(trainer):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        built("dpo", {"weight_decay": 0.1}, build)
    with pytest.raises(TypeError), naming_trainer("dpo", {}):
        raise TypeError("ours")


def test_a_value_that_only_the_trainer_refuses_is_one_line_and_the_finished_run_stays(recipe_file):
    run = train(recipe_file(max_steps=1))
    kept = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}

    # `Trainer` itself finds that there is nothing to measure.
    with pytest.raises(UserError, match=r"^dpo\.trainer: eval_strategy") as raised:
        train(recipe_file(max_steps=1, trainer={"eval_strategy": "epoch"}), overwrite=True)
    assert len(raised.value.lines) == 1
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == kept


def test_it_is_found_before_the_base_is_loaded(recipe_file, monkeypatch):
    monkeypatch.setattr("qalign.model.base.load", lambda spec, **_: pytest.fail("loaded"))

    with pytest.raises(UserError, match=r"^dpo\.trainer: optim: "):
        train(recipe_file(trainer={"optim": "nosuch"}))
