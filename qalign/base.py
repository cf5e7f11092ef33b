"""One quantised base in memory, and the adapters that make it play every role.

`load` finds the weights wherever the recipe says they are, quantises them once and keeps the result in a cache.
`Base.acting_as(role)` is the only way to change which part is played.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, PreTrainedModel

from qalign.errors import UserError
from qalign.logps import check_head
from qalign.recipe import Lora, Model
from qalign.recipe_file import looks_local, package_file
from qalign.tokens import prepare_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Role(StrEnum):
    """A part that the base can play; also the name of the adapter that plays it."""

    POLICY = "policy"
    REFERENCE = "reference"


class Base:
    """A frozen base with its adapters.

    Attributes:
        lm: the causal language model; adapters are injected into it.
        model: `lm`, or the `PeftModel` around it once a policy was added.
        tokenizer: with one chat template, one BOS and a pad token.
        source: folder or hub id that plain transformers can load the 16-bit base from.
        template: where the chat template comes from, in words.
        dtype: what matrices are multiplied in; adapters are float32 and cast to it.
        reference: what the reference is made of, in words.
        role: the part being played.
        switches: how often the part was changed.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer, source: str, template: str, dtype: torch.dtype):
        lm.requires_grad_(False)
        lm.eval()
        self._base_parameters = lm.num_parameters()
        self.lm, self.model = lm, lm
        self.tokenizer, self.source, self.template, self.dtype = tokenizer, source, template, dtype
        self.reference = "the base with adapters off"
        self.role = Role.POLICY
        self.switches = 0

    def add_policy(self, lora: Lora) -> None:
        """A new trainable adapter that begins as a no-op; the reference is then the base with adapters off."""
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            self.model = peft.get_peft_model(self.lm, config, adapter_name=Role.POLICY)
        except ValueError as error:
            raise UserError(f"lora.targets: {lora.targets} fits no layer of {self.source}: {error}") from None

    def load_policy(self, folder: str, *, trainable: bool) -> None:
        """A copy of a saved PEFT adapter as the policy.

        Raises:
            UserError: the adapter was made for another model.
        """
        try:
            self.model = peft.PeftModel.from_pretrained(
                self.lm, folder, adapter_name=Role.POLICY, is_trainable=trainable
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).splitlines()[:2])
            raise UserError(f"{folder}: this adapter doesn't fit {self.source}: {reason}") from None

    def load_reference(self, folder: str) -> None:
        """A frozen copy of a saved PEFT adapter as the reference; call after the policy was made."""
        self.model.load_adapter(folder, adapter_name=Role.REFERENCE, is_trainable=False)
        self.reference = f"the base with a frozen copy of the adapter {folder}"

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[PreTrainedModel]:
        """Plays a role; afterwards everything is as it was: the active adapter, `requires_grad`, training modes.

        Every role but the policy has no dropout; all compute in the same precision. Nestable and exception-safe.
        Yields the language model.
        """
        before = self.role
        trainable = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [module for module in self.model.modules() if module.training]
        try:
            self._switch(role)
            if role is not Role.POLICY:
                self.model.eval()
                self.model.requires_grad_(False)
            else:  # PEFT's switch makes what it activates trainable, a policy that is only evaluated too
                _restore(trainable)
            with torch.autocast(self.lm.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield self.lm
        finally:
            self._switch(before)
            _restore(trainable)
            for module in modes:
                module.training = True

    def _switch(self, role: Role) -> None:
        if role is self.role or self.model is self.lm:
            return
        self.switches += 1
        tuner = self.model.base_model
        if role in self.model.peft_config:
            tuner.enable_adapter_layers()
            self.model.set_adapter(role)
        else:
            tuner.disable_adapter_layers()
        self.role = role

    def save_policy(self, folder: Path) -> None:
        """Writes the policy as a plain PEFT folder with the tokenizer and its chat template, aside and then renamed."""
        self.model.peft_config[Role.POLICY].base_model_name_or_path = self.source
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            self.model.save_pretrained(aside, selected_adapters=[Role.POLICY], save_embedding_layers=False)
            save_tokenizer(self.tokenizer, Path(aside) / Role.POLICY)
            shutil.rmtree(folder, ignore_errors=True)
            (Path(aside) / Role.POLICY).rename(folder)

    @property
    def precision(self) -> str:
        """What is computed in, and where, in words."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.lm.device.type}"

    def count_parameters(self) -> tuple[int, int]:
        """(those of the policy, those of the base), where two 4-bit weights in a byte count as two."""
        policy = sum(p.numel() for name, p in self.model.named_parameters() if f".{Role.POLICY}." in name)
        return policy, self._base_parameters


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        parameter.requires_grad_(wanted)


# --- loading ---------------------------------------------------------------------------------------------------------


def load(spec: Model) -> Base:
    """The base of a recipe, quantised, on the best device, ready for adapters.

    Raises:
        UserError: it can't be found, fetched or read.
    """
    _quiet()
    dtype = compute_dtype(spec)
    try:
        source, identity = _source(spec)
        lm = _quantised(spec, dtype, source, identity)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.base: '{spec.base}' can't be loaded: {reason}") from None
    template = prepare_tokenizer(tokenizer, spec.chat_template)
    lm.config.pad_token_id = lm.generation_config.pad_token_id = tokenizer.pad_token_id
    base = Base(lm, tokenizer, source, template, dtype)
    check_head(lm)
    return base


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
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        lm = AutoModelForCausalLM.from_pretrained(source, revision=spec.revision, quantization_config=config, **place)
        with _written_aside(folder) as aside:  # freshly quantised and before any forward: see guard_4bit
            lm.save_pretrained(aside)
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
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"legacy": True}, indent=2), encoding="utf-8")


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
