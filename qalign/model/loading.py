"""The base's weights: found wherever the recipe says, converted and quantised once, and cached."""

import atexit
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import bitsandbytes
import datasets
import torch
import transformers as tf
from bitsandbytes.nn.modules import Linear8bitLt
from tqdm.auto import tqdm
from transformers.utils.quantization_config import Mxfp4Config

from qalign.config import cache
from qalign.config.paths import expanded
from qalign.config.recipe import NOT_SHARED, Model
from qalign.data.hub import why
from qalign.errors import UserError, one_line
from qalign.model import origin
from qalign.model.adapters.generation_config import mended
from qalign.model.experts.quantizer import FourBitConfig, guard_4bit
from qalign.model.memory.shard import InTurn, sharded
from qalign.model.memory.stream import placed
from qalign.model.origin import OTHER_CODE, Origin

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Form = Literal["held", "dequantized", "original"]
# Of `from_pretrained`: it also says which tensors are missing or of another shape, which `_check_tensors` refuses.
REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_weights(spec: Model, *, form: Form = "held", in_turn: InTurn | None = None) -> tuple[Any, Any, Origin]:
    """A recipe's base: (model, its tokenizer unchanged, `Origin`); a `UserError` if it can't be found, fetched or read.

    Args:
        form: `held` as the recipe says, on the best device; `dequantized`, the weights that this computes with, and
            `original`, the published ones, both in 16 bits on the CPU.
        in_turn: lets the processes that `model.shard` deals the weights out to read them one after the other.
    """
    _quiet()
    shard = form == "held" and spec.shard
    if shard and in_turn is None:
        raise UserError(f"model.shard: {NOT_SHARED}")
    found = in_turn(lambda: find(spec)) if in_turn else find(spec)
    spec = found.held(spec)
    if form == "original" and (stored := spec.quantization if found.stored else found.experts):
        raise UserError(f"model.base: '{spec.base}' is published in {stored}, so its unquantised weights aren't known")
    tokenizer = _tokenizer(found, spec.base, "model.base")
    with readable(spec.base, "model.base"):
        if form == "original" or (form == "dequantized" and spec.quantization == "none"):
            find(spec, weights=True)
            lm = _loaded(found, dtype="auto")
        else:
            dtype = (DTYPES.get(spec.compute_dtype) if form == "dequantized" else None) or compute_dtype(spec)
            on = partial(_held, spec, found, dtype)
            if shard and in_turn:
                lm = sharded(on, device(), in_turn)
            else:
                lm = placed(on, device(), spec.stream) if form == "held" else on(torch.device("cpu"))
        if form == "dequantized" and spec.quantization != "none":
            lm = lm.dequantize(dtype=lm.dtype)
    _check_tokens(tokenizer, lm, spec.base, "model.base")
    return lm, tokenizer, found


def find(spec: Model, *, weights: bool = False) -> Origin:
    """A recipe's base; a `.gguf` file is converted first. A `UserError` if it isn't there or can't be used.

    Args:
        weights: whether the cached weights of a `.gguf` file are about to be read, and so are verified.
    """
    if file := origin.gguf_file(spec):
        with readable(spec.base, "model.base"):
            return _converted(file, weights=weights)
    found = origin.find(spec)
    if found.is_local:
        origin.check_weights(Path(found.source), spec.base)
    return found


@contextmanager
def readable(base: str, key: str, says: str = "can't be loaded") -> Generator[None]:
    """Turns what other libraries raise while they read the model `base` into a `UserError` of one line; `key` is the
    recipe's."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken file raises whatever its reader happens to do with it
        text, reason = str(error), f"{says}: {why(error, base, 'model', None)}"
        own = origin.has_own_code(expanded(base) / "config.json")
        if "custom code" in text or (own and "does not recognize" in text):
            reason = OTHER_CODE
        elif "backend tokenizer" in text:
            reason = "has no tokenizer that can be read here; add its tokenizer.json"
        elif isinstance(error, UnpicklingError):
            reason = "holds more than tensors in a pickle (.bin), which may run code when it is read; take .safetensors"
        raise UserError(f"{key}: '{base}' {reason}") from None


def load_scorer(source: str, key: str, dtype: torch.dtype, where: torch.device) -> tuple[Any, Any]:
    """A reward model that isn't an adapter, in 4 bits, with its tokenizer; a `UserError` if it can't be found or
    read. `key` is the recipe's."""
    found = origin.locate(source, None, key)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": where}}
    if not found.stored:
        options["quantization_config"] = FourBitConfig(experts=found.experts or "nf4", **nf4)
    if found.is_local:
        origin.check_weights(Path(found.source), source, key)
    tokenizer = _tokenizer(found, source, key)
    with readable(source, key):
        model = _loaded(found, scores=True, **options).eval()
        guard_4bit(model)
    _check_tokens(tokenizer, model, source, key)
    return model, tokenizer


