"""How plain transformers generates with a base, and with what was trained on it: `generation_config.json`."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import transformers as tf

from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import end_of_turn_ids
from qalign.errors import UserError
from qalign.model import origin
from qalign.model.origin import Origin

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What `generate` makes of a setting, and the value for which it makes nothing. They refuse values that
# `GenerationConfig` takes, such as a temperature of 0.
PROCESSORS: dict[str, tuple[Any, int]] = {
    "temperature": (tf.TemperatureLogitsWarper, 1),
    "top_p": (tf.TopPLogitsWarper, 1),
    "top_k": (tf.TopKLogitsWarper, 0),
    "typical_p": (tf.TypicalLogitsWarper, 1),
    "repetition_penalty": (tf.RepetitionPenaltyLogitsProcessor, 1),
}


def mended(found: Origin) -> tuple[tf.GenerationConfig | None, list[str]]:
    """(A base's generation config without its contradictions, the settings that were changed or left out). The config
    is None if there is none, or nothing is wrong with it. Otherwise transformers couldn't save it, or even read it."""
    try:
        if found.is_local:
            file = Path(found.source) / "generation_config.json"
        else:
            file, _ = origin.fetch(found.source, "generation_config.json", found.revision, "model.base")
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, RecursionError):
        return None, []
    if not isinstance(settings, dict):
        return tf.GenerationConfig(), ["all of them"]
    if _usable(settings):
        return None, []
    changed, sampling = [], {key: value for key, value in settings.items() if key in SAMPLING}
    if sampling and not settings.get("do_sample") and _usable(sampling | {"do_sample": True}):
        settings = {"do_sample": True} | settings | {"do_sample": True}  # as they were meant, by the values beside it
        changed.append("do_sample")
    kept: dict[str, Any] = {}
    for key in sorted(settings, key=lambda name: name not in ("do_sample", "num_beams")):  # others depend on these
        if _usable(kept | {key: settings[key]}):
            kept[key] = settings[key]
        else:
            changed.append(key)
    return _usable(kept), changed


def _usable(settings: dict[str, Any]) -> tf.GenerationConfig | None:
    """The config of these settings; None if transformers refuses them."""
    try:
        config = tf.GenerationConfig.from_dict(settings)
        config.validate(strict=True)
        for name, (processor, neutral) in PROCESSORS.items():
            if (value := getattr(config, name)) is not None and value != neutral:
                processor(value)
    except Exception:  # wrong types raise whatever the comparison raises
        return None
    return config if all(_ids(config)) else None


def _ids(config: tf.GenerationConfig) -> list[bool]:
    """Whether each special token of a config is an id, as a whole number from 0 on."""
    found = (config.bos_token_id, config.pad_token_id, *_ends(config))
    return [type(token) is int and token >= 0 for token in found if token is not None]


def _ends(config: tf.GenerationConfig) -> list[Any]:
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def trained(lm: tf.PreTrainedModel, template: ChatTemplate) -> tf.GenerationConfig:
    """How plain transformers should generate with a trained model: as the base does, but an answer also ends with the
    end of turn that was trained."""
    config, tokenizer = deepcopy(cast(tf.GenerationConfig, lm.generation_config)), template.tokenizer
    ends = [*end_of_turn_ids(template), *_ends(config), tokenizer.eos_token_id]
    config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return config
