"""Log-probs of the reference: computed once for each distinct pair, and kept for later epochs and later runs."""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from qalign.data.collate import AnswerBatch
from qalign.data.tokenize import TokenPair
from qalign.model.base import Base, Role
from qalign.model.loading import cache_folder
from qalign.model.logps import pair_logps


class ReferenceLogps:
    """Log-probs of the reference, computed with the layout and the code of the policy's (in 16 bits another way would
    be up to a nat apart, and the first loss not ln 2). Pairs are computed when they are first asked for.

    Attributes:
        computed: how many pairs this process has computed.
    """

    def __init__(self):
        self.computed = 0

    def logps(self, base: Base, pairs: list[TokenPair], batch: AnswerBatch) -> Tensor:
        """float32 `(pairs, 2)` in nats, chosen first, of the pairs that a batch was made of."""
        self.computed += len(pairs)
        with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
            return pair_logps(lm, batch)

    def save(self) -> None:
        """Keeps what was computed, where that is wanted."""


class CachedReferenceLogps(ReferenceLogps):
    """The same, kept in a file of the cache.

    The file's name stands for base, quantisation, precision, versions, reference adapter and template; in it each pair
    is known by a digest of its ids. What is read from it is verified: by a checksum, and by computing the first pairs
    that are asked for once more.

    Args:
        base: with its reference.
        adapter: the folder of the reference adapter, if it has one.
    """

    def __init__(self, base: Base, adapter: str | None):
        super().__init__()
        made_with = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
        made_on = asdict(base.lineage("", adapter)) | {"base": base.origin.identity, "parent": None}
        made_on |= {"double_quant": base.spec.double_quant, "device": base.lm.device.type, "padded": base.padding_reason}
        scale = (Path(adapter) / "adapter_config.json").read_text(encoding="utf-8") if adapter else None
        key = json.dumps([made_with, made_on, scale], sort_keys=True)
        self.file = cache_folder() / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        self._kept: dict[bytes, Tensor] = self._read()
        self._unverified, self._unsaved = bool(self._kept), False

    def logps(self, base: Base, pairs: list[TokenPair], batch: AnswerBatch) -> Tensor:
        digests = [_digest(pair) for pair in pairs]
        if self._unverified and any(digest in self._kept for digest in digests):
            self._verify(base, digests, super().logps(base, pairs, batch))
        missing = list({digest: number for number, digest in enumerate(digests) if digest not in self._kept}.values())
        if missing:
            some = [pairs[number] for number in missing]
            found = super().logps(base, some, batch if len(some) == len(pairs) else base.batch(some)).cpu()
            self._kept |= {digests[number]: values for number, values in zip(missing, found, strict=True)}
            self._unsaved = True
        return torch.stack([self._kept[digest] for digest in digests]).to(batch.input_ids.device)

    def _verify(self, base: Base, digests: list[bytes], found: Tensor) -> None:
        kept = torch.stack([self._kept.get(d, values) for d, values in zip(digests, found.cpu(), strict=True)])
        close = {"rtol": 1e-4, "atol": 1e-3} if base.dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.5}
        if not torch.allclose(kept, found.cpu(), **close):
            tqdm.write(f"note: {self.file} holds other log-probs than the reference gives; they are computed anew")
            self._kept = {}
        self._unverified = False

    def save(self) -> None:
        if not self._unsaved:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "digests": torch.frombuffer(bytearray(b"".join(self._kept)), dtype=torch.uint8).view(len(self._kept), -1),
            "logps": torch.stack(list(self._kept.values())),
        }
        aside = self.file.with_suffix(f".{os.getpid()}")
        save_file(tensors, aside, metadata={"checksum": _checksum(tensors)})
        aside.replace(self.file)
        self._unsaved = False

    def _read(self) -> dict[bytes, Tensor]:
        if not self.file.is_file():
            return {}
        try:
            with safe_open(self.file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("digests", "logps")}
                whole = opened.metadata()["checksum"] == _checksum(tensors)
        except (OSError, KeyError, TypeError, SafetensorError):
            whole = False
        if not whole:
            tqdm.write(f"note: {self.file} is damaged; the reference's log-probs are computed anew")
            return {}
        return dict(zip(map(bytes, tensors["digests"].tolist()), tensors["logps"], strict=True))


def _digest(pair: TokenPair) -> bytes:
    return hashlib.sha256(json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]).encode()).digest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("digests", "logps"))).hexdigest()
