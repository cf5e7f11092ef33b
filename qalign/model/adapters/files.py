"""A PEFT adapter's folder, checked from its files alone, before any model is loaded. Imports no torch.

Adapters may come from strangers. PEFT reads pickles, ignores settings that it doesn't know, and doesn't notice tensors
that are missing. Here every setting is honoured or refused by name.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from qalign.config.paths import check_fetched
from qalign.errors import UserError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEAD = "score"  # of a model that gives scores: the name of the module in transformers' sequence classifiers
SCORE_HEAD = f"base_model.model.{HEAD}.weight"  # in the file of a reward adapter
MAX_CONFIG_BYTES = 2**22
# Initialisations that leave the base as it is. Others move part of its weights into the adapter, which is then wrong on
# the unchanged base: PiSSA, OLoRA, CorDA, LoRA-GA, and PEFT's LoftQ.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Fields that say where an adapter comes from, or that matter only while it is initialised.
NOTES = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",  # settings of `megatron_config` and `use_qalora`, which are refused
}  # fmt: skip

Rank = Annotated[int, Field(ge=1)]
Positive = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[list[str], Field(max_length=5000)]
Plain = Annotated[str, Field(pattern=r"^[\w.-]+$")]  # PEFT puts it into a regular expression
Expression = Annotated[str, Field(max_length=10_000)]  # a regular expression: see `layers_that_fit`
Counts = Annotated[dict[Expression, Rank], Field(max_length=5000)]
Scales = Annotated[dict[Expression, int | Scale], Field(max_length=5000)]


class LoraSettings(BaseModel):
    """The fields of PEFT's `LoraConfig` that are honoured; None stands for PEFT's default."""

    model_config = ConfigDict(strict=True)

    r: Rank | None = None
    lora_alpha: Positive | None = None  # with 0, an adapter would neither do nor learn anything
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_modules: Expression | Names
    exclude_modules: Expression | Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Plain | list[Plain] | None = None
    rank_pattern: Counts | None = None
    alpha_pattern: Scales | None = None
    modules_to_save: list[Plain] | None = None
    trainable_token_indices: list[int] | dict[Plain, list[int]] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None


class AdapterFiles(BaseModel):
    """What an adapter's folder says about it."""

    settings: LoraSettings
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by their names in the file

    @property
    def weights(self) -> int:
        """How many numbers the tensors have."""
        return sum(map(math.prod, self.shapes.values()))


def read_files(folder: str | Path) -> AdapterFiles:
    """Reads and checks `adapter_config.json`, and the names and shapes of the tensors; a `UserError` if the adapter is
    damaged, or of a kind that can't share a base with other roles."""
    config = _read_config(Path(folder))
    settings = _read_settings(folder, config)
    shapes = _read_shapes(Path(folder))
    head = shapes.get(SCORE_HEAD)
    if config.get("task_type") == "SEQ_CLS" and head is None:
        raise UserError(f"{folder}: this reward adapter has lost its score head; train it again")
    if head is not None and (len(head) != 2 or head[0] != 1):
        raise UserError(f"{folder}: the score head has the shape {head}; expected one label, (1, hidden size)")
    return AdapterFiles(settings=settings, shapes=shapes)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{folder}: {CONFIG} is larger than {MAX_CONFIG_BYTES >> 20} MiB; this is no adapter")
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: is no PEFT adapter: {CONFIG} can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{folder}: {CONFIG} is damaged ({reason}); copy the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: {CONFIG} holds a {type(config).__name__}; expected PEFT's settings")
    settings = cast(dict[str, Any], config)
    kind = settings.get("peft_type")
    if kind is None:
        raise UserError(f"{folder}: {CONFIG} doesn't say what kind of adapter this is: it has no peft_type")
    if kind != "LORA":
        raise UserError(f"{folder}: is a {_shown(kind)} adapter, which can't share a base between roles; use LoRA")
    return settings


def _read_settings(folder: str | Path, config: dict[str, Any]) -> LoraSettings:
    init = config.get("init_lora_weights", True)
    if init not in HARMLESS_INITS and init is not None:
        raise UserError(f"{folder}: a {_shown(init)} adapter needs a base of its own; convert it to plain LoRA")
    if (bias := config.get("bias", "none")) not in ("none", None):
        raise UserError(f"{folder}: an adapter with bias {_shown(bias)} changes the base itself; use 'none'")
    for name, value in config.items():
        if name not in NOTES and name != "bias" and name not in LoraSettings.model_fields and value:
            raise UserError(
                f"{folder}: {CONFIG} sets {_shown(name)} to {_shown(value)}, which roles on one base can't use; "
                "train a plain LoRA adapter"
            )
    try:
        return LoraSettings.model_validate({name: config[name] for name in LoraSettings.model_fields if name in config})
    except ValidationError as error:
        first = error.errors()[0]
        name, value = str(first["loc"][0]), config.get(str(first["loc"][0]))
        raise UserError(f"{folder}: {CONFIG} sets {name} to {_shown(value)}: {first['msg']}") from None


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    file = folder / WEIGHTS
    if not file.is_file() and (folder / PICKLE).is_file():
        raise UserError(
            f"{folder}: {PICKLE} is a pickle, which may run code when it is read; only {WEIGHTS} is. If you trust it: "
            "PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(FOLDER) converts it"
        )
    try:
        check_fetched([file])
        reader: Any = safe_open(file, "np")
        with reader as opened:
            slices: dict[str, Any] = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes: dict[str, tuple[int, ...]] = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            others = [name for name, piece in slices.items() if piece.get_dtype() not in ("F64", "F32", "F16", "BF16")]
    except (OSError, SafetensorError) as error:
        reason = f"{error}"[:100]
        raise UserError(f"{folder}: {WEIGHTS} is missing or damaged ({reason}); copy the adapter again") from None
    if not shapes:
        raise UserError(f"{folder}: {WEIGHTS} holds no tensors; save the adapter again")
    if others:
        raise UserError(f"{folder}: {_shown(others[0])} isn't of a floating-point dtype; save the adapter unquantised")
    return shapes


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
