"""The process that trains: started, watched and stopped from the page, one at a time. It outlives the page, and a page
that is opened later finds it by the lock on its run folder. Imports neither torch nor Gradio."""

import os
import signal
import socket
import subprocess
from pathlib import Path
from threading import Lock

from qalign.errors import UserError
from qalign.page.training.commands import Job, executed, typed
from qalign.reports.curves import runs_under
from qalign.train.lock import at_work

TAIL_BYTES = 6000  # of a log, that are shown
SHORT_SECONDS = 300  # that a command may take which only reads


class Training:
    """At most one run at work, whoever started it. `runs`: the folder under which runs are looked for."""

    def __init__(self, runs: Path):
        self.runs, self._lock = runs, Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._run: Path | None = None  # of this process
        self._stopping = 0  # number of the process that was asked to stop

    def at_work(self) -> Path | None:
        """The run folder in which a process works; None if none does."""
        if self._process and self._process.poll() is None:
            return self._run
        first = next(iter(runs_under(self.runs)), None)
        return first if first and at_work(first) else None

    def start(self, job: Job, *, resume: bool = False) -> Path:
        """Starts the stage, or goes on with its run, in a process and a session of its own, so that it outlives the
        page. Returns its run folder. A `UserError` if the recipe is wrong, the folder is taken, or a run is at work."""
        run = job.run()
        with self._lock:
            if busy := self.at_work() or (run.path if at_work(run.path) else None):
                raise UserError(f"{busy}: is at work; one run at a time: wait for it, or stop it")
            run.claim(resume=resume, overwrite=job.overwrite and not resume)
            log, words = log_file(run.path), job.resume() if resume else job.train()
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab" if resume else "wb") as output:
                output.write(f"$ {typed(words)}\n".encode())
                output.flush()
                self._process = subprocess.Popen(
                    executed(words), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            self._run = run.path
            return run.path

    def stop(self, run: Path) -> None:
        """Asks the process that works in a run folder to write a checkpoint and end, as Ctrl-C does."""
        holder, pid = at_work(run), 0
        if self._process and self._process.poll() is None and run == self._run:
            pid = self._process.pid
        elif holder and holder.host != socket.gethostname()[:60]:
            raise UserError(f"{run}: {holder} works on it; stop it there")
        elif holder:
            pid = holder.pid
        if pid and pid != self._stopping:  # a second signal would end it without a checkpoint
            self._stopping = pid
            os.kill(pid, signal.SIGINT)

    def problem(self, run: Path) -> str:
        """What the exit code of the last process says about its run; empty if it is at work, or all went well."""
        code = self._process.poll() if self._process and run == self._run else None
        return f"ended with exit code {code}; its last lines say why" if code not in (None, 0, 130) else ""


def log_file(run: Path) -> Path:
    """What a run's process prints, beside the run folder, in which only the stage writes."""
    return run.with_name(f"{run.name}.log")


def tail(log: Path) -> str:
    """The last lines of a log; of a progress bar, its last state."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).rstrip()


def printed(words: list[str]) -> str:
    """What a command prints that only reads, after the command itself."""
    try:
        done = subprocess.run(
            executed(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=SHORT_SECONDS, check=False,
        )  # fmt: skip
        said = done.stdout.decode(errors="replace").strip("\n")
    except subprocess.TimeoutExpired:
        said = f"not done after {SHORT_SECONDS} seconds; run it in a terminal"
    return f"$ {typed(words)}\n{said}"


def chosen_run(job: Job) -> Path | None:
    """The folder of the run that a job makes; None while what was chosen is no job."""
    try:
        return job.run().path
    except (UserError, OSError):
        return None
