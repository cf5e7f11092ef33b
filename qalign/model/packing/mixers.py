"""Layers that mix tokens without attention (linear attention, state spaces, short convolutions), inside packed rows.

A row stays packed everywhere but in these modules: there, each whole sequence, a prompt with one of its answers, stands
in a row of its own. Their inputs are gathered from the packed row and their output is scattered back into it, so they
need neither states nor masks. They are found by trial, not by name.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalign.data.collate import Layout
from qalign.model.logps import backbone
from qalign.model.memory.shard import gathered

PROBE_TOKENS = 11  # a prime, so that no other dimension is taken for the tokens

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Mixers:
    """The modules of a model that mix tokens, apart from attention through transformers' interface."""

    modules: tuple[nn.Module, ...] = ()
    informed: tuple[nn.Module, ...] = ()  # modules that are given `layout=`, also when they are computed again

    def __str__(self) -> str:
        return ", ".join(sorted({type(module).__name__ for module in self.modules}))

    @contextmanager
    def on_rows(self) -> Iterator[None]:
        """Runs these modules on a row for each sequence while it is open. The backward must run inside too, as gradient
        checkpointing computes the forward again."""
        current: list[Layout] = []

        def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current[:] = [kwargs["layout"]] if kwargs.get("layout") else current

        def split(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
            if not current:
                raise ValueError(f"{type(module).__name__} needs a packed batch; leave `packed_attention` for others")
            (layout,) = current
            kwargs = {name: value for name, value in kwargs.items() if name != "layout"}
            return _mapped(lambda t: t[0][layout.sequences(t.device)[0]], (1, layout.tokens), (args, kwargs))

        def join(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
            (layout,) = current
            rows, _ = layout.sequences(torch.device("cpu"))
            return _mapped(lambda t: t.flatten(0, 1)[layout.sequences(t.device)[1]][None], tuple(rows.shape), output)

        with ExitStack() as hooks:
            for module in self.informed if self.modules else ():
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            for module in self.modules:
                hooks.callback(module.register_forward_pre_hook(split, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(join, with_kwargs=True).remove)
            yield


def _mapped(change: Callable[[Tensor], Tensor], shape: tuple[int, ...], value: Any) -> Any:
    """Changes the tensors of this batch size and length, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value) if value.shape[:2] == shape and value.dim() > 1 else value
    if isinstance(value, dict):
        return {name: _mapped(change, shape, inner) for name, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, shape, inner) for inner in value)
    return value


@torch.no_grad()
def find_mixers(lm: PreTrainedModel, layout: Layout, ids: Tensor) -> list[Mixers]:
    """Finds the modules that mix tokens, by changing the first token of what each is given: the innermost ones, then
    ever larger ones around these, for models in which something between them mixes too.

    To be called where the model runs packed rows, with one of `PROBE_TOKENS` tokens: `layout`, int64 ids `(1, tokens)`.
    """
    calls: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = args, kwargs

    with ExitStack() as hooks:
        for module in backbone(lm).modules():
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        backbone(lm)(input_ids=ids, position_ids=layout.positions().to(ids.device), layout=layout, use_cache=False)
    attention = {module for module, _ in layout.calls}
    around, known = dict[nn.Module, nn.Module](), dict[Any, bool]()

    def visit(module: nn.Module) -> list[nn.Module]:
        """The innermost modules that mix; notes what is around each module that has no attention in it."""
        parts = list(_called(module, calls))
        found = [mixer for part in parts for mixer in visit(part)]
        if not attention.intersection(module.modules()):
            around.update(dict.fromkeys(parts, module))
            kind = tuple((name, type(inner)) for name, inner in module.named_modules())  # alike modules do alike
            if not found and kind not in known:
                known[kind] = _mixes(module, *calls[module])
            return found or [module] * known[kind]
        return found

    informed = tuple(module for module, (_, kwargs) in calls.items() if kwargs.get("layout"))
    mixers = tuple(mixer for part in _called(backbone(lm), calls) for mixer in visit(part))
    options = [Mixers(mixers, informed)]
    while (wider := tuple(dict.fromkeys(around.get(module, module) for module in mixers))) != mixers:
        options.append(Mixers(mixers := wider, informed))
    return options


def _called(module: nn.Module, calls: dict[nn.Module, _Call]) -> Iterator[nn.Module]:
    """The nearest modules within a module that its forward calls."""
    for child in module.children():
        yield from [child] if child in calls else _called(child, calls)


def _mixes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether later outputs of a module depend on its first token."""
    shape = (1, PROBE_TOKENS)

    def other(states: Tensor) -> Tensor:
        return torch.cat([-3 * states[:, -1:], states[:, 1:]], dim=1) if states.is_floating_point() else states

    try:
        changed_args, changed_kwargs = _mapped(other, shape, (args, kwargs))
        with gathered(module):
            outputs = module(*args, **kwargs), module(*changed_args, **changed_kwargs)
    except (AssertionError, TypeError, ValueError, RuntimeError):
        return False  # whether packed rows are exact is checked on the whole model
    before, after = (output[0] if isinstance(output, tuple) else output for output in outputs)
    if not isinstance(before, Tensor) or before.shape[:2] != shape or not before.is_floating_point():
        return False
    # Another kernel for another number of tokens, as experts have it, moves an output by 1% in bfloat16.
    moved = max(1e-4, 4 * torch.finfo(before.dtype).eps)
    return bool((before - after)[:, 1:].abs().max() > moved * before.abs().max())
