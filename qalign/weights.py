"""The base's weights: found wherever the recipe says, quantised once, and kept in a cache."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, PreTrainedModel

from qalign.errors import UserError
from qalign.places import looks_local, package_file
from qalign.recipe import Model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_weights(spec: Model) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, str]:
    """A recipe's base, quantised, on the best device.

    Returns:
        (causal language model, its tokenizer as it comes, folder or hub id that plain transformers can load).

    Raises:
        UserError: it can't be found, fetched or read.
    """
    _quiet()
    dtype = compute_dtype(spec)
    try:
        source, identity = _source(spec)
        lm = _quantised(spec, dtype, source, identity)
        return lm, AutoTokenizer.from_pretrained(source, revision=spec.revision), source
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be loaded: {reason}") from None


def _quiet() -> None:
    """Keeps progress bars and notices of the libraries below from drowning qalign's own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # PEFT still calls what transformers 5.23 renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(spec: Model) -> torch.dtype:
    """What matrices are multiplied in: the recipe's choice, or what the device is good at.

    Raises:
        UserError: float16 on a CPU, which is 30 times slower than float32 there.
    """
    if device().type == "cpu" and spec.compute_dtype == "float16":
        raise UserError("model.compute_dtype: float16 crawls on a CPU; use 'auto'")
    if spec.compute_dtype != "auto":
        return DTYPES[spec.compute_dtype]
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def cache_folder() -> Path:
    """Where converted and quantised bases are kept: `$XDG_CACHE_HOME/qalign`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qalign"


def _source(spec: Model) -> tuple[str, str]:
    """(folder or hub id that transformers can load, a text that changes when the weights do)."""
    if spec.base.startswith("package:") or spec.base.endswith(".gguf"):
        file = package_file(spec.base) if spec.base.startswith("package:") else Path(spec.base).expanduser()
        folder = _converted(file)
        return str(folder), folder.name
    if looks_local(spec.base):
        folder = Path(spec.base).expanduser().resolve()
        files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin", ".json"))
        if not (folder / "config.json").is_file():
            raise OSError(f"no config.json in {folder}")
        return str(folder), f"{folder} " + " ".join(
            f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files
        )
    config = transformers.utils.cached_file(spec.base, "config.json", revision=spec.revision)
    return spec.base, f"{spec.base}@{Path(config).parent.name}"  # the hub's cache names its folders by commit


def _converted(file: Path) -> Path:
    """A `.gguf` file as a 16-bit model folder in the cache, keyed by the file's content."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"gguf-{digest}"
    if not folder.is_dir():
        print(f"converting {file.name} once into {folder} …", flush=True)
        where, name = str(file.parent), file.name
        lm = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
        )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        with _written_aside(folder) as aside:
            lm.save_pretrained(aside)
            save_tokenizer(tokenizer, aside)
    return folder


def _quantised(spec: Model, dtype: torch.dtype, source: str, identity: str) -> PreTrainedModel:
    """The base as the recipe wants it held; 4-bit ones come from the cache, where they load in a tenth of the time."""
    place = {"dtype": dtype, "device_map": {"": device()}}
    if spec.quantization in ("none", "int8"):
        config = BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None
        return AutoModelForCausalLM.from_pretrained(source, revision=spec.revision, quantization_config=config, **place)
    settings = {
        "bnb_4bit_quant_type": spec.quantization,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }
    versions = [bitsandbytes.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([identity, settings, versions]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{spec.quantization}-{key}"
    if folder.is_dir():
        lm = AutoModelForCausalLM.from_pretrained(folder, **place)
    else:
        print(f"quantising {source} once into {folder} …", flush=True)
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        lm = AutoModelForCausalLM.from_pretrained(source, revision=spec.revision, quantization_config=config, **place)
        try:
            with _written_aside(folder) as aside:  # freshly quantised and before any forward: see guard_4bit
                lm.save_pretrained(aside)
        except OSError as error:  # a full disk: slower next time, but no reason to stop
            print(f"not kept: {error}", file=sys.stderr)
    guard_4bit(lm)
    return lm


def guard_4bit(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place at the first forward without gradients on a CPU with
    AVX512-BF16: every later gradient would be wrong, with no error."""
    for module in lm.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False), (
                "4-bit weights were repacked"
            )


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Saves a tokenizer so that it gives the same ids when loaded again."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "legacy", None):  # transformers 5.23 forgets it, and spaces after special tokens change
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes its final name once it is whole; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
