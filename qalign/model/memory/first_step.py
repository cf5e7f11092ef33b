"""What happens where memory runs out: the first optimiser step of a run is repeated with smaller micro-batches."""

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from qalign.data.collate import MicroBatchLimit

Found = TypeVar("Found")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: cuBLAS, the driver and bitsandbytes raise errors of their own."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "cublas_status_alloc_failed" in said


class FirstStep:
    """Repeats the first step of a run where memory runs out, each time with half as much at once, down to the longest
    row; which micro-batches a step is made of changes no number. Whoever splits rows by the same `limit` goes on with
    smaller ones too. Later steps end with PyTorch's error.

    Attributes:
        done: whether the first step was taken; `step` may set it, once it can't be repeated.
    """

    def __init__(self, limit: MicroBatchLimit):
        self.limit, self.done = limit, False

    def run(
        self,
        step: Callable[[], Found],
        sizes: Sequence[int],
        undo: Callable[[], object],
        owner: Any,
        counters: Sequence[str],
    ) -> Found:
        """What `step` returns. Before it is repeated, random numbers and counters are as before.

        Args:
            step: forward and backward of all micro-batches.
            sizes: the number of tokens of each of its rows.
            undo: drops the gradients of the half-done step.
            owner: its attributes `counters` are what the micro-batches of a step change.
        """
        before = None if self.done else (_random_state(), _copied(owner, counters))
        while True:
            try:
                found = step()
            except RuntimeError as error:
                if self.done or before is None or not is_out_of_memory(error) or not self.limit.halve(sizes):
                    raise
            else:
                self.done = True
                return found
            # Out here the traceback is gone, whose frames hold the activations.
            undo()
            free_unused()
            tqdm.write(f"out of memory in the first step: it goes on with {self.limit}, which changes no number")
            _set_random_state(before[0])
            vars(owner).update(copy.deepcopy(before[1]))


def free_unused() -> None:
    """Frees what nothing refers to any more, and the memory that PyTorch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _copied(owner: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(owner, name)) for name in names}


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """PyTorch's random numbers on the CPU and the current GPU, from which dropout draws."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)
