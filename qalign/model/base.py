"""One quantised base in memory, and the adapters that make it play every role.

`Base.acting_as(role)` is the only way to change which part is played.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qalign.config.recipe import Lora, Model
from qalign.data.collate import AnswerBatch, AnsweredPrompt, MicroBatchLimit, micro_batches, pack, packed_tokens, pad
from qalign.data.tokenize import pad_for_scores, prepare_tokenizer
from qalign.errors import UserError
from qalign.model.attention import packed_attention, why_not_packed
from qalign.model.heads import ScalarHead, end_scores, pair_scores
from qalign.model.lineage import Lineage, adapter_hash, digest
from qalign.model.loading import Form, Origin, load_weights, save_tokenizer
from qalign.model.logps import check_head
from qalign.model.lora_init import mend_rounding

# Starts for which PEFT moves part of the base into the adapter: on the plain base they are silently wrong.
_REBASED = ("pissa", "olora", "corda", "lora_ga")
HEAD_TAKEN = "{}: the output layer can't have an adapter, log-probs use its frozen weight"
HEAD = "base_model.model.score.weight"  # in the file of a sequence classifier's adapter


class Role(StrEnum):
    """A part that the base can play; also the name of the adapter that plays it."""

    BASE = "base"
    POLICY = "policy"
    REFERENCE = "reference"
    REWARD = "reward"
    VALUE = "value"
    JUDGE = "judge"


SCORING = (Role.REWARD, Role.VALUE, Role.JUDGE)  # have a scalar head; further ones are called reward_2, judge_2 …


class Base:
    """A frozen base with its adapters.

    Attributes:
        lm: the language model, or the sequence classifier that a reward model is trained as; adapters are injected
            into it.
        model: `lm`, or the `PeftModel` around it once an adapter was added.
        tokenizer: with one chat template, one BOS and a pad token.
        origin: where the weights come from.
        template: where the chat template comes from, in words.
        dtype: what matrices are multiplied in; adapters are float32 and cast to it.
        reference: what the reference is made of, in words.
        role: the part being played.
        role_switches: how often the part was changed.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer, origin: Origin, template: str, spec: Model):
        lm.requires_grad_(False)
        lm.eval()
        self._base_parameters = lm.num_parameters()
        self.lm, self.model = lm, lm
        self.tokenizer, self.origin, self.template, self.spec = tokenizer, origin, template, spec
        self.dtype = lm.dtype
        self.reference = "the base with adapters off"
        self.role: str = Role.BASE
        self.role_switches = 0
        self._heads: dict[str, nn.Module] = {}
        self._trained: set[str] = set()

    @property
    def is_classifier(self) -> bool:
        """Whether `lm` gives scores instead of words."""
        return self.lm.get_output_embeddings() is None

    def add_adapter(self, role: str, lora: Lora) -> None:
        """A new trainable adapter. It begins as a no-op, but for `init: loftq`."""
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            self._attach(role, config)
            if lora.init == "loftq":
                original, *_ = load_weights(self.spec, form="original")
                mend_rounding(self.model, original, role)
        except (ValueError, re.error) as error:  # a text is a pattern
            raise UserError(f"lora.targets: {lora.targets} fits no layer of {self.origin.source}: {error}") from None
        self._trained.add(role)
        self._settle(role)
        self._check_head_is_frozen("lora.targets")

    def add_head(self, role: str) -> None:
        """A trainable scalar head that begins at 0, for a value model without a reward model to begin from."""
        head = ScalarHead(self.lm.config.get_text_config().hidden_size, self.lm.device)
        nn.init.zeros_(head.weight)
        self._heads[role] = head

    def load_adapter(self, role: str, folder: str, *, trainable: bool) -> None:
        """A copy of a saved PEFT adapter, its score head included if it has one.

        Args:
            role: a `Role`, or the name of one more adapter that `acting_as` can switch to.

        Raises:
            UserError: the adapter was made for another model, or is of a kind that the roles can't keep apart. Nothing
                of it stays on the base.
        """
        try:
            self._load(role, folder, trainable=trainable)
        except BaseException:
            self._remove(role)
            raise
        if trainable:
            self._trained.add(role)
        self._settle(role)
        self._check_head_is_frozen(folder)

    def _load(self, role: str, folder: str, *, trainable: bool) -> None:
        try:
            config = peft.PeftConfig.from_pretrained(folder)
            if config.peft_type is None:
                raise UserError(f"{folder}: adapter_config.json doesn't say what kind of adapter this is")
            if config.is_prompt_learning:
                raise UserError(f"{folder}: prompt tuning can't share a base between roles; use LoRA")
            if getattr(config, "bias", "none") != "none":
                raise UserError(f"{folder}: an adapter with bias '{config.bias}' changes the base itself; use 'none'")
            init = str(getattr(config, "init_lora_weights", True))
            if init.startswith(_REBASED):
                raise UserError(f"{folder}: a '{init}' adapter needs a base of its own; convert it to plain LoRA")
            config.init_lora_weights = True  # what it began as would be computed, and thrown away
            config.inference_mode = not trainable
            weights = peft.load_peft_weights(folder, device=str(self.lm.device))
            if config.task_type == peft.TaskType.SEQ_CLS and HEAD not in weights:
                raise UserError(f"{folder}: this reward adapter has lost its score head; train it again")
            if HEAD in weights and role.partition("_")[0] not in SCORING:
                raise UserError(f"{folder}: is a reward adapter, which gives scores; expected one that gives answers")
            if self.is_classifier:
                weights.setdefault(HEAD, self.lm.score.weight)  # an SFT adapter has none
            elif HEAD in weights:
                self._heads[role] = _head_of(weights.pop(HEAD)).requires_grad_(trainable)
            if any(f".{self._head_name}." in key for key in weights):  # before it is wrapped: that can't be undone
                raise UserError(HEAD_TAKEN.format(folder))
            self._attach(role, config)
            unused = peft.set_peft_model_state_dict(self.model, weights, adapter_name=role).unexpected_keys
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the adapter's
            raise
        except (KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join((str(error) or repr(error)).splitlines()[:2])
            raise UserError(f"{folder}: this adapter is broken or doesn't fit {self.origin.source}: {reason}") from None
        if unused:
            raise UserError(f"{folder}: this adapter doesn't fit {self.origin.source}: {', '.join(unused[:3])} …")

    def _remove(self, role: str) -> None:
        """Takes an adapter off the base, as much of it as there is."""
        if self.role == role:
            self._switch(Role.BASE)
        if role in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(role)
        self._heads.pop(role, None)

    def load_reference(self, folder: str) -> None:
        """A frozen copy of a saved PEFT adapter as the reference; call after the policy was made."""
        self.load_adapter(Role.REFERENCE, folder, trainable=False)
        self.reference = f"the base with a frozen copy of the adapter {folder}"

    def _attach(self, role: str, config: peft.PeftConfig) -> None:
        """Injects an adapter; the first one is the part being played."""
        kept = [name for name in config.modules_to_save or [] if name not in ("score", "classifier")]
        config.modules_to_save = [*kept, "score"] if self.is_classifier else kept or None
        config.base_model_name_or_path = config.revision = None  # said when it is saved
        config.task_type = peft.TaskType.SEQ_CLS if self.is_classifier else peft.TaskType.CAUSAL_LM
        if self.model is self.lm:
            self.model = peft.get_peft_model(self.lm, config, adapter_name=role)
            self.role = role
        else:
            self.model.add_adapter(role, config)
        if self.is_classifier:
            self._heads[role] = self.lm.score

    def _settle(self, role: str) -> None:
        """A new adapter in float32 (PEFT leaves what it makes in the base's dtype here and there; updates round away in
        16 bits), and every role that is trained trainable again: PEFT freezes all adapters but the active one."""
        for name, parameter in self.model.named_parameters():
            if f".{role}." in name:
                parameter.data = parameter.data.float()
            if any(f".{trained}." in name for trained in self._trained):
                parameter.requires_grad_(True)

    def trained_weights(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of a role's adapter, and of its head if it has one, by name."""
        adapter = {
            name: p for name, p in self.model.named_parameters() if f".{role}." in name and not self.is_classifier
        }
        return adapter | ({"score.weight": self._heads[role].weight} if role in self._heads else {})

    @property
    def adapters(self) -> list[str]:
        """The roles that have an adapter or a head of their own, in the order in which they came."""
        return list(dict.fromkeys([*getattr(self.model, "peft_config", ()), *self._heads]))

    @property
    def held_bytes(self) -> int:
        """Memory of the base's own weights and buffers, 4-bit ones with their scales."""
        ours = {id(p) for role in self.adapters for p in self.trained_weights(role).values()}
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in ours]
        return sum(_bytes_of(tensor) for tensor in tensors)

    @cached_property
    def _head_name(self) -> str | None:
        """The output layer's name; None of a classifier."""
        head = self.lm.get_output_embeddings()
        return next((name for name, module in self.lm.named_modules() if module is head), None)

    def _check_head_is_frozen(self, origin: str) -> None:
        if isinstance(self.lm.get_output_embeddings(), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(HEAD_TAKEN.format(origin))

    @contextmanager
    def acting_as(self, role: str) -> Iterator[PreTrainedModel]:
        """Plays a role; afterwards everything is as it was: the active adapter, `requires_grad`, training modes.

        Only a role that is trained has dropout, and only while gradients are taken; all compute in the same precision.
        Nestable and exception-safe. Yields the language model.
        """
        before = self.role
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [module for module in self.model.modules() if module.training]
        try:
            self._switch(role)
            if role in self._trained and torch.is_grad_enabled():
                _restore(flags)  # PEFT's switch makes all trainable that it activates
            else:
                self.model.eval()
                self.model.requires_grad_(False)
            with torch.autocast(self.lm.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield self.lm
        finally:
            self._switch(before)
            _restore(flags)
            for module in modes:
                module.training = True

    def _switch(self, role: str) -> None:
        if role == self.role or self.model is self.lm:
            return
        self.role_switches += 1
        tuner = self.model.base_model
        if role in self.model.peft_config:
            tuner.enable_adapter_layers()
            self.model.set_adapter(role)
        else:
            tuner.disable_adapter_layers()
        self.role = role

    @torch.no_grad()
    def scores(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What a reward model gives to answers: float32 `(rows,)`, from ids and mask `(rows, length)`, padded on
        either side."""
        with self.acting_as(role) as lm:
            return end_scores(lm, self._heads[role], input_ids, attention_mask)

    def pair_scores(self, role: str, pairs: Sequence[AnsweredPrompt]) -> Tensor:
        """What a reward model gives to the answers of pairs: float32 `(pairs, 2)`, chosen first; with gradients if they
        are enabled and the role is trained."""
        with self.acting_as(role) as lm:
            return pair_scores(lm, self._heads[role], self.batch(pairs, last_token="kept"))

    @torch.no_grad()
    def answer_scores(
        self, role: str, rows: Sequence[AnsweredPrompt], limit: MicroBatchLimit, *, progress: bool = False
    ) -> Tensor:
        """A reward model's scores of many answers, computed in the packed layout that it was trained in.

        Args:
            role: a role with a scalar head.
            rows: prompts with the same number of answers each; the score is read at an answer's last token.
            limit: how much one forward pass takes; it changes memory and speed, and no score.
            progress: whether to show a progress bar.

        Returns:
            float32 `(rows, answers each)` on the CPU, in the order given.
        """
        numbers = {id(row): number for number, row in enumerate(rows)}
        found = torch.zeros(len(rows), len(rows[0].answers))
        with self.packed_attention(), tqdm(total=len(rows), desc="scoring", unit="row", disable=not progress) as bar:
            for some in self.micro_batches(rows, limit):
                found[[numbers[id(row)] for row in some]] = self.pair_scores(role, some).cpu()
                bar.update(len(some))
        return found

    def values(self, states: Tensor) -> Tensor:
        """What the value head makes of hidden states `(tokens, hidden)`: float32 `(tokens,)`."""
        return self._heads[Role.VALUE](states)[:, 0]

    @cached_property
    def padding_reason(self) -> str | None:
        """Why pairs are padded to two rows each instead of packed with their prompt shared; None if they are packed."""
        with torch.no_grad(), self.acting_as(self.role):  # without gradients no adapter has dropout
            return why_not_packed(self.lm)

    @property
    def layout_in_words(self) -> str:
        """How pairs are run, in words."""
        if self.padding_reason:
            return f"twice a pair, padded: {type(self.lm).__name__} {self.padding_reason}"
        return "once a pair, packed without padding"

    def batch(
        self, pairs: Sequence[AnsweredPrompt], *, last_token: Literal["dropped", "kept"] = "dropped"
    ) -> AnswerBatch:
        """Pairs, or prompts with answers, as tensors on the model's device, for `logps` and `heads`, inside
        `packed_attention`."""
        batch = pad(pairs, self.tokenizer.pad_token_id) if self.padding_reason else pack(pairs, last_token=last_token)
        return batch.to(self.lm.device)

    def tokens_taken(self, pair: AnsweredPrompt) -> int:
        """What a pair takes of a forward, in tokens, padding left out but for its own rows'."""
        return len(pair.answers) * len(pair) if self.padding_reason else packed_tokens(pair)

    def micro_batches(self, pairs: Sequence[AnsweredPrompt], limit: MicroBatchLimit) -> list[list[AnsweredPrompt]]:
        """Pairs in groups of like many tokens, for one forward each."""
        return micro_batches(pairs, limit, layout="padded" if self.padding_reason else "packed")

    @contextmanager
    def packed_attention(self) -> Iterator[None]:
        """While open, the model takes what `batch` makes. Backward belongs inside too."""
        with nullcontext() if self.padding_reason else packed_attention(self.lm):
            yield

    def save_adapter(self, role: str, folder: Path) -> None:
        """Writes an adapter into a folder as plain PEFT saves it, with the tokenizer and its chat template; each file
        is written aside and then renamed."""
        config = self.model.peft_config[role]
        config.base_model_name_or_path, config.revision = self.origin.source, self.origin.hub_revision
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            self.model.save_pretrained(aside, selected_adapters=[role], save_embedding_layers=False)
            saved = Path(aside) / role
            save_tokenizer(self.tokenizer, saved)
            for file in saved.iterdir():
                file.replace(folder / file.name)

    def lineage(self, stage: str, parent: str | None = None) -> Lineage:
        """What an adapter that is trained here has to be used with."""
        config = json.loads((self.origin.folder / "config.json").read_text(encoding="utf-8"))
        for key in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
            config.pop(key, None)
        tokenizer, spec = self.tokenizer, self.spec
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
        return Lineage(
            stage=stage,
            base=spec.base,
            revision=self.origin.revision,
            config_hash=digest(json.dumps(config, sort_keys=True)),
            tokenizer_hash=digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
            special_tokens={name: str(token) for name, token in special.items() if token is not None},
            template=self.template,
            template_hash=digest(tokenizer.get_chat_template() + json.dumps(spec.chat_template_kwargs, sort_keys=True)),
            quantization=spec.quantization,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            parent=parent,
            parent_hash=parent and adapter_hash(parent),
        )

    @property
    def precision(self) -> str:
        """What is computed in, and where, in words."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.lm.device.type}"

    def count_parameters(self) -> tuple[int, int]:
        """(those that are trained, those of the base), where two 4-bit weights in a byte count as two."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad), self._base_parameters


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        parameter.requires_grad_(wanted)


def _bytes_of(tensor: Tensor) -> int:
    """Of a tensor and, if it is a 4-bit one, of its scales."""
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.code]
    if state is not None and state.nested:
        scales += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in (tensor, *scales))


def _head_of(weight: Tensor) -> ScalarHead:
    head = ScalarHead(weight.shape[1], weight.device).requires_grad_(False)
    head.weight.data = weight.float()
    return head


def load(spec: Model, form: Form = "held") -> Base:
    """The base of a recipe as a language model, ready for adapters.

    Raises:
        UserError: it can't be found, fetched or read.
    """
    lm, tokenizer, origin = load_weights(spec, form=form)
    template = prepare_tokenizer(tokenizer, spec.chat_template)
    lm.config.pad_token_id = lm.generation_config.pad_token_id = tokenizer.pad_token_id
    if form == "held":
        check_head(lm)
    return Base(lm, tokenizer, origin, template, spec)


def load_classifier(spec: Model, form: Form = "held") -> Base:
    """The base of a recipe as a sequence classifier with one label, for training a reward model. Its float32 head is
    drawn from PyTorch's generator.

    Raises:
        UserError: it can't be found, fetched or read, or its family has no such class.
    """
    lm, tokenizer, origin = load_weights(spec, classifier=True, form=form)
    if not isinstance(getattr(lm, "score", None), nn.Linear):
        raise UserError(f"model.base: {type(lm).__name__} has no 'score' head, so it can't be a reward model here")
    template = prepare_tokenizer(tokenizer, spec.chat_template)
    tokenizer.pad_token = pad_for_scores(tokenizer, spec.chat_template_kwargs)
    lm.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    lm.score = ScalarHead(lm.score.in_features, lm.device)
    return Base(lm, tokenizer, origin, template, spec)
