"""What may stand under `trainer:`: TRL's own keys, but for those that qalign sets, replaces or can't allow."""

import dataclasses

import pytest

from qalign.config.known_keys import OWNED, REFUSED, WITHOUT_EFFECT, trainer_keys
from qalign.config.recipe import Lora, Model, Recipe
from qalign.config.stages import STAGES
from tests.config.conftest import SECTIONS, line_of, with_stages

WITH_TRL = ("sft", "reward", "dpo")  # PPO's loop is qalign's own


@pytest.mark.parametrize(
    ("stage", "key", "words"),
    [
        ("dpo", "weight_deacy", "unknown key 'weight_deacy' in dpo.trainer; did you mean 'weight_decay'?"),
        ("dpo", "zzz", "unknown key 'zzz' in dpo.trainer"),
        *((stage, key, f"set it as {instead}") for stage in STAGES for key, instead in {
            "output_dir": "output", "seed": "seed", "bf16": "model.compute_dtype",
            "learning_rate": f"{stage}.learning_rate", "num_train_epochs": f"{stage}.epochs",
            "gradient_accumulation_steps": f"{stage}.batch_size",
            "gradient_checkpointing": f"{stage}.checkpointed_layers",
        }.items()),
        *((stage, "pad_token", "has no effect … remove it") for stage in STAGES),
        *((stage, key, "can't be used here; ") for stage in STAGES for key in REFUSED["*"]),
        ("dpo", "beta", "set it as dpo.beta"),
        ("dpo", "loss_type", "set it as dpo.loss"),
        ("dpo", "sync_ref_model", "has no effect"),
        ("dpo", "precompute_ref_log_probs", "has no effect"),
        ("dpo", "packing", "unknown key 'packing' in dpo.trainer"),
        ("sft", "packing", "set it as sft.packing"),
        ("sft", "neftune_noise_alpha", "set it as sft.neftune_alpha"),
        ("sft", "chat_template_path", "set it as model.chat_template"),
        ("sft", "assistant_only_loss", "has no effect"),
        ("sft", "packing_strategy", "can't be used here; only 'bfd'"),
        ("sft", "sync_ref_model", "unknown key 'sync_ref_model' in sft.trainer"),
        ("reward", "center_rewards_coefficient", "set it as reward.centering"),
        ("reward", "disable_dropout", "set it as lora.dropout"),
        ("reward", "packing_strategy", "unknown key 'packing_strategy' in reward.trainer"),
        ("dpo", "push_to_hub", "can't be used here; push the finished run"),
        ("dpo", "deepspeed", "can't be used here; qalign trains on one GPU"),
        ("dpo", "fsdp", "can't be used here; qalign trains on one GPU"),
        ("ppo", "gamma", "set it as ppo.gamma"),
        ("ppo", "gradient_checkpointing_kwargs", "set it as ppo.checkpointed_layers"),
        ("ppo", "weight_deacy", "did you mean 'weight_decay'?"),
        ("ppo", "logging_steps", "unknown key … it takes the optimiser's settings: adam_beta1, … weight_decay"),
    ],
)  # fmt: skip
def test_a_trainer_key_that_would_do_nothing_is_refused(only_problem, stage, key, words):
    line = line_of(stage, with_stages()) + 3
    setting = f"trainer:\n    {key}: 1\n    weight_decay: 0.1"

    only_problem(line, words, with_stages(**{stage: setting}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_decay", "1e300"), ("weight_decay", "-1"), ("weight_decay", ".nan"), ("max_grad_norm", ".inf"),
        ("dataloader_num_workers", "1000000"), ("dataloader_num_workers", "-1"), ("logging_steps", str(10**30)),
    ],
)  # fmt: skip
def test_a_number_under_trainer_has_bounds_too(only_problem, key, value):
    only_problem(
        10, f"dpo.trainer.{key} is … expected a number from 0 to", with_stages(dpo=f"trainer: {{{key}: {value}}}")
    )


def fields_of_trl(stage: str) -> set[str]:
    import trl

    config = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]
    return {field.name for field in dataclasses.fields(config)}


def refused_by_name(stage: str) -> list[str]:
    return [key for table in (OWNED, WITHOUT_EFFECT, REFUSED) for name in ("*", stage) for key in table.get(name, ())]


@pytest.mark.parametrize("stage", WITH_TRL)
def test_trainer_keys_reads_the_fields_of_trls_config_from_source(stage):
    found, fields = trainer_keys(stage), fields_of_trl(stage)

    assert found == fields, (
        f"HOOK BROKEN: trainer_keys('{stage}') parses transformers/training_args.py, trl/trainer/base_config.py and "
        f"trl/trainer/{stage}_config.py for the fields of TRL's config, which an upgrade has moved. "
        f"Only in the config: {sorted(fields - found)}; only parsed: {sorted(found - fields)}"
    )


@pytest.mark.parametrize("stage", WITH_TRL)
def test_every_trainer_key_that_is_refused_by_name_is_still_trls_and_named_once(stage):
    names = refused_by_name(stage)
    gone = set(names) - fields_of_trl(stage)

    assert not gone, f"HOOK BROKEN: TRL's config of {stage} has these keys no more, drop them here: {gone}"
    assert len(names) == len(set(names))


def test_what_ppo_takes_are_settings_of_transformers_trainer():
    import transformers

    gone = trainer_keys("ppo") - {field.name for field in dataclasses.fields(transformers.TrainingArguments)}

    assert "optim" in trainer_keys("ppo")
    assert not gone, f"HOOK BROKEN: transformers' TrainingArguments has these keys no more: {gone}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_to_use_instead_can_be_set(stage):
    known = {*Recipe.model_fields, *SECTIONS[stage].model_fields}
    known |= {f"{name}.{key}" for name, section in (("model", Model), ("lora", Lora)) for key in section.model_fields}
    taken = fields_of_trl(stage) if stage in WITH_TRL else trainer_keys(stage)
    known |= {f"trainer.{key}" for key in taken.difference(refused_by_name(stage))}
    owned = {**OWNED["*"], **OWNED[stage]}

    assert set(owned.values()) <= known
