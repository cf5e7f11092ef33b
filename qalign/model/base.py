"""One quantised base in memory, and the adapters that make it play every role. Only `Base.acting_as` changes roles."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalign.config.recipe import Lora, Model
from qalign.data.collate import AnswerBatch, AnsweredPrompt, MicroBatchLimit, micro_batches, pack, packed_tokens, pad
from qalign.data.templates import ChatTemplate, prepare_template
from qalign.errors import UserError
from qalign.model.adapters import targets, weights
from qalign.model.adapters.files import HEAD, SCORE_HEAD, WEIGHTS
from qalign.model.adapters.switch import AdapterSwitch
from qalign.model.adapters.weights import adapter_parameters
from qalign.model.kernels import fuse
from qalign.model.lineage import Lineage, describe
from qalign.model.loading import Form, load_weights, parts_left_out, reach_of
from qalign.model.logps import ScalarHead, backbone, check_head, new_head
from qalign.model.memory.kv_cache import RowCache, measured_cache
from qalign.model.memory.shard import InTurn, parameter_count, tensor_bytes
from qalign.model.memory.stream import stream_of
from qalign.model.origin import Origin
from qalign.model.packing.packing import Packing, packing_of

UNFIT = (KeyError, TypeError, RuntimeError, ValueError, SafetensorError)  # raised for adapters that are broken


class Role(StrEnum):
    """A role that the base can play; also the name of the adapter that plays it."""

    BASE = "base"
    POLICY = "policy"
    REFERENCE = "reference"
    REWARD = "reward"
    VALUE = "value"
    JUDGE = "judge"
    MEMBER = "member"


# They have a scalar head; further ones are called reward_2, judge_2 …, and an ensemble's member_1, member_2 …
SCORING = (Role.REWARD, Role.VALUE, Role.JUDGE, Role.MEMBER)


class Base:
    """A frozen base with its adapters.

    Attributes:
        lm: the language model with the adapters in it, and once a role gives scores with a head `score`.
        model: `lm`, or the `PeftModel` around it once there is an adapter.
        tokenizer: with a chat template, one BOS and a pad token.
        origin, template: where the weights come from, and the chat template (in words).
        max_length: `model.max_length`, or how far the base reaches if that is less; for commands on a finished run.
        dtype, device: of matrix products; adapters are float32 and autocast to it.
        left_out: the parts of the checkpoint that no text reaches, which are not held.
        reference: what the reference is made of, in words.
        kernels: the fused kernels that it runs with, in words; None on a CPU, or where the recipe wants none.
        role, role_switches: the active role, and the number of role changes so far.
    """

    def __init__(
        self, lm: PreTrainedModel, template: ChatTemplate, origin: Origin, spec: Model, left_out: Sequence[str] = ()
    ):
        lm.requires_grad_(False).eval()
        self._switch = AdapterSwitch(lm)
        self.lm, self.dtype, self.device, self._base_parameters = lm, lm.dtype, lm.device, parameter_count(lm)
        self.model: PreTrainedModel | peft.PeftModel = lm
        self.template, self.tokenizer, self.origin, self.spec = template, template.tokenizer, origin, spec
        self.max_length = min(spec.max_length, reach_of(lm.config) or spec.max_length)
        self.left_out, self.reference = left_out, "the base with adapters off"
        self.kernels: str | None = None
        self.role: str = Role.BASE
        self.role_switches = 0
        self._heads: dict[str, ScalarHead] = {}
        self._trained: set[str] = set()

    def add_adapter(self, role: str, lora: Lora, share: float = 1.0) -> None:
        """Adds a new trainable adapter on the last `share` of the layers, a no-op at first except with `init: loftq`;
        with a random head for a role that gives scores. A `UserError` if a target fits no layer of the language model,
        or the output layer."""
        config = targets.new_config(lora, self.lm, self.spec.base, share)
        try:
            with self._changing_adapters():
                self._attach(role, config, with_head=_gives_scores(role))
                if lora.init == "loftq":
                    weights.start_with_loftq(self.model, load_weights(self.spec, form="original")[0], role)
                self._settle(role, trainable=True)
        except ValueError as error:
            raise UserError(f"lora: no adapter can be put on {self.spec.base}: {error}") from None

    def add_head(self, role: str) -> None:
        """Adds a trainable scalar head for a value model that starts from no reward model, or sets it to 0 again."""
        if role not in self._heads:
            self._heads[role] = new_head(self.lm)
        nn.init.zeros_(self._heads[role].weight)

    def load_adapter(self, role: str, folder: str, *, trainable: bool) -> None:
        """Adds a copy of a saved PEFT adapter, with its score head if it has one, as a `Role` or under a further name.
        A `UserError` if it was made for another model or can't share the base; nothing of it stays on the base then."""
        config, tensors = weights.read(folder, self.lm, self.spec.base, trainable=trainable)
        if SCORE_HEAD in tensors and not _gives_scores(role):
            raise UserError(f"{folder}: is a reward adapter, which gives scores; expected one that gives answers")
        if SCORE_HEAD not in tensors and _gives_scores(role) and not trainable:
            raise UserError(f"{folder}: gives answers; expected a reward adapter, which gives scores")
        with self._changing_adapters():
            try:
                self._attach(role, config, with_head=_gives_scores(role))
                if role in self._heads:  # an SFT adapter, from which a reward model starts, has none: its head is new
                    tensors.setdefault(SCORE_HEAD, self._heads[role].weight.detach())
                weights.fill(cast(peft.PeftModel, self.model), role, tensors, folder, self.spec.base)
                self._settle(role, trainable=trainable)
            except BaseException as error:
                self.role = Role.BASE if self.role == role else self.role
                if role in self._configs:
                    cast(peft.PeftModel, self.model).delete_adapter(role)
                self._heads.pop(role, None)
                if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, UNFIT):
                    raise
                reason = " ".join((str(error) or repr(error)).splitlines()[:2])
                raise UserError(f"{folder}: this adapter is broken or doesn't fit {self.spec.base}: {reason}") from None

    def load_reference(self, folder: str) -> None:
        """Makes a frozen copy of a saved adapter the reference. Call it after the policy was made."""
        self.load_adapter(Role.REFERENCE, folder, trainable=False)
        self.reference = f"the base with a frozen copy of the adapter {folder}"

    def _attach(self, role: str, config: peft.LoraConfig, *, with_head: bool) -> None:
        """Adds an adapter, and for a role that gives scores a copy of the head; the first adapter becomes active."""
        if with_head:
            if not hasattr(self.lm, HEAD):
                self.lm.score = new_head(self.lm)
            config.modules_to_save = [*(config.modules_to_save or ()), HEAD]
        config.base_model_name_or_path = config.revision = None  # set when the adapter is saved
        config.task_type = peft.TaskType.CAUSAL_LM
        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(role, config)
        else:
            self.model = cast(peft.PeftModel, peft.get_peft_model(self.lm, config, adapter_name=role))
            self.role = role
        if with_head:
            self._heads[role] = cast(Any, self.lm.score).modules_to_save[role]
            self._heads[role].reset_parameters()

    @contextmanager
    def _changing_adapters(self) -> Iterator[None]:
        """For PEFT to add or delete an adapter."""
        self._switch.close()
        try:
            yield
        finally:
            weights.make_trainable(self.model, self._trained)
            self._switch = AdapterSwitch(self.model)
            flags = self._switch.flags()
            self._switch.activate(self.role if self.role in self._configs else None)
            self._switch.restore(flags)

    def _settle(self, role: str, *, trainable: bool) -> None:
        """Makes a new adapter float32 (PEFT leaves some of it in the base's dtype, and updates round away in 16 bits),
        and trained or not."""
        if trainable:
            self._trained.add(role)
        for parameter in adapter_parameters(self.model, role).values():
            parameter.data = parameter.data.float()

    def trained_weights(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of a role's adapter, and of its head if it has one, by name."""
        self._switch.put_adapters_in_place()
        found = adapter_parameters(self.model, role)
        self._switch.put_adapters_in_place(self.role in self._configs)
        if role in self._heads:
            head = cast(nn.Parameter, self._heads[role].weight)
            found = {name: weight for name, weight in found.items() if weight is not head} | {f"{HEAD}.weight": head}
        return found

    def adapter_layers(self, role: str) -> list[BaseTunerLayer]:
        """PEFT's layers that hold something of a role's adapter."""
        return self._switch.layers_of(role)

    @property
    def adapters(self) -> list[str]:
        """The roles that have an adapter or a head of their own, in the order in which they were added."""
        return list(dict.fromkeys([*self._configs, *self._heads]))

    @property
    def _configs(self) -> dict[str, peft.PeftConfig]:
        return getattr(self.model, "peft_config", {})

    @property
    def held_bytes(self) -> int:
        """Device memory of the base's own weights and buffers, including the scales of 4-bit weights."""
        added = {id(p) for role in self.adapters for p in self.trained_weights(role).values()}
        added |= {id(p) for p in getattr(self.lm, HEAD, nn.Module()).parameters()}
        own = (t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in added)
        return sum(map(tensor_bytes, own)) - (stream.saved_bytes if (stream := stream_of(self.lm)) else 0)

    def train(self) -> None:
        """Training mode, as `AdapterSwitch.train` means it."""
        self._switch.train()

    @contextmanager
    def acting_as(self, role: str) -> Iterator[PreTrainedModel]:
        """Plays a role and yields the language model. Afterwards everything is as before: the active adapter,
        `requires_grad`, training modes. Nestable and exception-safe.

        Only a trained role has dropout, and only while gradients are enabled. All roles compute in the same dtype.
        """
        before, flags = self.role, self._switch.flags()
        try:
            self._play(role)
            if role not in self._trained or not torch.is_grad_enabled():
                self._switch.restore(([], []))
            elif role != before:  # PEFT may have changed them
                self._switch.restore(flags)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield self.lm
        finally:
            self._play(before)
            self._switch.restore(flags)

    def _play(self, role: str) -> None:
        if role == self.role or not isinstance(self.model, peft.PeftModel):
            return
        self.role_switches += 1
        self.role = role  # first, so that a switch that is interrupted is undone
        self._switch.activate(role if role in self._configs else None)

    def pair_scores(self, role: str, rows: Sequence[AnsweredPrompt]) -> Tensor:
        """A reward model's scores, float32 `(rows, answers each)`, with gradients if they are enabled and the role is
        trained. Call it inside `packed_attention`."""
        with self.acting_as(role) as lm:
            batch = self.batch(rows, last_token="kept")
            hidden = backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state
            return self.head_scores(role, hidden.flatten(0, 1)[batch.last_tokens]).view(batch.lengths.shape)

    def head_scores(self, role: str, states: Tensor) -> Tensor:
        """The output of a role's head on hidden states `(tokens, hidden)`: float32 `(tokens,)`."""
        return self._heads[role](states)[:, 0]

    def routes(self, roles: Sequence[str]) -> list[nn.Module] | None:
        """The base's layers that have the adapters of these roles; None where `routed` can't serve them."""
        with self.acting_as(roles[0]):
            return self._switch.added.routes(roles)

    @contextmanager
    def routed(self, roles: Sequence[str]) -> Iterator[None]:
        """Gives each of these roles an equal part of the tokens, in this order, while the first of them is played."""
        self._switch.added.route(roles)
        try:
            yield
        finally:
            self._switch.added.route(())

    def train_again(self) -> None:
        """Makes trainable what is trained, after PEFT has gone by which adapter is active."""
        weights.make_trainable(self.model, self._trained)

    @cached_property
    def packing(self) -> Packing:
        """How packed rows are run."""
        with torch.no_grad(), self.acting_as(self.role):  # without gradients no adapter has dropout
            return packing_of(self.lm)

    @property
    def padding_reason(self) -> str | None:
        """Why answers are padded to a row each instead of packed behind a shared prompt; None if they are packed."""
        return self.packing.reason

    @cached_property
    def row_cache(self) -> RowCache:
        """What a row takes while it is sampled, and what the model calls its cache."""
        with torch.no_grad(), self.acting_as(self.role):
            return measured_cache(self.lm)

    @property
    def layout_in_words(self) -> str:
        """How the prompts of pairs are run, in words."""
        if self.padding_reason:
            return f"twice a pair, padded: {type(self.lm).__name__} {self.padding_reason}"
        rows = f" (but in {mixers}, a row an answer)" if (mixers := str(self.packing.mixers)) else ""
        return f"once a pair, packed without padding{rows}"

    def batch(
        self, rows: Sequence[AnsweredPrompt], *, last_token: Literal["dropped", "kept"] = "dropped"
    ) -> AnswerBatch:
        """Pairs, or prompts with answers, as tensors on the model's device, to be run inside `packed_attention`."""
        batch = pad(rows, self.tokenizer.pad_token_id) if self.padding_reason else pack(rows, last_token=last_token)
        return batch.to(self.device)

    def tokens_taken(self, row: AnsweredPrompt) -> int:
        """The number of tokens that a pair, or a prompt with its answers, adds to a forward pass."""
        return len(row.answers) * len(row) if self.padding_reason else packed_tokens(row)

    def micro_batches(self, rows: Sequence[AnsweredPrompt], limit: MicroBatchLimit) -> list[list[AnsweredPrompt]]:
        """Rows in groups of roughly equal token counts, one group for each forward pass."""
        return micro_batches(rows, limit, layout="padded" if self.padding_reason else "packed")

    def packed_attention(self) -> AbstractContextManager[None]:
        """Switches the model to the attention for what `batch` makes. The backward belongs inside too."""
        return nullcontext() if self.padding_reason else self.packing.open(self.lm)

    def save_adapter(self, role: str, folder: Path) -> None:
        """Writes an adapter, the tokenizer and its chat template into a folder, as plain PEFT saves them."""
        model = cast(peft.PeftModel, self.model)
        with self.acting_as(role):
            weights.save(model, role, folder, self.template, self.origin, exact_names=bool(self.left_out))

    def restore_adapter(self, role: str, folder: Path) -> None:
        """Gives an adapter the weights that `save_adapter` wrote, such as a checkpoint's."""
        tensors = load_file(folder / WEIGHTS, device=str(self.device))
        with self.acting_as(role):
            weights.fill(cast(peft.PeftModel, self.model), role, tensors, str(folder), self.spec.base)

    def lineage(self, stage: str, parent: str | None = None) -> Lineage:
        """The lineage of an adapter that is trained on this base, starting from the adapter folder `parent`."""
        return describe(self, stage, parent)

    @property
    def precision(self) -> str:
        """The dtype and device of the computation, in words."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"

    def count_parameters(self) -> tuple[int, int]:
        """(trained parameters, the base's own parameters); 4-bit weights are counted one by one."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad), self._base_parameters


def _gives_scores(role: str) -> bool:
    return role.partition("_")[0] in SCORING


def load(spec: Model, form: Form = "held", now: datetime | None = None, in_turn: InTurn | None = None) -> Base:
    """A recipe's base, ready for adapters; a `UserError` if it can't be read. `in_turn`: see `load_weights`."""
    lm, tokenizer, origin = load_weights(spec, form=form, in_turn=in_turn)
    template = prepare_template(tokenizer, spec, now)
    lm.config.pad_token_id = lm.generation_config.pad_token_id = tokenizer.pad_token_id
    left_out = targets.leave_out(lm, lambda: check_head(lm)) if form == "held" else []
    base = Base(lm, template, origin, origin.held(spec), [*left_out, *parts_left_out(lm, origin)])
    base.kernels = fuse(lm) if form == "held" and spec.fused_kernels else None
    return base
