"""The key that was probably meant: other kits' names, TRL's, and keys that stand in the wrong section."""

from typing import get_args

import pytest
import yaml

from qalign.config import known_keys
from qalign.config.known_keys import section_at
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO_LOSSES, STAGES
from tests.config.conftest import GOOD, with_stages


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("dpo.lr", "learning_rate"), ("dpo.bs", "batch_size"), ("dpo.num_train_epochs", "epochs"),
        ("dpo.per_device_train_batch_size", "micro_batch_size"), ("dpo.gradient_accumulation_steps", "batch_size"),
        ("dpo.save_steps", "save_every"), ("dpo.dataset", "data"), ("dpo.eval_dataset", "eval_data"),
        ("dpo.dpo_beta", "beta"), ("dpo.loss_type", "loss"), ("dpo.rpo_alpha", "loss.sft"), 
        ("dpo.sft_weight", "loss.sft"), ("dpo.f_divergence_type", "divergence"), ("dpo.loss_weights", "loss"),
        ("dpo.Learning-Rate", "learning_rate"), ("dpo.adapter_name_or_path", "start_from"),
        ("dpo.output_dir", "output"), ("dpo.seed", "seed"), ("dpo.max_length", "model.max_length"),
        ("dpo.max_seq_length", "model.max_length"), ("dpo.lora_alpha", "lora.alpha"), ("dpo.r", "lora.r"),
        ("dpo.optim", "dpo.trainer.optim"), ("dpo.optimizer", "dpo.trainer.optim"), ("dpo.clip", "ppo.clip"),
        ("dpo.weight_decay", "dpo.trainer.weight_decay"), ("dpo.report_to", "log_to"),
        ("dpo.packing", "sft.packing"), ("ppo.beta", "kl_coefficient"),
        *((f"grpo.{theirs}", ours) for theirs, ours in {
            "num_generations": "samples_per_prompt", "beta": "kl_coefficient", "epsilon": "clip",
            "loss_type": "loss_average",
            "epsilon_high": "clip_high", "max_completion_length": "max_new_tokens", "num_iterations": "update_epochs",
            "importance_sampling_level": "ratio", "scale_rewards": "advantage", "delta": "ratio_max",
            "mask_truncated_completions": "missing_eos_penalty", "reward_funcs": "reward", "use_vllm": "engine",
            "adv_estimator": "advantage", "clip_ratio_high": "clip_high", "kl_loss_coef": "kl_coefficient",
            "loss_agg_mode": "loss_average", "max_prompt_length": "model.max_length",
        }.items()), ("ppo.kl_coef", "kl_coefficient"),
        ("ppo.num_generations", "samples_per_prompt"), ("ppo.cliprange", "clip"), ("ppo.reward_model", "reward"),
        ("reward.neftune_alpha", "sft.neftune_alpha"), ("sft.sample_packing", "packing"),
        ("lora.rank", "r"), ("lora.lora_r", "r"), ("lora.lora_alpha", "alpha"), ("lora.target_modules", "targets"),
        ("lora.use_dora", "dora"), ("lora.learning_rate", "dpo.learning_rate"), ("lora.bs", "dpo.batch_size"),
        ("model.model_name_or_path", "base"), ("model.load_in_4bit", "quantization"), ("model.name", None),
        ("model.torch_dtype", "compute_dtype"), ("model.lr", "dpo.learning_rate"),
        ("model_name_or_path", "model.base"), ("load_in_4bit", "model.quantization"), ("output_dir", "output"),
        ("lora_r", "lora.r"), ("lr", "dpo.learning_rate"), ("learning_rate", "dpo.learning_rate"), ("beta", "dpo.beta"),
        ("dataset", "dpo.data"), ("kl_coef", "ppo.kl_coefficient"), ("base", "model.base"), ("r", "lora.r"),
        ("dpo.data.dataset", "path"), ("dpo.data.max_samples", "limit"), ("dpo.data.lr", None), ("dpo.zzz", None),
        ("dpo.trainer.lr", "learning_rate"), ("zzz", None),
    ],
)  # fmt: skip
def test_what_was_meant_is_said_in_a_recipe_and_on_the_command_line(problems, key, meant):
    text = GOOD.replace("data: pairs.jsonl", "data: {path: pairs.jsonl}")
    text = with_stages() if key.split(".")[0] in ("sft", "reward", "ppo", "grpo") else text

    (line,) = problems(text, f"{key}=1")

    said = f"unknown key '{key.split('.')[-1]}'"
    assert line.startswith(f"command line: {said}")
    hint = f"; did you mean '{meant}'?"
    assert line.endswith(hint) if meant else "did you mean" not in line


def test_a_stage_that_the_recipe_has_is_suggested_first(problems):
    assert problems("model: {base: org/m}\noutput: x\nreward: {data: pairs.jsonl}\nlr: 1\n") == [
        "recipe.yaml:4: unknown key 'lr'; did you mean 'reward.learning_rate'?"
    ]


def test_every_alias_leads_to_a_key_and_is_none_itself():
    file = known_keys.__file__.replace("known_keys.py", "aliases.yaml")
    with open(file, encoding="utf-8") as opened:
        table = yaml.safe_load(opened)
    fields = {name: set(section_at((name,)).model_fields) for name in ("model", "lora", *STAGES)}
    everywhere = set.union(*fields.values(), set(Recipe.model_fields), {"path"})

    for key, names in table.items():
        section, _, inside = key.rpartition(".")
        assert section == "trainer" or inside in (fields | {"loss": get_args(DPO_LOSSES)}).get(section, everywhere), key
        assert len(names) == len(set(names)), key
