"""Where a base comes from: a folder, a `.gguf` file or the hub; and in what form it is stored there.

Everything here is read from small files, without torch: what is wrong with a base is said in one line within two
seconds, before anything is downloaded, quantised or trained.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qalign.config import hub
from qalign.config.paths import looks_local, package_file
from qalign.config.recipe import Model
from qalign.errors import UserError

OTHER_CODE = (
    "brings code of its own (`auto_map`), which qalign never runs, and transformers has no class for it; take a model "
    "that transformers supports itself"
)


@dataclass(frozen=True)
class Stored:
    """How bitsandbytes has quantised a base that is published quantised."""

    quantization: str  # nf4, fp4 or int8, as in a recipe
    double_quant: bool


@dataclass(frozen=True)
class Origin:
    """Where a base's weights are."""

    source: str  # a folder or hub id that plain transformers can load the base from
    revision: str | None  # the hub's commit, or the digest of a `.gguf` file; None for a local folder
    hub_revision: str | None  # the revision to request from the hub
    identity: str  # a text that changes when the weights do
    stored: Stored | None = None  # None for a base in 16 or 32 bits
    is_reached: bool = True  # whether the hub answered; if not, only its cache is used

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()

    @property
    def folder(self) -> Path:
        """The folder on this disk; in the hub's cache every commit has its own."""
        if self.is_local:
            return Path(self.source)
        return hub.fetch("model.base", self.source, "config.json", self.revision)[0].parent

    @property
    def where(self) -> dict[str, Any]:
        """What `from_pretrained` needs to find it, and to ask the hub for nothing that is in its cache."""
        if self.is_local:
            return {"pretrained_model_name_or_path": self.source}
        found: dict[str, Any] = {"pretrained_model_name_or_path": self.source, "revision": self.revision}
        return found | {"local_files_only": not self.is_reached}

    def held(self, spec: Model) -> Model:
        """A recipe's `model` with the quantisation that the base is really in."""
        if self.stored is None:
            return spec
        return spec.model_copy(
            update={"quantization": self.stored.quantization, "double_quant": self.stored.double_quant}
        )


def gguf_file(spec: Model) -> Path | None:
    """The file of a base that is a `.gguf` file; None for another one."""
    if spec.base.startswith("package:"):
        return package_file(spec.base)
    return Path(spec.base).expanduser() if spec.base.endswith(".gguf") else None


def find(spec: Model) -> Origin:
    """A recipe's base, which is no `.gguf` file; a `UserError` if it isn't there, or its kind can't be used."""
    origin = locate(spec.base, spec.revision, "model.base")
    stored, wanted = origin.stored, spec.quantization
    if stored and wanted not in (stored.quantization, "nf4"):  # nf4 is the default, and so no one's choice
        raise UserError(
            f"model.quantization: '{spec.base}' is stored in {stored.quantization}, so it can't be in {wanted}; write "
            f"quantization: {stored.quantization}, or take the 16-bit original as model.base"
        )
    if stored and (stored.quantization, stored.double_quant) != (wanted, spec.double_quant):
        scales = "" if stored.quantization == "int8" else f", double_quant {str(stored.double_quant).lower()}"
        _note(f"note: '{spec.base}' is stored in {stored.quantization}{scales}, and is used as it is")
    return origin


def locate(base: str, revision: str | None, key: str) -> Origin:
    """A model's folder, or its place on the hub, from its `config.json` alone.

    Raises:
        UserError: it isn't there, is broken, or is stored in a way that can't be used here; `key` is the recipe's.
    """
    if not looks_local(base):
        file, is_reached = hub.fetch(key, base, "config.json", revision)
        commit = file.parent.name
        stored = _stored(_config(file, base, key), base, key)
        return Origin(base, commit, revision, f"{base}@{commit}", stored, is_reached)
    folder = Path(base).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"{key}: there is no folder '{base}'")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{key}: '{base}' is an adapter, not a model; name its base here, and it in start_from")
        raise UserError(f"{key}: '{base}' has no config.json, so it is no model folder of transformers")
    stored = _stored(_config(folder / "config.json", base, key), base, key)
    files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin", ".json"))
    state = " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    return Origin(str(folder), None, None, f"{folder} {state}", stored)


def check_weights(folder: Path, base: str, key: str = "model.base") -> None:
    """Looks at the weights of a folder without reading them; a `UserError` if files are missing or cut short."""
    for index in folder.glob("*.index.json"):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{key}: {index} can't be read ({error!r:.80}); copy the model again") from None
        if missing := sorted(str(part) for part in parts if not (folder / str(part)).is_file()):
            raise UserError(f"{key}: '{base}' lacks {len(missing)} files ({missing[0]}); copy the model again")
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{key}: {file} is cut short or damaged ({error!s:.80}); copy the model again") from None
    if not files and not any(folder.glob("*.bin")):
        raise UserError(f"{key}: '{base}' has a config.json but no weights (.safetensors); copy the model again")


def _config(file: Path, base: str, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: '{base}' can't be read: its config.json is broken ({error!s:.100})") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: '{base}' can't be read: its config.json holds no settings")
    for name in ("config.json", "tokenizer_config.json"):
        if has_own_code(file.with_name(name)):
            _note(f"note: '{base}' brings code of its own (`auto_map` in {name}), which is never run")
    return found


def has_own_code(file: Path) -> bool:
    """Whether a `config.json` or `tokenizer_config.json` names Python code beside it."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _stored(config: dict[str, Any], base: str, key: str) -> Stored | None:
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config") or inner
    if not found:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else {}
    in_4_bits, in_8_bits = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    method = str(settings.get("quant_method") or ("bitsandbytes" if in_4_bits or in_8_bits else "an unknown format"))
    if method != "bitsandbytes" or not (in_4_bits or in_8_bits):
        raise UserError(
            f"{key}: '{base}' is stored in {method[:40].upper()}, which can't be trained on here; take the 16-bit "
            "original, or a copy in bitsandbytes' 4 bits"
        )
    if in_8_bits:
        return Stored("int8", double_quant=True)
    kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
    return Stored(kind, double_quant=bool(settings.get("bnb_4bit_use_double_quant", False)))


@cache  # once a process
def _note(text: str) -> None:
    print(text, flush=True)
