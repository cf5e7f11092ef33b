"""Where a base comes from: a folder, a `.gguf` file or the hub; and in what form it is stored there.

Everything here is read from small files, without torch: what is wrong with a base is said in one line within two
seconds, before anything is downloaded, quantised or trained.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from qalign.config.paths import check_fetched, expanded, looks_local, package_file
from qalign.config.recipe import Model
from qalign.data.hub import why
from qalign.errors import UserError, short

# The largest number that a `config.json` may give each of these, far above that of any model: with more, building the
# model would not end.
BOUNDS = {"num_hidden_layers": 1000, "n_layer": 1000, "hidden_size": 10**6, "vocab_size": 10**7} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings"), 10**9
)
PATIENCE = 2.0  # seconds that the hub has to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
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
    experts: Literal["mxfp4"] | None = None  # how a base in 16 bits stores its experts, if not in 16 bits (gpt-oss)
    is_reached: bool = True  # whether the hub answered; if not, only its cache is used

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()

    @property
    def folder(self) -> Path:
        """The folder on this disk; in the hub's cache every commit has its own."""
        if self.is_local:
            return Path(self.source)
        return fetch(self.source, "config.json", self.revision, "model.base")[0].parent

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


class _Quantization(BaseModel):
    """bitsandbytes' settings in a `config.json`, with its defaults."""

    model_config = ConfigDict(strict=True)

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False


def gguf_file(spec: Model) -> Path | None:
    """The file of a base that is a `.gguf` file; None for another one."""
    if spec.base.startswith("package:"):
        return package_file(spec.base)
    return expanded(spec.base) if spec.base.endswith(".gguf") else None


def find(spec: Model) -> Origin:
    """A recipe's base, which is no `.gguf` file; a `UserError` if it isn't there, or its kind can't be used."""
    origin = locate(spec.base, spec.revision, "model.base")
    stored, wanted = origin.stored, spec.quantization
    if origin.experts and wanted == "int8":
        raise UserError(
            f"model.quantization: '{spec.base}' stores its experts in {origin.experts}, so they can't be in int8; "
            "write quantization: nf4 for 4 bits, or none for 16 bits"
        )
    if stored and wanted not in (stored.quantization, "nf4"):  # nf4 is the default, and so no one's choice
        raise UserError(
            f"model.quantization: '{spec.base}' is stored in {stored.quantization}, so it can't be in {wanted}; write "
            f"quantization: {stored.quantization}, or take the 16-bit original as model.base"
        )
    if stored and (stored.quantization, stored.double_quant) != (wanted, spec.double_quant):
        scales = "" if stored.quantization == "int8" else f", double_quant {str(stored.double_quant).lower()}"
        note(f"note: '{spec.base}' is stored in {stored.quantization}{scales}, and is used as it is")
    return origin


def locate(base: str, revision: str | None, key: str) -> Origin:
    """A model's folder, or its place on the hub, from its `config.json` alone.

    Raises:
        UserError: it isn't there, is broken, or is stored in a way that can't be used here; `key` is the recipe's.
    """
    if not looks_local(base):
        file, is_reached = fetch(base, "config.json", revision, key)
        commit = file.parent.name
        stored, experts = _stored(_config(file, base, key), base, key)
        return Origin(base, commit, revision, f"{base}@{commit}", stored, experts, is_reached)
    folder = Path(os.path.realpath(expanded(base)))
    if not folder.is_dir():
        near = f"; it is a file, did you mean '{folder.parent}'?" if folder.is_file() else ""
        raise UserError(f"{key}: there is no folder '{base}'{near}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{key}: '{base}' is an adapter, not a model; name its base here, and it in start_from")
        raise UserError(f"{key}: '{base}' has no config.json, so it is no model folder of transformers")
    stored, experts = _stored(_config(folder / "config.json", base, key), base, key)
    files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"))
    if odd := next((f for f in files if not f.is_file()), None):  # reading a pipe would never end
        raise UserError(f"{key}: {odd} is no file, or a broken link; copy the model again")
    state = " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    return Origin(str(folder), None, None, f"{folder} {state}", stored, experts)


