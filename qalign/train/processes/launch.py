"""What a launcher (`torchrun`, `accelerate launch`) says in the environment about this process. Imports no torch."""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from qalign.errors import UserError, short

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PLACE = ("MASTER_ADDR", "MASTER_PORT")
# Settings of Accelerate's own config, which would override the recipe's.
SETTINGS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
OTHER_WAYS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "SAGEMAKER", "TPU")


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int  # among the processes of this host
    local_size: int
    address: str  # where all processes meet
    port: int
    launcher_listens: bool  # True: the launcher listens there already; False: the first process does
    attempt: str  # `torchrun --max-restarts` counts here; what an earlier attempt left there doesn't count


def launched(environment: MutableMapping[str, str] = os.environ) -> Launch | None:
    """What a launcher said, None if it started one process or there is none. A `UserError` if it is incomplete.

    Takes the launcher's variables out of the environment: Accelerate and `Trainer` look there, would deal out the rows
    of each step a second time and wrap the model in DistributedDataParallel.
    """
    given = {name: environment.pop(name) for name in (*RANKS, *PLACE) if name in environment}
    if given.get("WORLD_SIZE", "") in ("", "0", "1"):
        return None
    for way in OTHER_WAYS:
        if environment.get(f"ACCELERATE_USE_{way}", "").lower() == "true":
            fix = "choose multi-GPU in `accelerate config`, or start with torchrun"
            raise UserError(f"accelerate's config asks for {way}, but each process holds the whole 4-bit base; {fix}")
    for name in [name for name in environment if name.startswith(SETTINGS)]:
        del environment[name]
    if missing := [name for name in (*RANKS[:2], *PLACE) if not given.get(name)]:
        fix = "start it with torchrun or accelerate launch, which set all of them"
        raise UserError(f"WORLD_SIZE is {short(given['WORLD_SIZE'])}, but {', '.join(missing)} is not set; {fix}")

    def number(name: str, other: str) -> int:
        value = given.get(name) or given[other]
        if not value.isdecimal():
            raise UserError(f"{name}: {short(value)} is not a number")
        return int(value)

    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns in 30 lines of a store that ended
    listens = environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    return Launch(
        *(number(name, "RANK" if "RANK" in name else "WORLD_SIZE") for name in RANKS),
        address=given["MASTER_ADDR"],
        port=number("MASTER_PORT", "MASTER_PORT"),
        launcher_listens=listens,
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
