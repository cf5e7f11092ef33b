"""Whether a model can run packed rows, found by running some, and the switch to them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qalign.data.collate import Layout, pack
from qalign.data.store.sequences import TokenPair
from qalign.model.logps import backbone
from qalign.model.memory.shard import restart
from qalign.model.packing.attention import NAME, UnservedAttention
from qalign.model.packing.mixers import PROBE_TOKENS, Mixers, find_mixers

# Kinds of layers whose attention is over all tokens or over a window. (Others choose the keys by their number or by
# their content, which a short trial can't show.)
_ATTENTION = {"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"}


_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Packing:
    """How a model runs packed rows."""

    mixers: Mixers = field(default_factory=Mixers)
    reason: str | None = None  # why it can't, in words
    _ways: list[ExitStack] = field(default_factory=list, compare=False, repr=False)  # back, of each `open`

    @contextmanager
    def open(self, lm: PreTrainedModel) -> Iterator[None]:
        """Makes the model run packed rows, and nothing else, while it is open. The backward must run inside too, as
        gradient checkpointing computes the forward again."""
        with ExitStack() as way:
            self._go(lm, way)
            self._ways.append(way)
            try:
                yield
            except BaseException:
                restart(lm)
                raise
            finally:
                self._ways.remove(way)

    @contextmanager
    def left(self, lm: PreTrainedModel) -> Iterator[None]:
        """Leaves `open` for a while, as sampling runs plain rows. No backward may be pending."""
        ways = self._ways[:]
        for way in reversed(ways):
            way.close()
        try:
            yield
        finally:
            for way in ways:
                self._go(lm, way)

    def _go(self, lm: PreTrainedModel, way: ExitStack) -> None:
        way.callback(lm.set_attn_implementation, lm.config.get_text_config()._attn_implementation or "eager")
        lm.set_attn_implementation(NAME)
        way.enter_context(self.mixers.on_rows())


@torch.no_grad()
def packing_of(lm: PreTrainedModel) -> Packing:
    """How a model can run packed rows.

    Its modules that mix tokens without attention are found, and packed pairs are run: an answer must have the hidden
    states of a row of its own. ALiBi fails, as it measures distances in the row instead of positions.
    """
    # From 1: the first id may be the padding, whose embedding is 0.
    ids = [number * (lm.config.get_text_config().vocab_size - 1) // 30 for number in range(1, 31)]
    prompt, one, other, end = ids[:12], ids[12:20], ids[20:28], ids[28:]
    probe = Layout(((PROBE_TOKENS, ()),))
    alone = torch.tensor([prompt + end[:1]], device=lm.device)
    try:
        expected = backbone(lm)(input_ids=alone, use_cache=False).last_hidden_state[0, -1]
        with Packing().open(lm):
            mixers = find_mixers(lm, probe, alone[:, :PROBE_TOKENS])
    except UnservedAttention as error:
        return Packing(reason=str(error))
    except _ERRORS as error:
        return Packing(reason=f"can't run packed rows ({' '.join(str(error).split())[:100]})")
    # Rounding to 16 bits moves hidden states by 1 to 3%; seeing a neighbour moved SmolLM2's by 27 to 36%.
    most = (1e-3 if torch.finfo(lm.dtype).eps < 1e-4 else 0.1) * expected.float().norm()
    for packing in map(Packing, mixers):
        try:
            states = [_answer_state(lm, packing, prompt, first, end) for first in (one, other)]
        except _ERRORS:
            continue
        if all((state - expected).float().norm() <= most for state in states):
            reason = _unseen(lm, probe)
            return Packing(reason=reason) if reason else packing
    if found := str(mixers[0]):
        return Packing(reason=f"mixes tokens in {found}, which packed rows don't serve")
    return Packing(reason="gives an answer other hidden states than it has in a row of its own")


def _answer_state(lm: PreTrainedModel, packing: Packing, prompt: list[int], first: list[int], end: list[int]) -> Tensor:
    """The hidden state of the first token of the answer `end`, packed behind `prompt` beside the answer `first`."""
    batch = pack([TokenPair(prompt, first, end, "")]).to(lm.device)
    with packing.open(lm):
        return backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state[0, batch.last_tokens[1]]


def _unseen(lm: PreTrainedModel, probe: Layout) -> str | None:
    """Why rows longer than a trial may differ, from the config and from what attention asked for in the trial."""
    config = lm.config.get_text_config()
    kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
    used = {kinds.get(getattr(module, "layer_idx", -1), "attention") for module, _ in probe.calls}
    if others := used - _ATTENTION:
        return f"has attention of another kind ({', '.join(sorted(others))})"
    slides = "sliding_attention" in (kinds.values() or ["sliding_attention"])
    slides &= bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    windows = {window for _, window in probe.calls}
    return "doesn't pass its sliding window on" if slides and config.sliding_window not in windows else None
