"""One quantised base in memory, and the adapters that make it play every role.

`Base.acting_as(role)` is the only way to change which part is played.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from qalign.errors import UserError
from qalign.logps import check_head
from qalign.recipe import Lora, Model
from qalign.tokens import prepare_tokenizer
from qalign.weights import compute_dtype, load_weights, save_tokenizer


class Role(StrEnum):
    """A part that the base can play; also the name of the adapter that plays it."""

    POLICY = "policy"
    REFERENCE = "reference"


class Base:
    """A frozen base with its adapters.

    Attributes:
        lm: the causal language model; adapters are injected into it.
        model: `lm`, or the `PeftModel` around it once a policy was added.
        tokenizer: with one chat template, one BOS and a pad token.
        source: folder or hub id that plain transformers can load the 16-bit base from.
        template: where the chat template comes from, in words.
        dtype: what matrices are multiplied in; adapters are float32 and cast to it.
        reference: what the reference is made of, in words.
        role: the part being played.
        switches: how often the part was changed.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer, source: str, template: str, dtype: torch.dtype):
        lm.requires_grad_(False)
        lm.eval()
        self._base_parameters = lm.num_parameters()
        self.lm, self.model = lm, lm
        self.tokenizer, self.source, self.template, self.dtype = tokenizer, source, template, dtype
        self.reference = "the base with adapters off"
        self.role = Role.POLICY
        self.switches = 0

    def add_policy(self, lora: Lora) -> None:
        """A new trainable adapter that begins as a no-op; the reference is then the base with adapters off."""
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            self.model = peft.get_peft_model(self.lm, config, adapter_name=Role.POLICY)
        except (ValueError, re.error) as error:  # a text is a pattern
            raise UserError(f"lora.targets: {lora.targets} fits no layer of {self.source}: {error}") from None
        self._check_head_is_frozen("lora.targets")

    def load_policy(self, folder: str, *, trainable: bool) -> None:
        """A copy of a saved PEFT adapter as the policy.

        Raises:
            UserError: the adapter was made for another model, or is of a kind that the roles can't keep apart.
        """
        try:
            config = peft.PeftConfig.from_pretrained(folder)
            if config.is_prompt_learning:
                raise UserError(f"{folder}: prompt tuning can't share a base with a reference; use LoRA")
            if getattr(config, "bias", "none") != "none":
                raise UserError(f"{folder}: an adapter with bias '{config.bias}' changes the base itself; use 'none'")
            self.model = peft.PeftModel.from_pretrained(
                self.lm, folder, adapter_name=Role.POLICY, is_trainable=trainable
            )
        except (KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join((str(error) or repr(error)).splitlines()[:2])
            raise UserError(f"{folder}: this adapter is broken or doesn't fit {self.source}: {reason}") from None
        self._check_head_is_frozen(folder)

    def _check_head_is_frozen(self, origin: str) -> None:
        if isinstance(self.lm.get_output_embeddings(), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(f"{origin}: the output layer can't have an adapter, log-probs use its frozen weight")

    def load_reference(self, folder: str) -> None:
        """A frozen copy of a saved PEFT adapter as the reference; call after the policy was made."""
        self.model.load_adapter(folder, adapter_name=Role.REFERENCE, is_trainable=False)
        self.reference = f"the base with a frozen copy of the adapter {folder}"

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[PreTrainedModel]:
        """Plays a role; afterwards everything is as it was: the active adapter, `requires_grad`, training modes.

        Every role but the policy has no dropout; all compute in the same precision. Nestable and exception-safe.
        Yields the language model.
        """
        before = self.role
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [module for module in self.model.modules() if module.training]
        try:
            self._switch(role)
            if role is not Role.POLICY:
                self.model.eval()
                self.model.requires_grad_(False)
            else:  # PEFT's switch makes what it activates trainable, a policy that is only evaluated too
                _restore(flags)
            with torch.autocast(self.lm.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield self.lm
        finally:
            self._switch(before)
            _restore(flags)
            for module in modes:
                module.training = True

    def _switch(self, role: Role) -> None:
        if role is self.role or self.model is self.lm:
            return
        self.switches += 1
        tuner = self.model.base_model
        if role in self.model.peft_config:
            tuner.enable_adapter_layers()
            self.model.set_adapter(role)
        else:
            tuner.disable_adapter_layers()
        self.role = role

    def save_policy(self, folder: Path) -> None:
        """Writes the policy into a folder as plain PEFT saves it, with the tokenizer and its chat template; each file
        is written aside and then renamed."""
        self.model.peft_config[Role.POLICY].base_model_name_or_path = self.source
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            self.model.save_pretrained(aside, selected_adapters=[Role.POLICY], save_embedding_layers=False)
            policy = Path(aside) / Role.POLICY
            save_tokenizer(self.tokenizer, policy)
            for file in policy.iterdir():
                file.replace(folder / file.name)

    @property
    def precision(self) -> str:
        """What is computed in, and where, in words."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.lm.device.type}"

    def count_parameters(self) -> tuple[int, int]:
        """(those of the policy, those of the base), where two 4-bit weights in a byte count as two."""
        policy = sum(p.numel() for name, p in self.model.named_parameters() if f".{Role.POLICY}." in name)
        return policy, self._base_parameters


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        parameter.requires_grad_(wanted)


def load(spec: Model) -> Base:
    """The base of a recipe, ready for adapters.

    Raises:
        UserError: it can't be found, fetched or read.
    """
    lm, tokenizer, source = load_weights(spec)
    template = prepare_tokenizer(tokenizer, spec.chat_template)
    lm.config.pad_token_id = lm.generation_config.pad_token_id = tokenizer.pad_token_id
    check_head(lm)
    return Base(lm, tokenizer, source, template, compute_dtype(spec))
