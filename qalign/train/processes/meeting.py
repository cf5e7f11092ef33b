"""Where the processes of a run meet: a store of torch.distributed, in which each says where it is and how it ends."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

from qalign.errors import UserError, short
from qalign.train.processes.launch import Launch
from qalign.train.processes.watch import BEAT, SILENCE, Member, ProcessEnded, Watch, read_end, write_end

MEET = 600.0  # seconds to wait for the others to start
LATE, LINGER = 60.0, 12.0  # and, at the end, to reach them and for them to end


class Meeting:
    """This process among the others.

    Attributes:
        members: all processes, by their ranks; empty until `gather`.
        watch: from then on.
        hint: what to do after a process was lost, in words.
    """

    hint = ""

    def __init__(self, launch: Launch):
        self.launch, self.me, self.members = launch, Member.me(launch.rank), dict[int, Member]()
        self.watch: Watch | None = None
        self._store: Any = None
        self._spare: Any = None
        self._compared, self._stderr = 0, sys.stderr  # which is silent in all but the first process

    @property
    def store(self) -> Any:
        """The connection of the main thread."""
        return self._connected(MEET)

    def _connected(self, seconds: float) -> Any:
        if self._store is None:
            keeps = self.launch.rank == 0 and not self.launch.launcher_listens
            self._store = self._open(seconds, keeps=keeps)
        return self._store

    def _open(self, seconds: float, *, keeps: bool = False) -> Any:
        """A new connection to the store, which this process `keeps` itself or not; a `UserError` if there is none
        within so many seconds."""
        dist: Any = import_module("torch.distributed")  # its stores are documented, but not exported for type checkers
        launch, options = self.launch, {"wait_for_workers": False, "timeout": timedelta(seconds=seconds)}
        try:
            store = dist.TCPStore(launch.address, launch.port, None, keeps, **options)
        except RuntimeError as error:
            where, why = f"{launch.address}:{launch.port}", str(error).partition("\n")[0]
            raise UserError(f"{self.me} can't reach the others at {where}: {short(why)}") from None
        return dist.PrefixStore(f"qalign/{launch.attempt}", store)

    def gather(self) -> None:
        """Waits until all processes are there, and watches them from now on."""
        launch, began = self.launch, time.monotonic()
        self.store.set(f"here/{launch.rank}", json.dumps([self.me.host, self.me.pid]))
        for rank in range(launch.size):
            while not self.store.check([f"here/{rank}"]):
                self.raise_ended()
                if time.monotonic() - began > MEET:
                    raise UserError(f"process {rank} of {launch.size} didn't start within {MEET:.0f} s")
                time.sleep(0.1)
            self.members[rank] = Member(rank, *json.loads(self.store.get(f"here/{rank}")))
        others = [member for member in self.members.values() if member.rank != launch.rank]
        self._spare = self._open(SILENCE)
        self.watch = Watch(self._spare, self.me, others, self.exit_now)

    def compare(self, facts: dict[str, Any]) -> None:
        """Raises a `UserError`, the same in all processes, that names one whose facts differ from the first one's."""
        self._compared += 1
        key, given = f"facts/{self._compared}", list[dict[str, Any]]()
        self.store.set(f"{key}/{self.launch.rank}", json.dumps(facts, default=str))
        for rank in range(self.launch.size):
            while not self.store.check([f"{key}/{rank}"]):
                self.check()
                time.sleep(0.02)
            given.append(json.loads(self.store.get(f"{key}/{rank}")))
        for rank, other in enumerate(given):
            for name in {**given[0], **other}:
                one, there = given[0].get(name), other.get(name)
                if one != there:
                    of = f"{self.members[rank]}: its {name} is {short(there)}"
                    raise UserError(f"{of}, that of process 0 is {short(one)}; it must be the same in all processes")

    def check(self, wait: float = 0.0) -> None:
        """Raises `ProcessEnded` if another process has ended, or is found to have within `wait` seconds."""
        if self.watch:
            self.watch.check(wait)

    def raise_ended(self) -> None:
        """The same before there is a `watch`, for those that said why."""
        for rank in range(self.launch.size):
            if rank != self.launch.rank and self.store.check([key := f"end/{rank}"]):
                raise read_end(self.store.get(key))

    def store_for(self, what: str) -> Any:
        """The store with names of their own for what else is kept there."""
        return import_module("torch.distributed").PrefixStore(what, self.store)

    def leave(self) -> None:
        """Ends without an error, as all others do."""
        if self.watch:
            self.watch.stop()
        self.store.set(f"left/{self.launch.rank}", "")
        if self.launch.rank == 0:
            self._linger(None)

    def end(self, end: ProcessEnded) -> int:
        """Tells the others why this process ends, and says it unless another one does. Returns the exit code."""
        if self.watch:
            self.watch.stop()
        sayer = next(rank for rank in range(self.launch.size) if rank != end.dead and not self._is_gone(rank))
        says, answers, heard = sayer == self.launch.rank, False, False
        if says:
            self._say(end)
        with suppress(Exception):  # the store ends with the process that keeps it
            if not (self.watch and self.watch.is_stuck):
                store = self._connected(LATE)
                store.check(["said"])  # fails where the store is gone; `set` doesn't, as it waits for no answer
                store.set(f"end/{self.launch.rank}", write_end(end))
                # If the store goes from now on, the process that keeps it had waited for this one, and has said it.
                answers = heard = True
                if says:
                    store.set("said", "")
                else:
                    # One on a host that was lost says nothing; if only another process was, it has said it by now.
                    seconds = 2 * BEAT if sayer in self._lost_with(end.dead) else LINGER
                    heard = self._within(seconds, lambda: store.check(["said"]))
        if says:
            self._linger(end.dead, answers=answers)
        elif not (heard if answers else self._is_here(sayer)):
            self._say(end)
        return end.code

    def exit_now(self, end: ProcessEnded) -> None:
        """Ends the process from the thread of `watch`, as the main thread waits for a process that is gone."""
        self._store = self._spare  # the other connection may be in use
        code = self.end(end)
        sys.stdout.flush()
        os._exit(code)

    def _say(self, end: ProcessEnded) -> None:
        hint = [f"go on with: {self.hint}"] if self.hint and end.dead is not None else []
        print("; ".join([*end.lines, *hint]) if hint else "\n".join(end.lines), file=self._stderr, flush=True)

    def _linger(self, dead: int | None, *, answers: bool = True) -> None:
        """Stays, and keeps the store, until the others have ended too, by what the store says if it still `answers`,
        and by the operating system of this host. A dead process, and others that may be lost with its host, are not
        waited for."""
        ranks = {*range(self.launch.size)} - {self.launch.rank, dead} - self._lost_with(dead)

        def has_ended(rank: int) -> bool:
            if self._is_gone(rank):
                return True
            with suppress(Exception):  # the store may go at any time
                if answers:
                    return self.store.check([f"end/{rank}"]) or self.store.check([f"left/{rank}"])
            return not self._is_here(rank)  # nobody knows of one on another host

        self._within(LINGER, lambda: all(map(has_ended, ranks)))

    def _lost_with(self, dead: int | None) -> set[int]:
        """The processes on the host of a dead one, unless it is this host, whose system knows them."""
        there = self.members[dead].host if dead in self.members else self.me.host
        return {rank for rank, member in self.members.items() if member.host == there != self.me.host}

    def _is_here(self, rank: int) -> bool:
        """Whether a process is on this host, and alive."""
        return rank in self.members and self.members[rank].host == self.me.host and not self._is_gone(rank)

    def _is_gone(self, rank: int) -> bool:
        return rank != self.launch.rank and rank in self.members and self.members[rank].is_gone

    def _within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Whether a condition comes true within so many seconds."""
        until = time.monotonic() + seconds
        while not (found := condition()) and time.monotonic() < until:
            time.sleep(0.05)
        return found
