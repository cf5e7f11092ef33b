"""Code of the user: functions that score answers, imported and called so that they can neither end the run nor change
the process that trains."""

import gc
import importlib
import importlib.util
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, suppress
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, cast

import numpy
import torch

from qalign.errors import Stopped, UserError, one_line

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it is read, and how it is set


class Failed(Exception):
    """The user's code raised something, which the text names."""

    def __init__(self, error: BaseException):
        try:
            reason = one_line(str(error))
        except Exception:  # its own `__str__` fails
            reason = "an error that can't be printed"
        super().__init__(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


@contextmanager
def user_code(*, importing: bool = False) -> Iterator[None]:
    """Runs a block of the user's code. Whatever it raises, `sys.exit` included, becomes `Failed`, and it leaves the
    process as it was: gradients, dtypes, devices, threads and determinism of torch, the current folder, and so on. Its
    random numbers are a stream of their own. Only an import may change `sys.path` and the warning filters. `Stopped`
    and the user's KeyboardInterrupt pass through."""
    settings = [*_torch_settings(), *_process_settings()] + ([] if importing else [SEARCH_PATH])
    before, ours = [(setter, getter()) for getter, setter in settings], random_state()
    set_random_state(_stream)
    try:
        with nullcontext() if importing else warnings.catch_warnings():
            yield
    except Stopped:
        raise
    except BaseException as error:
        # Where the stage has its own handler of Ctrl-C, only the code itself can have raised this.
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise
        raise Failed(error) from None
    finally:
        _stream.update(random_state())
        set_random_state(ours)
        for setter, value in before:
            setter(value)


_stream: dict[str, Any] = {}  # the user's random numbers; at first they go on from those of this process


def stream_state() -> dict[str, Any]:
    """The state of the user's random numbers, for a checkpoint."""
    return _stream or random_state()


def set_stream_state(state: dict[str, Any]) -> None:
    """Goes on with the user's random numbers from what `stream_state` returned."""
    _stream.update(state)


def random_state() -> dict[str, Any]:
    """The states of all global generators, as plain values and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state())
    found = {"rng": torch.get_rng_state(), "python_rng": random.getstate(), "numpy_rng": (name, keys.tolist(), *rest)}
    return found | ({"cuda_rng": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the generators that are in what `random_state` returned."""
    setters = {
        "rng": torch.set_rng_state,
        "python_rng": random.setstate,
        "numpy_rng": numpy.random.set_state,
        "cuda_rng": torch.cuda.set_rng_state_all,
    }
    for name, value in state.items():
        setters[name](value)


def _flag(owner: Any, name: str) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _torch_settings() -> Iterator[Setting]:
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
    yield torch.get_default_device, lambda _: torch.set_default_device(None)  # nothing in qalign sets one
    for name in ("default_dtype", "num_threads", "float32_matmul_precision", "deterministic_debug_mode"):
        yield getattr(torch, f"get_{name}"), getattr(torch, f"set_{name}")
    for flag in ("deterministic", "benchmark", "enabled"):
        yield _flag(torch.backends.cudnn, flag)
    for device in ("cpu", "cuda"):
        yield (lambda d=device: torch.is_autocast_enabled(d)), (lambda on, d=device: torch.set_autocast_enabled(d, on))
    if torch.cuda.is_available():
        yield torch.cuda.current_device, torch.cuda.set_device


def _process_settings() -> Iterator[Setting]:
    yield sys.getrecursionlimit, sys.setrecursionlimit
    yield gc.isenabled, lambda on: gc.enable() if on else gc.disable()
    yield _folder, lambda folder: folder and os.chdir(folder)
    yield from (_flag(sys, stream) for stream in ("stdin", "stdout", "stderr"))
    if threading.current_thread() is threading.main_thread():  # others can't set a handler
        for number in (signal.SIGINT, signal.SIGTERM):
            yield (lambda n=number: signal.getsignal(n)), (lambda handler, n=number: signal.signal(n, handler))


SEARCH_PATH: Setting = lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)


def _folder() -> str | None:
    with suppress(OSError):  # it was deleted
        return os.getcwd()
    return None


def import_function(key: str, where: str, name: str) -> Callable[..., Any]:
    """A function of an installed module, or of a `.py` file; a `UserError` if there is none."""
    try:
        with user_code(importing=True):
            if where.endswith(".py"):
                spec = cast(ModuleSpec, importlib.util.spec_from_file_location(Path(where).stem, where))
                module = importlib.util.module_from_spec(spec)
                sys.modules.setdefault(spec.name, module)  # so that its own classes can be pickled
                cast(Loader, spec.loader).exec_module(module)
            else:
                module = importlib.import_module(where)
            function = getattr(module, name)
    except Failed as failed:
        raise UserError(f"{key}: '{where}:{name}' can't be imported: {failed}") from None
    if not callable(function):
        raise UserError(f"{key}: '{where}:{name}' is {type(function).__name__}, expected a function")
    return function


def listed(found: Any, count: int) -> list[Any] | None:
    """What a function gave, as a list of at most one more than `count` items (a generator may never end); arrays and
    tensors as Python's numbers. None if it is no sequence of scores. A generator's own code runs here."""
    if hasattr(found, "tolist"):  # NumPy's and PyTorch's, with gradients or on a GPU too
        found = found.tolist()
    if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
        return None
    return [item.tolist() if hasattr(item, "tolist") else item for item in islice(found, count + 1)]


def is_number(score: Any) -> bool:
    """Whether a score is a finite number."""
    try:
        return isfinite(score)
    except (TypeError, ValueError, OverflowError):  # no number at all, or an integer beyond any float
        return False
