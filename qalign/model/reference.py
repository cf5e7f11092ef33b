"""Log-probs of the reference: computed once per distinct row, and cached for later epochs and later runs."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from qalign.config.atomic import replacing
from qalign.config.cache import alone, cache_folder
from qalign.data.collate import AnswerBatch, AnsweredPrompt
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.memory.lockstep import Reading, pair_logps_together
from qalign.model.memory.shard import anywhere
from qalign.model.memory.stream import stream_of


class ReferenceLogps:
    """Log-probs of the reference, computed when a row (a pair, or a prompt with one answer) is first needed.

    They use the same packing and code as the policy: in 16-bit another path differs by up to 1 nat, and the first DPO
    loss is then not ln 2.
    """

    def __init__(self):
        self.computed = 0  # the number of rows that this process has computed

    def logps(self, base: Base, rows: Sequence[AnsweredPrompt], batch: AnswerBatch) -> Tensor:
        """Summed log-probs of the rows that `batch` was made of: float32 `(rows, answers each)` in nats."""
        self.computed += len(rows)
        with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
            return pair_logps(lm, batch)

    def beside_policy(self, base: Base, rows: Sequence[AnsweredPrompt], batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """(summed log-probs of the policy, with gradients where they are enabled; those of the reference). Layers that
        are streamed are visited once for both."""
        if stream_of(base.lm) is None or self._is_known(rows):
            reference = self.logps(base, rows, batch)
            with base.acting_as(Role.POLICY) as lm:
                return pair_logps(lm, batch), reference
        both = [Reading(Role.REFERENCE, batch), Reading(Role.POLICY, batch, torch.is_grad_enabled())]
        reference, policy = pair_logps_together(base, both)
        self._keep(rows, reference)
        return policy, reference

    def _is_known(self, rows: Sequence[AnsweredPrompt]) -> bool:
        """Whether any of the rows' log-probs needn't be computed."""
        return False

    def _keep(self, rows: Sequence[AnsweredPrompt], logps: Tensor) -> None:
        self.computed += len(rows)

    def fresh(self) -> dict[bytes, Tensor]:
        """The log-probs that were computed since the last call, if they are cached, for other processes."""
        return {}

    def add(self, found: dict[bytes, Tensor]) -> None:
        """Takes over what `fresh` gave another process."""

    def save(self) -> None:
        """Writes new log-probs to the cache, if there is one."""


class CachedReferenceLogps(ReferenceLogps):
    """Log-probs of the reference, cached in a file.

    The file's name is a hash of base, quantisation, dtype, kernels, versions, reference adapter and template; in it,
    a hash of its ids identifies a row. What is read is verified with a checksum, and by computing once more the first
    cached rows that are needed.

    Args:
        adapter: the folder of the reference adapter, if it has one.
        answers: of each row; rows with another number are in a file of their own.
    """

    def __init__(self, base: Base, adapter: str | None, answers: int = 2):
        super().__init__()
        made_with = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
        made_on = asdict(base.lineage("", adapter)) | {"base": base.origin.identity, "parent": None}
        device, padded = base.lm.device.type, base.padding_reason
        made_on |= {"double_quant": base.spec.double_quant, "device": device, "padded": padded}
        made_on |= {"kernels": base.kernels, "answers": answers}
        scale = (Path(adapter) / "adapter_config.json").read_text(encoding="utf-8") if adapter else None
        key = json.dumps([made_with, made_on, scale], sort_keys=True)
        self.file = cache_folder() / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        self._cached: dict[bytes, Tensor] = self._read()
        self._fresh: dict[bytes, Tensor] = {}
        self._unverified, self._unsaved, self._is_writable = bool(self._cached), False, True

    def logps(self, base: Base, rows: Sequence[AnsweredPrompt], batch: AnswerBatch) -> Tensor:
        digests = [_digest(row) for row in rows]
        verifies = self._unverified and any(digest in self._cached for digest in digests)
        if anywhere(base.lm, verifies):
            found = super().logps(base, rows, batch)
            if verifies:
                self._verify(base, digests, found)
        missing = list({digest: i for i, digest in enumerate(digests) if digest not in self._cached}.values())
        if anywhere(base.lm, bool(missing)):
            some = [rows[i] for i in missing] or rows[:1]
            found = super().logps(base, some, batch if len(some) == len(rows) else base.batch(some))
            if missing:
                self._cache(some, found)
        return torch.stack([self._cached[digest] for digest in digests]).to(batch.input_ids.device)

    def _is_known(self, rows: Sequence[AnsweredPrompt]) -> bool:
        return any(_digest(row) in self._cached for row in rows)

    def _keep(self, rows: Sequence[AnsweredPrompt], logps: Tensor) -> None:
        super()._keep(rows, logps)
        self._cache(rows, logps)

    def _cache(self, rows: Sequence[AnsweredPrompt], logps: Tensor) -> None:
        found = {_digest(row): values for row, values in zip(rows, logps.cpu(), strict=True)}
        self._fresh |= found
        self.add(found)

    def fresh(self) -> dict[bytes, Tensor]:
        found, self._fresh = self._fresh, {}
        return found

    def add(self, found: dict[bytes, Tensor]) -> None:
        self._unsaved = self._unsaved or bool(found.keys() - self._cached.keys())
        self._cached |= found

    def _verify(self, base: Base, digests: list[bytes], found: Tensor) -> None:
        cached = torch.stack([self._cached.get(d, values) for d, values in zip(digests, found.cpu(), strict=True)])
        rtol, atol = (1e-4, 1e-3) if base.dtype == torch.float32 else (1e-2, 0.5)
        if not torch.allclose(cached, found.cpu(), rtol=rtol, atol=atol):
            tqdm.write(f"note: {self.file} differs from the log-probs that the reference gives; computing them again")
            self._cached = {}
        self._unverified = False

    def save(self) -> None:
        """Writes new log-probs to the cache. If it can't be written, says so once, and training goes on."""
        if not self._unsaved or not self._is_writable:
            return
        digests = torch.frombuffer(bytearray(b"".join(self._cached)), dtype=torch.uint8).view(len(self._cached), -1)
        tensors = {"digests": digests, "logps": torch.stack(list(self._cached.values()))}
        try:
            with alone(self.file.parent), replacing(self.file) as aside:
                save_file(tensors, aside, metadata={"checksum": _checksum(tensors)})
            self._unsaved = False
        except (OSError, SafetensorError) as error:
            self._is_writable = False
            reason = " ".join(str(error).split())[:120]
            tqdm.write(f"note: {self.file} can't be written ({reason}); going on without this cache")

    def _read(self) -> dict[bytes, Tensor]:
        try:
            if not self.file.is_file():
                return {}
            with safe_open(self.file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("digests", "logps")}
                if opened.metadata()["checksum"] == _checksum(tensors):
                    return dict(zip(map(bytes, tensors["digests"].tolist()), tensors["logps"], strict=True))
        except (OSError, KeyError, TypeError, SafetensorError):
            pass
        tqdm.write(f"note: {self.file} is damaged; computing the reference's log-probs again")
        return {}


def _digest(row: AnsweredPrompt) -> bytes:
    return hashlib.sha256(json.dumps([row.prompt_ids, *row.answers]).encode()).digest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("digests", "logps"))).hexdigest()
