"""The base's weights: found wherever the recipe says, converted and quantised once, and cached."""

import hashlib
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import bitsandbytes
import datasets
import torch
import transformers as tf
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from qalign.config.atomic import new_folder
from qalign.config.paths import looks_local, package_file
from qalign.config.recipe import Model
from qalign.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Form = Literal["held", "dequantized", "original"]


@dataclass(frozen=True)
class Origin:
    """Where a base's weights are."""

    source: str  # a folder or hub id that plain transformers can load the 16-bit base from
    revision: str | None  # the hub's commit, or the digest of a `.gguf` file; None for a local folder
    hub_revision: str | None  # the revision to request from the hub
    identity: str  # a text that changes when the weights do

    @property
    def folder(self) -> Path:
        """The folder on this disk; in the hub's cache every commit has its own."""
        return Path(self.source) if Path(self.source).is_dir() else _hub_folder(self.source, self.hub_revision)


def load_weights(spec: Model, *, classifier: bool = False, form: Form = "held") -> tuple[Any, Any, Origin]:
    """A recipe's base: (model, its tokenizer unchanged, `Origin`); a `UserError` if it can't be found, fetched or read.

    Args:
        classifier: a sequence classifier with one label, its head new and not quantised, instead of a language model.
        form: `held` as the recipe says, on the best device; `dequantized`, the weights that this computes with, and
            `original`, the published ones, both in 16 bits on the CPU.
    """
    _quiet()
    auto = tf.AutoModelForSequenceClassification if classifier else tf.AutoModelForCausalLM
    options = {"num_labels": 1} if classifier else {}
    try:
        origin = _origin(spec)
        if form == "original" or (form == "dequantized" and spec.quantization == "none"):
            lm = auto.from_pretrained(origin.source, revision=origin.hub_revision, dtype="auto", **options)
        else:
            dtype = DTYPES.get(spec.compute_dtype) if form == "dequantized" else None
            where = device() if form == "held" else torch.device("cpu")
            lm = _held(spec, origin, auto, options, dtype or compute_dtype(spec), where)
        if form == "dequantized" and spec.quantization != "none":
            lm = lm.dequantize(dtype=lm.dtype)
        return lm, tf.AutoTokenizer.from_pretrained(origin.source, revision=origin.hub_revision), origin
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be loaded: {reason}") from None


def load_config(spec: Model) -> tf.PretrainedConfig:
    """A base's config without its weights; a `UserError` if it can't be found, fetched or read."""
    _quiet()
    try:
        if file := _gguf_file(spec):
            return tf.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        where = str(Path(spec.base).expanduser()) if looks_local(spec.base) else spec.base
        return tf.AutoConfig.from_pretrained(where, revision=spec.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be read: {reason}") from None


def check_reach(spec: Model) -> None:
    """Checks, before any weight is fetched, that the base can read rows of `max_length`; a `UserError` if not."""
    reach = getattr(load_config(spec).get_text_config(), "max_position_embeddings", None)
    if reach and spec.max_length > reach:
        raise UserError(f"model.max_length: {spec.max_length} is beyond the {reach} tokens that '{spec.base}' can read")


def _quiet() -> None:
    """Hides progress bars and notices of other libraries, among which qalign's own lines would get lost."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT still calls what transformers 5.23 renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(spec: Model) -> torch.dtype:
    """The dtype of matrix products: the recipe's choice, or the fastest one on this device."""
    if device().type == "cpu" and spec.compute_dtype == "float16":  # 30 times slower than float32 there
        raise UserError("model.compute_dtype: float16 is very slow on a CPU; use 'auto'")
    if spec.compute_dtype != "auto":
        return DTYPES[spec.compute_dtype]
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def cache_folder() -> Path:
    """Where converted and quantised bases are cached: `$XDG_CACHE_HOME/qalign`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qalign"


def _gguf_file(spec: Model) -> Path | None:
    if spec.base.startswith("package:"):
        return package_file(spec.base)
    return Path(spec.base).expanduser() if spec.base.endswith(".gguf") else None


def _hub_folder(name: str, revision: str | None) -> Path:
    """The folder of a hub model in the hub's cache; it is named after the commit."""
    return Path(cast(str, cached_file(name, "config.json", revision=revision))).parent


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
    commit = _hub_folder(spec.base, spec.revision).name
    return Origin(spec.base, commit, spec.revision, f"{spec.base}@{commit}")


def _converted(file: Path) -> Path:
    """A `.gguf` file as a 16-bit model folder in the cache; its key is a hash of the file's content."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"gguf-{digest}"
    if not folder.is_dir():
        print(f"converting {file.name} once into {folder} …", flush=True)
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        config = tf.GgufConfig(dequantize=True)
        lm = tf.AutoModelForCausalLM.from_pretrained(**where, quantization_config=config, dtype=torch.float16)
        tokenizer = tf.AutoTokenizer.from_pretrained(**where)
        with new_folder(folder) as aside:
            lm.save_pretrained(aside)
            save_tokenizer(tokenizer, aside)
    return folder


def _held(spec: Model, origin: Origin, auto: Any, options: dict, dtype: torch.dtype, where: torch.device) -> Any:
    """The base as the recipe holds it; 4-bit ones come from the cache, from which they load in a tenth of the time."""
    place = {"dtype": dtype, "device_map": {"": where}}
    fresh = {"revision": origin.hub_revision, **place}
    if spec.quantization in ("none", "int8"):
        config = tf.BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None
        return auto.from_pretrained(origin.source, quantization_config=config, **fresh, **options)
    settings: dict[str, Any] = {
        "bnb_4bit_quant_type": spec.quantization,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }
    versions = [bitsandbytes.__version__, tf.__version__]
    key = hashlib.sha256(json.dumps([origin.identity, settings, versions]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{spec.quantization}-{key}"
    config = tf.BitsAndBytesConfig(load_in_4bit=True, **settings)
    lm = None
    if not folder.is_dir():
        print(f"quantising {origin.source} once into {folder} …", flush=True)
        lm = tf.AutoModelForCausalLM.from_pretrained(origin.source, quantization_config=config, **fresh)
        try:
            with new_folder(folder) as aside:  # freshly quantised and before any forward: see guard_4bit
                lm.save_pretrained(aside)
        except OSError as error:  # a full disk: it is quantised again each time, but training can go on
            print(f"not cached: {error}", file=sys.stderr)
        if auto is not tf.AutoModelForCausalLM:
            lm = None  # only one of the two in memory at a time
    if lm is None:
        cached = folder.is_dir()
        source, more = (folder, place) if cached else (origin.source, {"quantization_config": config, **fresh})
        lm = auto.from_pretrained(source, **more, **options)
    guard_4bit(lm)
    return lm


def guard_4bit(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place at the first forward without gradients on a CPU with
    AVX512-BF16, after which all gradients would be wrong without an error. Raises if that has happened already."""
    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise RuntimeError(
                    "bitsandbytes has repacked the 4-bit weights, so gradients would be wrong; reload them"
                )


def tensor_bytes(tensor: Tensor) -> int:
    """The memory of a tensor; of a 4-bit one including its scales."""
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.code]
    if state is not None and state.nested:
        scales += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in (tensor, *scales))


def save_tokenizer(tokenizer: tf.PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer so that it gives the same ids when loaded again."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "legacy", None):  # transformers 5.23 forgets it, and spaces after special tokens change
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
