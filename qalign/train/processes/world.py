"""The processes of a run as a `World`: one alone, or several that share the micro-batches of each optimiser step.

With several, what a step computes is dealt out, gradients are summed once, and all processes take the same decisions
from the same figures. Only the first one writes. Imports torch when processes connect.
"""

import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

from qalign.errors import UserError
from qalign.train.processes.launch import Launch
from qalign.train.processes.meeting import Meeting
from qalign.train.processes.watch import BEAT, SILENCE, Member, ProcessEnded

T = TypeVar("T")
Found = TypeVar("Found")

LONGEST_WAIT = timedelta(days=7)  # for a slow process; `Watch` notices one that is gone


def deal(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Deals out things of these sizes evenly: the numbers of those for each process, in ascending order."""
    from qalign.data.collate import split_evenly

    return [sorted(numbers) for numbers in split_evenly(sizes, processes)]


class World:
    """One process alone. With several, `Processes` does the same over all of them.

    Attributes:
        rank, size: the number of this process, from 0 on, and how many there are.
        local_rank, local_size: the same among those of this host.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def in_words(self) -> str:
        """How many there are, for the header; empty for one."""
        return ""

    @property
    def me(self) -> str:
        """This process in words."""
        return str(Member.me(self.rank))

    def connect(self, facts: dict[str, Any], go_on: str) -> None:
        """Waits for the other processes, and compares what must be the same in all: `facts` by name. `go_on` is the
        command that goes on after one was lost. Processes that are connected already only compare."""

    def check(self, wait: float = 0.0) -> None:
        """Raises `ProcessEnded` if another process has ended, or is found to have within `wait` seconds."""

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        return [value]

    def merged(self, own: Iterable[tuple[int, T]]) -> list[T]:
        """The values of all processes in the order of their numbers; `own` has (number, value) of this one's."""
        return [value for _, value in sorted(chain(*self.gathered([*own])), key=lambda pair: pair[0])]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here. If it fails in any process because of the user's input, or for lack of memory, the
        same error is raised in all."""
        return work()

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, which alone does it."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns, done on each host by one process before the others: so that these find in the cache
        what that one left there."""
        return work()

    def same(self, facts: dict[str, Any]) -> None:
        """Raises a `UserError` that names a process whose `facts` differ from those of the first one."""

    def mine(self, groups: Sequence[T], sizes: Sequence[int]) -> list[tuple[int, T]]:
        """Of micro-batches (or prompts) those that this process runs, with their numbers; `sizes` are their tokens."""
        return [*enumerate(groups)]

    def idle(self, sizes: Sequence[int]) -> int:
        """How many micro-batches of these sizes another process runs beyond those of this one (`mine`)."""
        return 0

    def summed(self, total: Any, learning: Callable[[], Sequence[Any]], scaler: Any = None) -> Any:
        """The sum of the scalar tensor `total` over all processes. The gradients of the weights that are `learning`
        become their sums too; a weight that has none anywhere is left without one. `scaler` is float16's `GradScaler`,
        which a process that ran no micro-batch must have used too before it can clip."""
        return total

    def copied(self, weights: Sequence[Any]) -> None:
        """Gives these weights the values that they have in the first process."""

    def leave(self) -> None:
        """Waits for the others at the end of the work, and leaves them."""

    def fail(self, lines: Iterable[str], code: int, dead: int | None = None) -> int:
        """Says `lines`, once over all processes, and ends the others. Returns the exit code. `dead` is the rank of the
        process whose sudden end is the reason."""
        print(*lines, sep="\n", file=sys.stderr)
        return code


ALONE = World()


class Processes(World):
    """Several processes, connected through torch.distributed: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, launch: Launch):
        self.rank, self.size = launch.rank, launch.size
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        self._meeting = Meeting(launch)

    @property
    def in_words(self) -> str:
        hosts = len({member.host for member in self._meeting.members.values()})
        return f"{self.size} processes{f' on {hosts} hosts' if hosts > 1 else ''}"

    def connect(self, facts: dict[str, Any], go_on: str) -> None:
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return self.same(facts)
        self._meeting.hint = go_on
        self._meeting.gather()
        self.same(facts)
        options: dict[str, Any] = {
            "backend": "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            "store": self._meeting.store_for("group"),
            "timeout": LONGEST_WAIT,
        }
        self._together(lambda: dist.init_process_group(rank=self.rank, world_size=self.size, **options))

    def same(self, facts: dict[str, Any]) -> None:
        self._meeting.compare(facts)

    def check(self, wait: float = 0.0) -> None:
        self._meeting.check(wait)

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` returns, in which processes wait for each other; `ProcessEnded` if one is gone."""
        self.check()
        try:
            return work()
        except RuntimeError:
            self.check(SILENCE + BEAT)
            raise

    def gathered(self, value: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(found, value))
        return found

    def agreed(self, work: Callable[[], T]) -> T:
        import torch

        from qalign.model.memory.first_step import is_out_of_memory

        found: Any = None
        failed: tuple[str, tuple[str, ...]] | None = None
        try:
            found = work()
        except UserError as error:
            failed = "user", error.lines
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = "memory", (str(error),)
        # Out here the traceback is gone, whose frames hold the activations.
        for other in self.gathered(failed):
            if other:
                raise UserError(*other[1]) if other[0] == "user" else torch.OutOfMemoryError(*other[1])
        return found

    def first(self, work: Callable[[], T]) -> T:
        found: Any = self.agreed(lambda: work() if self.is_first else None)
        return self.gathered(found)[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        found: Any = self.agreed(lambda: work() if self.local_rank == 0 else None)
        return self.agreed(lambda: found if self.local_rank == 0 else work())

    def mine(self, groups: Sequence[T], sizes: Sequence[int]) -> list[tuple[int, T]]:
        return [(number, groups[number]) for number in deal(sizes, self.size)[self.rank]]

    def idle(self, sizes: Sequence[int]) -> int:
        counts = [len(numbers) for numbers in deal(sizes, self.size)]
        return max(counts) - counts[self.rank]

    def summed(self, total: Any, learning: Callable[[], Sequence[Any]], scaler: Any = None) -> Any:
        import torch
        import torch.distributed as dist

        if scaler is not None:
            scaler.scale(total.detach())
        weights = learning()
        has = [any(column) for column in zip(*self.gathered([w.grad is not None for w in weights]), strict=True)]
        weights = [weight for weight, there in zip(weights, has, strict=True) if there]
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([*(grad.flatten() for grad in grads), total.detach().float().reshape(1)])
        self._together(lambda: dist.all_reduce(flat))
        *sums, whole = flat.split([*(grad.numel() for grad in grads), 1])
        for weight, found in zip(weights, sums, strict=True):
            weight.grad = found.view_as(weight)
        return whole[0].to(total)

    def copied(self, weights: Sequence[Any]) -> None:
        import torch.distributed as dist

        for weight in weights:
            self._together(lambda weight=weight: dist.broadcast(weight.data, src=0))

    def leave(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            self.gathered(None)
            self._meeting.leave()
            dist.destroy_process_group()

    def fail(self, lines: Iterable[str], code: int, dead: int | None = None) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):  # a launcher stops the others once one has ended
            signal.signal(number, signal.SIG_IGN)
        try:
            if code > 128:  # one that was killed may be why the launcher stops this one
                self._meeting.check(2 * BEAT)
        except ProcessEnded as end:
            return self._meeting.end(end)
        return self._meeting.end(ProcessEnded(code, lines, dead))


_current: World = ALONE


def world_of(launch: Launch | None) -> World:
    """The processes that a launcher started; without one, this process alone."""
    return Processes(launch) if launch else ALONE


@contextmanager
def entered(world: World) -> Generator[None]:
    """Within the block, `current` is this world."""
    global _current
    before, _current = _current, world
    try:
        yield
    finally:
        _current = before


def current() -> World:
    """The processes that this one works with."""
    return _current


def dealt(things: Sequence[T], work: Callable[[T], Found]) -> Iterator[Found]:
    """What `work` returns for each of many things, in their order. Each process does one at a time, as a process alone
    does it, and all get all."""
    world = current()
    for start in range(0, len(things), world.size):
        round_of = things[start : start + world.size]

        def own(round_of: Sequence[T] = round_of) -> list[tuple[int, Found]]:
            with entered(ALONE):
                return [(number, work(thing)) for number, thing in enumerate(round_of) if number == world.rank]

        yield from world.merged(world.agreed(own))