def check(spec: Model) -> None:
    """Looks at a recipe's base without torch, before anything is trained or measured on it: a `UserError` if it isn't
    there, is broken, or can't be used."""
    if file := gguf_file(spec):
        check_fetched([file], "model.base: ")
        try:
            with file.open("rb") as opened:
                starts_well = opened.read(4) == b"GGUF"
        except OSError as error:
            raise UserError(f"model.base: '{spec.base}' can't be read: {error.strerror}") from None
        if not starts_well:
            raise UserError(f"model.base: '{spec.base}' is no GGUF file, or a damaged one; copy it again")
        return
    found = find(spec)
    if found.is_local:
        check_weights(Path(found.source), spec.base)


def fetch(name: str, file: str, revision: str | None, key: str) -> tuple[Path, bool]:
    """A file of a hub model, as (its path in the hub's cache, whether the hub was reached). The folder is named after
    the commit. What is in the cache is used when the hub can't be reached.

    Raises:
        UserError: one line with what was asked for, why it isn't there, and what to do; `key` is the recipe's.
    """
    import huggingface_hub as hub

    options: dict[str, Any] = {"repo_id": name, "filename": file, "revision": revision}
    in_cache = partial(hub.hf_hub_download, **options, local_files_only=True)
    try:
        is_cached = isinstance(hub.try_to_load_from_cache(**options), str)
        if hub.is_offline_mode() or (is_cached and re.fullmatch("[0-9a-f]{40}", revision or "")):
            return Path(in_cache()), not hub.is_offline_mode()  # a commit never changes
        try:  # asked once: the library itself would ask five times, for 23 seconds
            wait = hub.constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
            hub.get_hf_file_metadata(hub.hf_hub_url(name, file, revision=revision), timeout=wait)
        except Exception as error:
            if not is_cached or getattr(getattr(error, "response", None), "status_code", 500) in (401, 403, 404):
                raise
            return Path(in_cache()), False
        return Path(hub.hf_hub_download(**options)), True
    except Exception as error:  # the errors of the hub's client have no base in common with Python's
        raise UserError(f"{key}: '{name}' can't be fetched: {why(error, name, 'model', revision)}") from None


def check_weights(folder: Path, base: str, key: str = "model.base") -> None:
    """Looks at the weights of a folder without reading them; a `UserError` if files are missing or cut short."""
    for index in folder.glob("*.index.json"):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{key}: {index} can't be read ({error!r:.80}); copy the model again") from None
        inside = {file.name for file in folder.iterdir()}  # transformers would read files elsewhere, too
        if missing := sorted({str(part) for part in parts} - inside):
            raise UserError(f"{key}: '{base}' lacks {len(missing)} files ({missing[0]:.80}); copy the model again")
    files = sorted(folder.glob("*.safetensors"))
    check_fetched([*files, *folder.glob("tokenizer*")], f"{key}: ")
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
    for part in (found, found.get("text_config")):
        for name, bound in BOUNDS.items():
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, int) and not 1 <= value <= bound:
                raise UserError(
                    f"{key}: '{base}' has a broken config.json: {name} is {short(value)}; copy the model again"
                )
    for name in ("config.json", "tokenizer_config.json"):
        if has_own_code(file.with_name(name)):
            note(f"note: '{base}' brings code of its own (`auto_map` in {name}), which is never run")
    return found


def has_own_code(file: Path) -> bool:
    """Whether a `config.json` or `tokenizer_config.json` names Python code beside it."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _stored(config: dict[str, Any], base: str, key: str) -> tuple[Stored | None, Literal["mxfp4"] | None]:
    """(How bitsandbytes has quantised a base, how its experts are stored); None for what is in 16 bits."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config") or config.get("compression_config") or inner
    if not found:
        return None, None
    settings: dict[str, Any] = (
        {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    )
    is_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = str(settings.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else "an unknown format"))
    if method == "mxfp4":
        return None, "mxfp4"
    if method != "bitsandbytes":
        raise UserError(
            f"{key}: '{base}' is stored in {method[:40].upper()}, which can't be trained on here; take the 16-bit "
            "original, or a copy in bitsandbytes' 4 bits"
        )
    try:
        said = _Quantization.model_validate(settings)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UserError(
            f"{key}: '{base}' has a broken quantization_config: {name} is {short(settings[name])}"
        ) from None
    if said.load_in_4bit == said.load_in_8bit:
        raise UserError(
            f"{key}: '{base}' has a broken quantization_config: it is in 4 or in 8 bits, not in both or none"
        )
    if said.load_in_8bit:
        return Stored("int8", double_quant=True), None
    return Stored(said.bnb_4bit_quant_type, said.bnb_4bit_use_double_quant), None


@cache  # once a process
def note(text: str) -> None:
    print(text, flush=True)
