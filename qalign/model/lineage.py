"""The lineage of an adapter: what it was trained on and from. It is saved beside the adapter's weights.

An adapter on another base, or behind another chat template, loads without an error and answers nonsense; comparing
lineages turns that into an error message.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qalign.config.atomic import write_whole
from qalign.config.paths import absolute_path, looks_local
from qalign.errors import UserError

FILE = "lineage.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lineage:
    """What an adapter was trained on and from. Hashes are the first 16 hex digits of SHA-256."""

    stage: str
    base: str
    """The recipe's `model.base`."""
    revision: str | None
    """The hub's commit, or the digest of a `.gguf` file; None for a local folder."""
    config_hash: str
    """Hash of the base's `config.json` without the keys that name its writer."""
    tokenizer_hash: str
    """Hash of the vocabulary: every token and its id."""
    special_tokens: dict[str, str]
    """BOS, EOS and UNK. The pad token may differ, as it is masked."""
    template: str
    """Where the chat template comes from, in words."""
    template_hash: str
    """Hash of the chat template and of the keywords passed to it."""
    quantization: str
    """The quantisation of the base."""
    compute_dtype: str
    """The dtype of its matrix products."""
    parent: str | None = None
    """The adapter folder that training started from."""
    parent_hash: str | None = None
    """Hash of that adapter's weights."""


def digest(content: bytes | str) -> str:
    """The hash that a `Lineage` holds."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def adapter_hash(folder: str | Path) -> str | None:
    """The hash of an adapter's weights; None if the folder has no safetensors file."""
    file = Path(folder) / WEIGHTS
    return digest(file.read_bytes()) if file.is_file() else None


def write(folder: Path, lineage: Lineage) -> None:
    """Saves a lineage in an adapter's folder. Local paths are made absolute, so that any directory can be used later."""
    kept = asdict(lineage)
    kept |= {key: absolute_path(kept[key]) for key in ("base", "parent") if kept[key]}
    write_whole(folder / FILE, json.dumps(kept, indent=1) + "\n")


def read(folder: str | Path) -> Lineage | None:
    """An adapter's lineage; None if the adapter was not made by qalign.

    Raises:
        UserError: the file exists and is broken.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Lineage(**{field.name: kept[field.name] for field in fields(Lineage)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a lineage that qalign wrote ({error!r}); train the adapter again") from None


def check_base(key: str, folder: str | Path, base: str, revision: str | None) -> None:
    """Compares what can be compared before the model is loaded: the adapter's base and, if the recipe pins a commit,
    its revision.

    Raises:
        UserError: they differ; both sides are named.
    """
    kept = read(folder)
    if kept and not _same_base(kept.base, base):
        raise UserError(f"{key}: {folder} was trained on the base '{kept.base}', this recipe's is '{base}'")
    pinned = revision if revision and len(revision) == 40 else None
    if kept and pinned and kept.revision and kept.revision != pinned:
        raise UserError(
            f"{key}: {folder} was trained on revision {kept.revision} of '{base}', this recipe pins {pinned}"
        )


def check(key: str, folder: str | Path, ours: Lineage) -> None:
    """Compares an adapter with the model that it is about to be loaded onto.

    Args:
        key: the recipe key that names the adapter, for the message; for example `dpo.start_from`.
        folder: the adapter's folder.
        ours: the lineage that an adapter trained on this model would have.

    Raises:
        UserError: they contradict each other; one line per contradiction, with both sides.
    """
    kept = read(folder)
    if kept is None:
        return
    conflicts = []
    if not _same_base(kept.base, ours.base):
        conflicts.append(f"the base '{kept.base}', this recipe's is '{ours.base}'")
    elif kept.revision and ours.revision and kept.revision != ours.revision:
        conflicts.append(f"revision {kept.revision} of '{kept.base}', this recipe uses {ours.revision}")
    elif kept.config_hash != ours.config_hash:
        conflicts.append(f"'{kept.base}' with the config {kept.config_hash}, now it is {ours.config_hash}")
    if kept.special_tokens != ours.special_tokens:
        conflicts.append(f"the special tokens {_words(kept)}, this recipe's are {_words(ours)}")
    elif kept.tokenizer_hash != ours.tokenizer_hash:
        conflicts.append(f"the vocabulary {kept.tokenizer_hash}, this recipe's is {ours.tokenizer_hash}")
    if kept.template_hash != ours.template_hash:
        theirs, own = (f"{lineage.template_hash} ({lineage.template})" for lineage in (kept, ours))
        conflicts.append(f"the chat template {theirs}, this recipe's is {own}")
    if conflicts:
        raise UserError(*(f"{key}: {folder} was trained with {conflict}" for conflict in conflicts))


def _same_base(one: str, other: str) -> bool:
    """Whether two bases have the same name; a local folder may have moved, as its config is compared too."""
    return one == other or (looks_local(one) and looks_local(other) and Path(one).name == Path(other).name)


def _words(lineage: Lineage) -> str:
    return ", ".join(f"{name} {token}" for name, token in lineage.special_tokens.items())
