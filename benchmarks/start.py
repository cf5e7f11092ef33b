"""Where the time goes between a stage's command and its second step.

    python benchmarks/start.py dpo RECIPE [key=value …]

Runs the stage as its own command does and prints the seconds of each part: run it twice, as the first run fills the
caches of quantised bases and of compiled kernels. Parts that stand inside another are indented.
"""

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parent.parent))

seconds: dict[str, list[float]] = {}


def timed(owner: Any, name: str, part: str) -> None:
    """Replaces a function by one that notes how long it took, until the GPU was done."""
    import torch

    original: Callable[..., Any] = getattr(owner, name)

    @wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.setdefault(part, []).append(time.perf_counter() - began)

    setattr(owner, name, noted)


def watch(stage: str) -> None:
    """Imports what a stage imports, and times its parts."""
    import importlib

    from qalign.config import cache
    from qalign.model import base, loading, reference
    from qalign.train import loop
    from qalign.train.trainers import policy, reward, sft

    command = importlib.import_module(f"qalign.{stage}")
    seconds["imports"] = [time.perf_counter() - BEGAN]
    timed(command, "read_rows", "rows read and checked")
    timed(loop, "try_out", "values under trainer: tried out")
    timed(loop, "load", "base loaded")
    timed(cache, "is_whole", "  its files hashed")
    timed(loading, "_loaded", "  its weights read")
    timed(base, "check_head", "  its head checked")
    timed(command, "encode_rows", "rows tokenised")
    timed(loop.Session, "add_adapter", "adapter added")
    timed(base, "packing_of", "packed rows tried out, when they are first asked for")
    timed(reference.CachedReferenceLogps, "__init__", "cached reference found")
    timed(loop.Session, "plan", "memory planned")
    timed(loop.Session, "trainer", "trainer built")
    trainers = {"sft": sft.SupervisedTrainer, "dpo": policy.PreferenceTrainer, "kto": policy.LabelTrainer}
    timed(trainers.get(stage, reward.RewardModelTrainer), "training_step", "step")


def main() -> None:
    stage, *words = sys.argv[1:]
    watch(stage)
    import importlib

    try:
        importlib.import_module(f"qalign.{stage}").main([*words, "--overwrite", f"{stage}.max_steps=2"])
    finally:
        print(f"\n| {stage} {' '.join(words)} | seconds |\n|---|---|")
        for part, found in seconds.items():
            parts = {f"{part} {number}": spent for number, spent in enumerate(found, 1)}
            for name, spent in (parts if part == "step" else {part: sum(found)}).items():
                print(f"| {name} | {spent:.2f} |")
        print(f"| in all | {time.perf_counter() - BEGAN:.2f} |")


if __name__ == "__main__":
    main()
