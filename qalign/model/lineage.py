"""The lineage of an adapter: what it was trained on and from. It is saved beside the adapter's weights.

An adapter on another base, or behind another chat template, loads without an error and answers nonsense; comparing
lineages turns that into an error message.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qalign.config.atomic import write_whole
from qalign.config.paths import absolute_path, expanded, function_of, looks_local
from qalign.errors import UserError
from qalign.model.adapters.files import WEIGHTS

if TYPE_CHECKING:
    from qalign.model.base import Base

FILE = "lineage.json"


@dataclass(frozen=True)
class Lineage:
    """What an adapter was trained on and from. Hashes are the first 16 hex digits of SHA-256."""

    stage: str
    base: str  # the recipe's `model.base`
    revision: str | None  # the hub's commit, or the digest of a `.gguf` file; None for a local folder
    config_hash: str  # of the base's `config.json` without the keys that name its writer
    tokenizer_hash: str  # of the vocabulary: every token and its id
    special_tokens: dict[str, str]  # BOS, EOS and UNK; the pad token may differ, as it is masked
    template: str  # where the chat template comes from, in words
    template_hash: str  # of the chat template, the keywords passed to it, and `system_turn: into_user`
    quantization: str  # of the base
    compute_dtype: str  # of matrix products
    parent: str | None = None  # the adapter folder that training started from
    parent_hash: str | None = None  # of that adapter's weights
    weights_hash: str | None = None  # of its own weights, as they were written; older adapters have none


def digest(content: bytes | str) -> str:
    """The hash that a `Lineage` holds."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def adapter_hash(folder: str | Path) -> str | None:
    """The hash of an adapter's weights; None if the folder has no safetensors file."""
    file = Path(folder) / WEIGHTS
    return digest(file.read_bytes()) if file.is_file() else None


def function_hash(source: str) -> str | None:
    """The hash of the file that `FILE.py:NAME` names; None for a function of an installed module."""
    file = expanded((function_of(source) or ("",))[0])
    return digest(file.read_bytes()) if file.is_file() else None


def describe(base: "Base", stage: str, parent: str | None) -> Lineage:
    """The lineage of an adapter that a stage trains on this base, starting from the adapter folder `parent`."""
    spec, tokenizer = base.spec, base.tokenizer
    config = json.loads((base.origin.folder / "config.json").read_text(encoding="utf-8"))
    for key in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(key, None)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return Lineage(
        stage=stage,
        base=spec.base,
        revision=base.origin.revision,
        config_hash=digest(json.dumps(config, sort_keys=True)),
        tokenizer_hash=digest(json.dumps(sorted(tokenizer.get_vocab().items()))),
        special_tokens={name: str(token) for name, token in special.items() if token is not None},
        template=base.template.words,
        template_hash=digest(base.template.source),
        quantization=spec.quantization,
        compute_dtype=str(base.dtype).removeprefix("torch."),
        parent=parent,
        parent_hash=adapter_hash(parent) if parent else None,
    )


def write(folder: Path, lineage: Lineage) -> None:
    """Saves a lineage in an adapter's folder, beside its weights; local paths are made absolute, as it is read from
    other directories too."""
    kept = asdict(replace(lineage, weights_hash=adapter_hash(folder)))
    kept |= {key: absolute_path(kept[key]) for key in ("base", "parent") if kept[key]}
    write_whole(folder / FILE, json.dumps(kept, indent=1) + "\n")


def read(folder: str | Path) -> Lineage | None:
    """An adapter's lineage; None if the adapter was not made by qalign; a `UserError` if the file is broken."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        kept = {"weights_hash": None} | json.loads(file.read_text(encoding="utf-8"))
        found = {field.name: kept[field.name] for field in fields(Lineage)}
        optional = ("revision", "parent", "parent_hash", "weights_hash")
        lacking = {name for name in optional if found[name] is None}
        texts = found | found["special_tokens"]  # a TypeError if it is no object
        if wrong := [name for name in texts.keys() - {"special_tokens", *lacking} if not isinstance(texts[name], str)]:
            raise TypeError(f"{wrong[0]} is no text")
        return Lineage(**found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a lineage that qalign wrote ({error!r}); train the adapter again") from None


def check_base(key: str, folder: str | Path, base: str, revision: str | None) -> None:
    """Compares what can be compared before the model is loaded: the adapter's base and, if the recipe pins a commit,
    its revision. Arguments and errors as for `check`."""
    kept = read(folder)
    pinned = revision if revision and len(revision) == 40 else None
    if kept and (conflict := _base_conflict(kept, base, pinned)):
        raise UserError(f"{key}: {folder} was trained {conflict}")


def check(key: str, folder: str | Path, ours: Lineage) -> None:
    """Compares an adapter with the model that it is about to be loaded onto.

    Args:
        key: the recipe key that names the adapter, for the message; for example `dpo.start_from`.
        ours: the lineage that an adapter trained on this model would have.

    Raises:
        UserError: they contradict each other, one line per contradiction, with both sides; or the adapter's weights
            were changed since.
    """
    kept = read(folder)
    if kept is None:
        return
    conflicts = []
    if kept.weights_hash and kept.weights_hash != adapter_hash(folder):
        weights = f"{key}: {folder}: {WEIGHTS} is not as it was written: damaged, or changed by hand"
        raise UserError(f"{weights}; train it again, or delete {FILE} there if you changed it")
    if conflict := _base_conflict(kept, ours.base, ours.revision):
        conflicts.append(conflict)
    elif kept.config_hash != ours.config_hash:
        conflicts.append(f"on '{kept.base}' with the config {kept.config_hash}, now it is {ours.config_hash}")
    if kept.special_tokens != ours.special_tokens:
        conflicts.append(f"with the special tokens {_words(kept)}, this recipe's are {_words(ours)}")
    elif kept.tokenizer_hash != ours.tokenizer_hash:
        conflicts.append(f"with the vocabulary {kept.tokenizer_hash}, this recipe's is {ours.tokenizer_hash}")
    if kept.template_hash != ours.template_hash:
        theirs, own = (f"{lineage.template_hash} ({lineage.template})" for lineage in (kept, ours))
        conflicts.append(f"with the chat template {theirs}, this recipe's is {own}")
    if conflicts:
        raise UserError(*(f"{key}: {folder} was trained {conflict}" for conflict in conflicts))


def _base_conflict(kept: Lineage, base: str, revision: str | None) -> str | None:
    moved = looks_local(kept.base) and looks_local(base) and Path(kept.base).name == Path(base).name
    if kept.base != base and not moved:  # a local folder may have moved: its config is compared too
        return f"on the base '{kept.base}', this recipe's is '{base}'"
    if kept.revision and revision and kept.revision != revision:
        return f"on revision {kept.revision} of '{kept.base}', this recipe uses {revision}"
    return None


def _words(lineage: Lineage) -> str:
    return ", ".join(f"{name} {token}" for name, token in lineage.special_tokens.items())
