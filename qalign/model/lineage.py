"""Where an adapter comes from, kept beside its weights, so that stages which contradict each other are noticed.

An adapter on another base, or behind another chat template, loads without an error and answers nonsense.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    """Of the base's `config.json`, but for the keys that say who wrote it."""
    tokenizer_hash: str
    """Of every token and its id."""
    special_tokens: dict[str, str]
    """BOS, EOS and UNK. (The pad token may differ: it is masked.)"""
    template: str
    """Where the chat template comes from, in words."""
    template_hash: str
    """Of its text and of the keywords passed to it."""
    quantization: str
    """How the base was held."""
    compute_dtype: str
    """What its matrices were multiplied in."""
    parent: str | None = None
    """The adapter folder that it started from."""
    parent_hash: str | None = None
    """Of that adapter's weights."""


def digest(content: bytes | str) -> str:
    """The hash that a `Lineage` holds."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def adapter_hash(folder: str | Path) -> str | None:
    """The hash of an adapter's weights; None where it has none in safetensors."""
    file = Path(folder) / WEIGHTS
    return digest(file.read_bytes()) if file.is_file() else None


def write(folder: Path, lineage: Lineage) -> None:
    """Leaves it beside the adapter's weights, with local paths from the root: it is read in other directories too."""
    kept = asdict(lineage)
    kept |= {key: absolute_path(kept[key]) for key in ("base", "parent") if kept[key]}
    (folder / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read(folder: str | Path) -> Lineage | None:
    """An adapter's lineage; None for one that was made elsewhere.

    Raises:
        UserError: the file is there and broken.
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
    """Compares what needs no model: the adapter's base and, where both are pinned, its revision.

    Raises:
        UserError: they differ; both sides are named.
    """
    kept = read(folder)
    if kept and not _same_base(kept.base, base):
        raise UserError(f"{key}: {folder} was trained on the base '{kept.base}', this recipe's is '{base}'")
    commit = revision and len(revision) == 40
    if kept and commit and kept.revision and kept.revision != revision:
        raise UserError(
            f"{key}: {folder} was trained on revision {kept.revision} of '{base}', this recipe pins {revision}"
        )


def check(key: str, folder: str | Path, ours: Lineage) -> None:
    """Compares an adapter with the model it is about to be put on.

    Args:
        key: what named the adapter, for the message: `dpo.start_from`, say.
        folder: the adapter's.
        ours: the lineage that an adapter trained now would have.

    Raises:
        UserError: they contradict each other; a line a contradiction, both sides named.
    """
    kept = read(folder)
    if kept is None:
        return
    lines = []
    if not _same_base(kept.base, ours.base):
        lines.append(f"the base '{kept.base}', this recipe's is '{ours.base}'")
    elif kept.revision and ours.revision and kept.revision != ours.revision:
        lines.append(f"revision {kept.revision} of '{kept.base}', this recipe uses {ours.revision}")
    elif kept.config_hash != ours.config_hash:
        lines.append(f"'{kept.base}' with the config {kept.config_hash}, now it is {ours.config_hash}")
    if kept.special_tokens != ours.special_tokens:
        lines.append(f"the special tokens {_words(kept)}, this recipe's are {_words(ours)}")
    elif kept.tokenizer_hash != ours.tokenizer_hash:
        lines.append(f"a tokenizer with the vocabulary {kept.tokenizer_hash}, this recipe's is {ours.tokenizer_hash}")
    if kept.template_hash != ours.template_hash:
        lines.append(
            f"the chat template {kept.template_hash} ({kept.template}), "
            f"this recipe's is {ours.template_hash} ({ours.template})"
        )
    if lines:
        raise UserError(*(f"{key}: {folder} was trained with {line}" for line in lines))


def _same_base(one: str, other: str) -> bool:
    """A local folder may have moved; its config and tokenizer are compared too."""
    return one == other or (looks_local(one) and looks_local(other) and Path(one).name == Path(other).name)


def _words(lineage: Lineage) -> str:
    return ", ".join(f"{name} {token}" for name, token in lineage.special_tokens.items())
