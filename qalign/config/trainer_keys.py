"""What may stand under a stage's `trainer:`: the keys of TRL's config that qalign neither sets itself nor replaces."""

import ast
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from qalign.config.paths import Keys, Problem, as_keys
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, PPO, SFT, STAGES, Reward
from qalign.errors import did_you_mean

OWN_KEYS = {"sft": SFT.model_fields, "reward": Reward.model_fields, "dpo": DPO.model_fields, "ppo": PPO.model_fields}

# Set by qalign, and the recipe key to use instead. "*" is for all stages.
OWNED = {
    "*": {
        "output_dir": "output", "max_length": "model.max_length", "seed": "seed", "num_train_epochs": "epochs",
        "per_device_train_batch_size": "micro_batch_size", "per_device_eval_batch_size": "micro_batch_size",
        "gradient_accumulation_steps": "batch_size", "lr_scheduler_type": "scheduler", "warmup_steps": "warmup_ratio",
        "eval_steps": "eval_every", "save_steps": "save_every", "bf16": "model.compute_dtype",
        "fp16": "model.compute_dtype", "gradient_checkpointing": "checkpointed_layers",
        "activation_checkpointing": "checkpointed_layers",
        "gradient_checkpointing_kwargs": "trainer.activation_checkpointing_kwargs",
    },
    "sft": {"neftune_noise_alpha": "neftune_alpha", "chat_template_path": "model.chat_template"},
    "reward": {
        "center_rewards_coefficient": "centering", "disable_dropout": "lora.dropout",
        "chat_template_path": "model.chat_template",
    },
    "dpo": {"loss_type": "loss"},
    "ppo": {
        "gradient_checkpointing_kwargs": "checkpointed_layers",
        "activation_checkpointing_kwargs": "checkpointed_layers",
    },
}  # fmt: skip
# TRL uses these in its own loading or data preparation, which qalign replaces.
WITHOUT_EFFECT = {
    "*": {"model_init_kwargs", "trust_remote_code", "dataset_num_proc", "pad_to_multiple_of", "pad_token"},
    "sft": {
        "dataset_text_field", "dataset_kwargs", "truncation_mode", "shuffle_dataset", "padding_free", "eval_packing",
        "completion_only_loss", "assistant_only_loss", "eos_token",
    },
    "reward": {"eos_token", "activation_offloading"},
    "dpo": {
        "router_aux_loss_coef", "disable_dropout", "truncation_mode", "padding_free", "precompute_ref_log_probs",
        "precompute_ref_batch_size", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
        "use_weighting", "discopop_tau", "activation_offloading", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps",
    },
}  # fmt: skip
# These would break a promise of qalign's training loop; with the reason.
REFUSED = {
    "*": {
        "auto_find_batch_size": "set micro_batch_size",
        "label_smoothing_factor": "only dpo has it: loss 'robust' with label_smoothing",
        "save_only_model": "--resume needs the optimiser's state",
        "save_total_limit": "two checkpoints are kept, so that one is always whole",
        "train_sampling_strategy": "rows are drawn at random",
        "use_cpu": "hide the GPU with CUDA_VISIBLE_DEVICES= in front of the command",
    },
    "sft": {"packing_strategy": "only 'bfd' keeps packed dialogues whole and apart"},
}
# PPO's loop is qalign's own, so of a trainer's settings it takes the optimiser's.
OPTIMISER_KEYS = {
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_kwargs",
}  # fmt: skip


def trainer_keys(stage: str) -> set[str]:
    """The fields of TRL's config for a stage, parsed from the installed source because importing it takes seconds. For
    PPO, which TRL doesn't have, the settings of the optimiser."""
    if stage == "ppo":
        return OPTIMISER_KEYS
    fields: set[str] = set()
    for package, file in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", f"trainer/{stage}_config.py"),
    ):
        source = Path(str(distribution(package).locate_file(f"{package}/{file}"))).read_text(encoding="utf-8")
        classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        targets = (item.target for node in classes for item in node.body if isinstance(item, ast.AnnAssign))
        fields |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {field for field in fields if not field.startswith("_")}


def unknown_trainer_keys(raw: Keys) -> Iterator[Problem]:
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that would have no effect."""
    for stage in STAGES:
        trainer = as_keys(as_keys(raw.get(stage)).get("trainer"))
        known = trainer_keys(stage) if trainer else set[str]()
        for key in trainer:
            place = (stage, "trainer", key)
            owner = key if key in OWN_KEYS[stage] else OWNED[stage].get(key) or OWNED["*"].get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{stage}."
                yield place, f"trainer.{key}: set it as {inside}{owner}"
            elif key in WITHOUT_EFFECT["*"] | WITHOUT_EFFECT.get(stage, set()):
                yield place, f"trainer.{key}: has no effect, because qalign replaces this part of TRL; remove it"
            elif reason := REFUSED["*"].get(key) or REFUSED.get(stage, {}).get(key):
                yield place, f"trainer.{key}: can't be used here; {reason}"
            elif key not in known:
                few = f"; it takes the optimiser's settings: {', '.join(sorted(known))}" if stage == "ppo" else ""
                yield place, f"unknown key '{key}' in {stage}.trainer" + (did_you_mean(key, known) or few)