def _tokenizer(found: Origin, base: str, key: str) -> Any:
    """A base's tokenizer, tried out: settings of wrong types are noticed only when it is used."""
    with readable(base, key):
        config_at(found)  # which is read with the tokenizer, and would be blamed on it
    with readable(base, key, "has a tokenizer that can't be read"):
        tokenizer = tf.AutoTokenizer.from_pretrained(**found.where, trust_remote_code=False)
        tokenizer("a")
    return tokenizer


def load_config(spec: Model) -> tf.PretrainedConfig:
    """A base's config without its weights; a `UserError` if it can't be found, fetched or read."""
    _quiet()
    with readable(spec.base, "model.base", "can't be read"):
        if file := origin.gguf_file(spec):
            return tf.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        return config_at(origin.find(spec))


def config_at(found: Origin) -> tf.PretrainedConfig:
    """The config of a model that was found."""
    return tf.AutoConfig.from_pretrained(**found.where, trust_remote_code=False)


def auto_class(config: tf.PretrainedConfig) -> Any:
    """The class of transformers that makes a language model of a config: some have only one that also reads images."""
    is_known = type(config) in tf.MODEL_FOR_CAUSAL_LM_MAPPING
    return tf.AutoModelForCausalLM if is_known else tf.AutoModelForImageTextToText


def parts_left_out(lm: tf.PreTrainedModel, found: Origin) -> list[str]:
    """What a checkpoint has beside the text model that was loaded alone, as Qwen3.5's is."""
    whole = config_at(found)
    others = [name for name in whole.sub_configs if name != "text_config"]
    return [] if type(lm.config) is type(whole) else [name.removesuffix("_config") for name in others]


def reach_of(config: tf.PretrainedConfig) -> int | None:
    """How many positions a base has: the longest row that it can read, in tokens. None without a limit (ALiBi, state
    spaces).

    RoPE scaling: configs disagree whether `max_position_embeddings` is meant before or after it, so the larger of both
    readings counts, as in vLLM. Scaling that each kind of layer has for itself is counted in already (Gemma 3).
    """
    text = config.get_text_config()
    # `max_seq_len` is MPT's name, in which transformers computes ALiBi up to there.
    reach = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not reach or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or reach
    stretched = rope.get("rope_type") in ("linear", "dynamic", "yarn") and rope.get("factor")
    return max(reach, int(original * stretched)) if stretched else reach


def _quiet() -> None:
    """Hides progress bars and notices of other libraries, among which qalign's own lines would get lost."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.showwarning = _above_progress_bars
    # The first backward pass on a GPU: PyTorch's thread for it has no CUDA context yet, and is given one.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS", category=UserWarning)
    # PEFT still calls what transformers 5.23 renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # An adapter on tied embeddings: `qalign.convert.merging` unties them.
    warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter", category=UserWarning)


def _above_progress_bars(message, category, filename, lineno, file=None, line=None) -> None:
    """Writes a warning as one line; Python's own would begin in the middle of a progress bar."""
    text = f"{Path(filename).name}:{lineno}: {category.__name__}: {' '.join(str(message).split())}"
    tqdm.write(one_line(text), file=file or sys.stderr)


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


def _loaded(found: Origin, *, scores: bool = False, **options: Any) -> Any:
    """A language model from where it was found, or a model that gives `scores`, with the options of
    `from_pretrained`."""
    config = config_at(found)
    if found.experts and options.get("quantization_config"):
        del cast(Any, config).quantization_config  # which says no more than that the experts are in MXFP4
    elif found.experts:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if isinstance(stored, dict) and isinstance(options.get("dtype"), torch.dtype):
            stored["bnb_4bit_compute_dtype"] = str(options["dtype"]).removeprefix("torch.")
    auto = tf.AutoModelForSequenceClassification if scores else auto_class(config)
    if not scores:
        options["generation_config"] = mended(found)[0]
    lm, report = auto.from_pretrained(**found.where, config=config, trust_remote_code=False, **options, **REPORTED)
    _check_tensors(report)
    if report["unexpected_keys"] and not scores:
        left = sorted(report["unexpected_keys"])
        origin.note(f"note: {len(left)} tensors of '{found.source}' aren't used, such as {left[0]}")
    return lm


