"""What may stand under a stage's `trainer:`: the keys of TRL's config that qalign neither sets itself nor replaces."""

import ast
import importlib.util
from pathlib import Path

from qalign.config.recipe import Recipe
from qalign.config.stages import STAGES
from qalign.errors import did_you_mean

# What qalign sets itself, and where to say it instead. (The last two are old names, silently ignored beside the new.)
_OWNED = {
    "output_dir": "output", "max_length": "model.max_length", "seed": "seed", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size", "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size", "lr_scheduler_type": "scheduler", "warmup_steps": "warmup_ratio",
    "eval_steps": "eval_every", "save_steps": "save_every", "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype", "gradient_checkpointing": "checkpointed_layers",
    "activation_checkpointing": "checkpointed_layers",
    "gradient_checkpointing_kwargs": "trainer.activation_checkpointing_kwargs",
}  # fmt: skip
_OWNED_BY_STAGE = {
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
# PPO's loop is qalign's own: of a trainer's settings it takes the optimiser's.
_OF_PPO = {
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_kwargs",
}  # fmt: skip
# What TRL does in its own loading or data preparation, where qalign has its own or nothing.
_WITHOUT_EFFECT = {
    "model_init_kwargs", "trust_remote_code", "dataset_num_proc", "pad_to_multiple_of", "pad_token",
}  # fmt: skip
_WITHOUT_EFFECT_BY_STAGE = {
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
    "ppo": set(),
}  # fmt: skip
# What would break a promise of qalign's loop, and the reason.
_NOT_HERE = {
    "auto_find_batch_size": "set micro_batch_size",
    "label_smoothing_factor": "only dpo has it: loss 'robust' with label_smoothing",
    "save_only_model": "--resume needs the optimiser's state",
    "save_total_limit": "two checkpoints are kept, so that one is always whole",
    "train_sampling_strategy": "rows are drawn at random",
    "use_cpu": "hide the GPU with CUDA_VISIBLE_DEVICES= in front of the command",
}
_NOT_HERE_BY_STAGE = {
    "sft": {"packing_strategy": "only 'bfd' keeps packed dialogues whole and apart"},
    "reward": {},
    "dpo": {},
    "ppo": {},
}


def trainer_keys(stage: str) -> set[str]:
    """The fields of TRL's config of a stage, read from the installed source: importing it would take seconds. TRL has
    no PPO; there they are the settings of the optimiser."""
    if stage == "ppo":
        return _OF_PPO
    fields = set()
    for package, inside in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", f"trainer/{stage}_config.py"),
    ):
        source = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / inside
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                fields |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return {field for field in fields if not field.startswith("_")}


def unknown_trainer_keys(raw: dict):
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that wouldn't do anything."""
    for stage in STAGES:
        section = raw.get(stage)
        trainer = section.get("trainer") if isinstance(section, dict) else None
        if not isinstance(trainer, dict) or not trainer:
            continue
        known = trainer_keys(stage)
        own = Recipe.model_fields[stage].annotation.__args__[0].model_fields
        for key in trainer:
            loc = (stage, "trainer", key)
            owner = key if key in own else {**_OWNED, **_OWNED_BY_STAGE[stage]}.get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{stage}."
                yield loc, f"trainer.{key}: set it as {inside}{owner}"
            elif key in _WITHOUT_EFFECT | _WITHOUT_EFFECT_BY_STAGE[stage]:
                yield loc, f"trainer.{key}: has no effect, qalign does this part of TRL's trainer itself; remove it"
            elif reason := {**_NOT_HERE, **_NOT_HERE_BY_STAGE[stage]}.get(key):
                yield loc, f"trainer.{key}: can't be used here; {reason}"
            elif key not in known:
                few = f"; it takes the optimiser's settings: {', '.join(sorted(known))}" if known is _OF_PPO else ""
                yield loc, f"unknown key '{key}' in {stage}.trainer" + (did_you_mean(key, known) or few)
