"""Scores of reward models: of one adapter with its head, or of the members of an ensemble in one forward pass.

The members' adapters are on the last layers. The layers below compute the same for all of them and run once. Before the
first layer with adapters the row is repeated, once for each member, and the layers from there on add to each part of it
the adapter of its member (`AddedLora.route`): weights are dequantised and kernels launched once for all members.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qalign.config.stages import Reward, Stage
from qalign.data import collate
from qalign.data.collate import AnswerBatch, AnsweredPrompt, Layout, MicroBatchLimit
from qalign.data.store.sequences import TokenPair
from qalign.model import lineage
from qalign.model.adapters.targets import decoder_layers
from qalign.model.logps import backbone

if TYPE_CHECKING:
    from qalign.model.base import Base

_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


class Ensemble:
    """Reward adapters on one base that score the same answers.

    Attributes:
        roles: of the members, in their order.
        reason: why each member needs a forward pass of its own, in words; None if they share one.
    """

    def __init__(self, base: "Base", roles: Sequence[str]):
        self.base, self.roles = base, tuple(roles)
        self._layers: list[nn.Module] = []  # from the first one with an adapter
        self._shape: tuple[int, ...] = ()  # (rows, tokens) of the batch as the first of them is given it
        self._layout: Layout | None = None  # of the repeated row
        self.reason = self._why_apart()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lets the members share forward passes while it is open. The backward belongs inside too, as gradient
        checkpointing computes the forward again."""
        if self.reason:
            yield
            return
        with self.base.routed(self.roles), ExitStack() as hooks:
            for layer in self._layers:
                # Before other hooks of the layer, such as one that notes the layout.
                hook = layer.register_forward_pre_hook(self._repeat, with_kwargs=True, prepend=True)
                hooks.callback(hook.remove)
            yield

    def pair_scores(self, rows: Sequence[AnsweredPrompt]) -> Tensor:
        """The members' scores, float32 `(rows, answers each, members)`, with gradients if they are enabled. Call it
        inside `base.packed_attention` and `open`."""
        if self.reason:
            return torch.stack([self.base.pair_scores(role, rows) for role in self.roles], dim=-1)
        batch = self.base.batch(rows, last_token="kept")
        with self.base.acting_as(self.roles[0]) as lm:
            states = self._last_states(lm, batch)
            scores = [self.base.head_scores(role, own) for role, own in zip(self.roles, states, strict=True)]
        return torch.stack(scores, dim=-1).view(*batch.lengths.shape, len(self.roles))

    def _last_states(self, lm: PreTrainedModel, batch: AnswerBatch) -> list[Tensor]:
        """Each member's hidden states of the answers' last tokens, `(answers, hidden)`."""
        hidden = backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return [hidden[start + batch.last_tokens] for start in range(0, len(hidden), batch.input_ids.numel())]

    def _repeat(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer is given, for all members behind one another: tokens of a packed row, rows of a padded batch."""
        if layer is self._layers[0]:
            self._shape = tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])
            layout: Layout | None = kwargs.get("layout")
            self._layout = layout and Layout(layout.groups * len(self.roles))
        return self._repeated(args), self._repeated(kwargs)

    def _repeated(self, value: Any) -> Any:
        if isinstance(value, Layout):
            return self._layout
        if isinstance(value, dict):
            return {name: self._repeated(inner) for name, inner in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._repeated(inner) for inner in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        packed = self._layout is not None
        if tuple(value.shape[:2]) == self._shape if packed else len(value) == self._shape[0]:
            times = (1, len(self.roles)) if packed else (len(self.roles),)
            return value.repeat(*times, *[1] * (value.dim() - len(times)))
        return value

    def _why_apart(self) -> str | None:
        layers, adapted = decoder_layers(self.base.lm), self.base.routes(self.roles)
        if layers is None:
            return "its layers don't stand in one list"
        if not adapted:
            return "the adapters are more than LoRA on linear layers, or differ in shape"
        holds = [not set(adapted).isdisjoint(layer.modules()) for layer in layers]
        if set(adapted) - {module for layer in layers for module in layer.modules()}:
            return "adapters are outside of the layers"
        self._layers = list(layers)[holds.index(True) :]
        try:
            return None if self._is_exact() else "members in one pass don't have the states that each has alone"
        except _ERRORS as error:
            return f"can't run the members in one pass ({' '.join(str(error).split())[:100]})"

    @torch.no_grad()
    def _is_exact(self) -> bool:
        """Whether the members have the same states in one pass as each alone, on a few tokens."""
        base, self.reason = self.base, None
        # From 1: the first id may be the padding, whose embedding is 0.
        ids = [number * (base.lm.config.get_text_config().vocab_size - 1) // 30 for number in range(1, 31)]
        rows = [TokenPair(ids[:8], ids[8:14], ids[14:17], ""), TokenPair(ids[17:20], ids[20:27], ids[27:], "")]
        batch = base.batch(rows, last_token="kept")
        with base.packed_attention():
            alone = [self._alone(role, batch) for role in self.roles]
            with self.open(), base.acting_as(self.roles[0]) as lm:
                together = self._last_states(lm, batch)
        # Rounding to 16 bits moves hidden states by 1 to 3%.
        most = 1e-3 if torch.finfo(base.dtype).eps < 1e-4 else 0.1
        pairs = zip(together, alone, strict=True)
        return all((one - other).float().norm() <= most * other.float().norm() for one, other in pairs)

    def _alone(self, role: str, batch: AnswerBatch) -> Tensor:
        with self.base.acting_as(role) as lm:
            return self._last_states(lm, batch)[0]


def load_rewards(base: "Base", key: str, role: str, folders: Sequence[Path]) -> "str | Ensemble":
    """Puts a reward adapter on a base as `role`, or the members of an ensemble as `role_member_1` and so on. Returns
    what `answer_scores` takes; a `UserError` that begins with `key` if one of them doesn't fit the base."""
    roles = [role] if len(folders) == 1 else [f"{role}_{folder.name}" for folder in folders]
    for own, folder in zip(roles, folders, strict=True):
        lineage.check(key, folder, base.lineage("reward"))
        base.load_adapter(own, str(folder), trainable=False)
    return role if len(roles) == 1 else Ensemble(base, roles)


def member_roles(settings: Stage) -> tuple[str, ...]:
    """The roles of the ensemble that a stage trains, which are the names of their folders too; empty without one."""
    count = settings.members if isinstance(settings, Reward) else 1
    return tuple(f"member_{number}" for number in range(1, count + 1)) if count > 1 else ()


def places(roles: Sequence[str], folder: Path) -> dict[str, Path]:
    """Where each role's adapter is saved: in the folder, or in one of its own for each member of an ensemble."""
    return {role: folder if len(roles) == 1 else folder / role for role in roles}


@torch.no_grad()
def answer_scores(
    base: "Base",
    of: str | Ensemble,
    rows: Sequence[AnsweredPrompt],
    limit: MicroBatchLimit,
    *,
    progress: bool = False,
    mine: Callable[..., list[tuple[int, Any]]] = lambda groups, sizes: [*enumerate(groups)],
) -> Tensor:
    """Scores of many answers, by one reward model or an ensemble, computed in the packed layout that it was trained in:
    float32 `(rows, answers each)`, of an ensemble `(rows, answers each, members)`, on the CPU, in the order given.

    Args:
        of: the reward model's role, or the ensemble.
        rows: prompts with the same number of answers each; the score is read at an answer's last token.
        limit: how much one forward pass takes; it changes memory and speed, and no score.
        mine: which micro-batches are run, `World.mine`; by default all. The scores of others are 0.
    """
    score: Callable[[Sequence[AnsweredPrompt]], Tensor]
    rows = [*rows]
    shape, opened = [len(rows), len(rows[0].answers)], nullcontext()
    if isinstance(of, str):
        score = partial(base.pair_scores, of)
    else:
        shape, opened, score = [*shape, len(of.roles)], of.open(), of.pair_scores
        count = 1 if of.reason else len(of.roles)  # that go through the last layers side by side
        limit = MicroBatchLimit(-(-limit.pairs // count), -(-limit.tokens // count), limit.longest)
    numbers, found = {id(row): number for number, row in enumerate(rows)}, torch.zeros(shape)
    with (
        base.packed_attention(),
        opened,
        tqdm(total=len(rows), desc="scoring", unit="row", disable=not progress) as bar,
    ):
        parts = [some for group in collate.in_groups(rows) for some in base.micro_batches(group, limit)]
        for _, some in mine(parts, [sum(map(base.tokens_taken, some)) for some in parts]):
            found[[numbers[id(row)] for row in some]] = score(some).cpu()
            bar.update(len(some))
    return found
