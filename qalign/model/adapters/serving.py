"""What vLLM asks of an adapter that it serves beside its base (`vllm serve BASE --enable-lora`). Imports no torch.

The rules are those of vLLM 0.33: `PEFTHelper._validate_features` and `validate_legal` in `vllm/lora/peft_helper.py`,
`MaxLoRARanks` in `vllm/config/lora.py`, `parse_fine_tuned_lora_name` in `vllm/lora/utils.py`.
"""

from pathlib import Path
from typing import Any

from qalign.model.adapters.files import HEAD, AdapterFiles, read_files

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` may be
DEFAULT_RANK = 16  # of `--max-lora-rank`
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")  # of the names of tensors
HEADS = (HEAD, "classifier")  # what `modules_to_save` may hold


def vllm_problem(files: AdapterFiles) -> str | None:
    """Why vLLM refuses an adapter, in words; None if it serves it."""
    settings = files.settings
    if settings.use_dora:
        return "vLLM serves no DoRA"
    if other := [name for name in settings.modules_to_save or () if name not in HEADS]:
        return f"vLLM serves no modules_to_save but a score head, and this adapter has {other[0]}"
    if settings.lora_bias:
        return "vLLM serves no LoRA with a bias"
    if (rank := highest_rank(settings)) > MAX_RANKS[-1]:
        return f"vLLM serves ranks up to {MAX_RANKS[-1]}, and this adapter has {rank}"
    others = (name for name in files.shapes if not name.endswith(PARTS) and name.split(".")[-2:-1] not in ([HEAD],))
    if (name := next(others, None)) is not None:
        return f"vLLM serves LoRA alone, and this adapter has {name}"
    return None


def vllm_options(adapter: str | Path) -> str:
    """The options of `vllm serve BASE` for an adapter's rank: vLLM takes room for 16 unless it is told, and for some
    ranks alone."""
    rank = highest_rank(read_files(adapter).settings)
    room = next((most for most in MAX_RANKS if most >= rank), rank)
    return "--enable-lora" + (f" --max-lora-rank {room}" if room > DEFAULT_RANK else "")


def highest_rank(settings: Any) -> int:
    """The highest rank that PEFT's settings of an adapter give to a layer, `rank_pattern` included."""
    return max([settings.r or 8, *(settings.rank_pattern or {}).values()])
