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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bitsandbytes
import datasets
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from qalign.config.paths import looks_local, package_file
from qalign.config.recipe import Model
from qalign.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Origin:
    """Where a base's weights are."""

    source: str
    """A folder or hub id that plain transformers can load the 16-bit base from."""
    revision: str | None
    """The hub's commit, or the digest of a `.gguf` file; None for a local folder."""
    hub_revision: str | None
    """What to ask the hub for."""
    identity: str
    """A text that changes when the weights do."""

    @property
    def folder(self) -> Path:
        """The folder on this disk; the hub's cache has one a commit."""
        if Path(self.source).is_dir():
            return Path(self.source)
        return Path(transformers.utils.cached_file(self.source, "config.json", revision=self.hub_revision)).parent


Form = Literal["held", "dequantized", "original"]


def load_weights(spec: Model, *, classifier: bool = False, form: Form = "held"):
    """A recipe's base.

    Args:
        classifier: a sequence classifier with one label, its head new and unquantised, instead of a language model.
        form: `held` as the recipe says, on the best device; `dequantized`, the very weights that this computes with,
            and `original`, those that were published, both in 16 bits on the CPU.

    Returns:
        (model, its tokenizer as it comes, `Origin`).

    Raises:
        UserError: it can't be found, fetched or read.
    """
    _quiet()
    auto, options = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if classifier else (AutoModelForCausalLM, {})
    )
    try:
        origin = _origin(spec)
        if form == "original" or (form == "dequantized" and spec.quantization == "none"):
            lm = auto.from_pretrained(origin.source, revision=origin.hub_revision, dtype="auto", **options)
        else:
            dtype = DTYPES.get(spec.compute_dtype) if form == "dequantized" else None
            lm = _held(spec, origin, auto, options, dtype or compute_dtype(spec), device() if form == "held" else "cpu")
        if form == "dequantized" and spec.quantization != "none":
            lm = lm.dequantize(dtype=lm.dtype)
        return lm, AutoTokenizer.from_pretrained(origin.source, revision=origin.hub_revision), origin
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be loaded: {reason}") from None


def load_config(spec: Model) -> PretrainedConfig:
    """A base's settings without its weights.

    Raises:
        UserError: they can't be found, fetched or read.
    """
    _quiet()
    try:
        if file := _gguf_file(spec):
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        where = str(Path(spec.base).expanduser()) if looks_local(spec.base) else spec.base
        return AutoConfig.from_pretrained(where, revision=spec.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be read: {reason}") from None


def check_reach(spec: Model) -> None:
    """Makes sure, before any weight is fetched, that the base can read rows of `max_length`.

    Raises:
        UserError: it was made for shorter ones.
    """
    reach = getattr(load_config(spec).get_text_config(), "max_position_embeddings", None)
    if reach and spec.max_length > reach:
        raise UserError(f"model.max_length: {spec.max_length} is beyond the {reach} tokens that '{spec.base}' can read")


def _quiet() -> None:
    """Keeps progress bars and notices of the libraries below from drowning qalign's own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
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


def _gguf_file(spec: Model) -> Path | None:
    """The `.gguf` file that a base is, if it is one."""
    if spec.base.startswith("package:"):
        return package_file(spec.base)
    return Path(spec.base).expanduser() if spec.base.endswith(".gguf") else None


def _origin(spec: Model) -> Origin:
    if file := _gguf_file(spec):
        folder = _converted(file)
        return Origin(str(folder), folder.name.removeprefix("gguf-"), None, folder.name)
    if looks_local(spec.base):
        folder = Path(spec.base).expanduser().resolve()
        files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin", ".json"))
        if not (folder / "config.json").is_file():
            raise OSError(f"no config.json in {folder}")
        state = " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
        return Origin(str(folder), None, None, f"{folder} {state}")
    config = transformers.utils.cached_file(spec.base, "config.json", revision=spec.revision)
    commit = Path(config).parent.name  # the hub's cache names its folders by commit
    return Origin(spec.base, commit, spec.revision, f"{spec.base}@{commit}")


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
        with written_aside(folder) as aside:
            lm.save_pretrained(aside)
            save_tokenizer(tokenizer, aside)
    return folder


def _held(spec: Model, origin: Origin, auto, options: dict, dtype: torch.dtype, where) -> PreTrainedModel:
    """The base as the recipe wants it held; 4-bit ones come from the cache, where they load in a tenth of the time."""
    place = {"dtype": dtype, "device_map": {"": where}}
    fresh = {"revision": origin.hub_revision, **place}
    if spec.quantization in ("none", "int8"):
        config = BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None
        return auto.from_pretrained(origin.source, quantization_config=config, **fresh, **options)
    settings = {
        "bnb_4bit_quant_type": spec.quantization,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }
    versions = [bitsandbytes.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([origin.identity, settings, versions]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{spec.quantization}-{key}"
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    lm = None
    if not folder.is_dir():
        print(f"quantising {origin.source} once into {folder} …", flush=True)
        lm = AutoModelForCausalLM.from_pretrained(origin.source, quantization_config=config, **fresh)
        try:
            with written_aside(folder) as aside:  # freshly quantised and before any forward: see guard_4bit
                lm.save_pretrained(aside)
        except OSError as error:  # a full disk: slower next time, but no reason to stop
            print(f"not kept: {error}", file=sys.stderr)
    if lm is None or auto is not AutoModelForCausalLM:
        lm = None  # one of them in memory at a time
        if folder.is_dir():
            lm = auto.from_pretrained(folder, **place, **options)
        else:
            lm = auto.from_pretrained(origin.source, quantization_config=config, **fresh, **options)
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
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes its final name once it is whole, it and its files as open to others as any that the
    user makes; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    aside = around / folder.name
    try:
        aside.mkdir()  # in the other, as that is its owner's alone
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():  # safetensors makes them their owner's alone too
                file.chmod(aside.stat().st_mode & 0o666)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(around, ignore_errors=True)