def _check_tensors(report: dict[str, Any]) -> None:
    """Raises if a model isn't complete: transformers fills what is missing, or of another shape, with random numbers.
    `report` is what `from_pretrained` says about the tensors that it found."""
    if wrong := sorted(report["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise ValueError(f"{name} has the shape {tuple(found)}, its config.json asks for {tuple(expected)}")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of its tensors, such as {missing[0]}; copy the model again")


def _converted(file: Path, *, weights: bool) -> Origin:
    """A `.gguf` file as a 16-bit model folder in the cache; its key is a hash of the file's content."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    folder = cache.cache_folder() / f"gguf-{digest}"
    if not cache.is_whole(folder, weights=weights):
        print(f"converting {file.name} once into {folder} …", flush=True)
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        auto: Any = tf.AutoModelForCausalLM
        options = {"quantization_config": tf.GgufConfig(dequantize=True), "dtype": torch.float16, **REPORTED}
        lm, report = auto.from_pretrained(**where, trust_remote_code=False, **options)
        _check_tensors(report)
        tokenizer = tf.AutoTokenizer.from_pretrained(**where, trust_remote_code=False)

        def write(aside: Path) -> None:
            lm.save_pretrained(aside)
            save_tokenizer(tokenizer, aside)

        if not cache.keep(folder, write):
            folder = Path(tempfile.mkdtemp(prefix="qalign-")) / folder.name
            atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
            folder.mkdir()
            write(folder)
    return Origin(str(folder), digest, None, f"gguf-{digest}")


def _held(spec: Model, found: Origin, dtype: torch.dtype, where: torch.device) -> Any:
    """The base as the recipe holds it; 4-bit ones come from the cache, from which they load in a tenth of the time."""
    place: dict[str, Any] = {"dtype": dtype, "device_map": {"": where}}
    if found.stored:
        lm = _loaded(found, **place)
        guard_4bit(lm)
        return lm
    if spec.quantization in ("none", "int8"):
        find(spec, weights=True)
        config = tf.BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None
        lm = _loaded(found, quantization_config=config, **place)
        if config and not any(isinstance(module, Linear8bitLt) for module in lm.modules()):
            raise UserError(
                f"model.base: '{spec.base}' has no layer that bitsandbytes holds in int8; set model.quantization to nf4"
            )
        return lm
    settings: dict[str, Any] = {
        "experts": found.experts or spec.quantization,
        "bnb_4bit_quant_type": spec.quantization,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }
    versions = [bitsandbytes.__version__, tf.__version__]
    key = hashlib.sha256(json.dumps([found.identity, settings, versions]).encode()).hexdigest()[:16]
    folder = cache.cache_folder() / f"{spec.quantization}-{key}"
    fresh = {"quantization_config": FourBitConfig(**settings), **place}
    is_kept, lm = cache.is_whole(folder), None
    if not is_kept:
        find(spec, weights=True)
        print(f"quantising {found.source} once into {folder} …", flush=True)
        lm = _loaded(found, **fresh)
        is_kept = cache.keep(folder, lm.save_pretrained)  # freshly quantised and before any forward: see guard_4bit
    if lm is None:
        lm = _loaded(Origin(str(folder), None, None, ""), **place)
    guard_4bit(lm)
    return lm


def _check_tokens(tokenizer: Any, lm: Any, base: str, key: str) -> None:
    """A `UserError` if the tokenizer gives ids that the base has no embedding for, as when only it got new tokens. A
    text-only copy of a model that reads images may have kept the name of their placeholder."""
    rows = lm.get_input_embeddings().weight.shape[0]
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= rows}
    if extra := sorted(set(beyond) - placeholders, key=lambda token: beyond[token]):
        raise UserError(
            f"{key}: the tokenizer of '{base}' has {len(extra)} tokens that the model has no embedding for "
            f"({extra[0][:40]!r} has the id {beyond[extra[0]]}, the model has {rows} rows); remove them from the "
            "tokenizer, or resize the model's embeddings and train them"
        )


def save_tokenizer(tokenizer: tf.PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer so that it gives the same ids when loaded again."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "legacy", None):  # transformers 5.23 forgets it, and spaces after special tokens change
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
