"""How far an exported model is from the trained one: the KL divergence of what both predict, in nats.

A policy first answers held-out prompts greedily. At each position of these answers, the end of turn included, the KL
divergence is that of the whole next-token distributions, KL(trained || exported). For a reward model the distribution
is the Bradley-Terry probability that the chosen answer of a held-out pair is the better one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from qalign.convert.merging import HEADROOM, fits_in_float32
from qalign.data.formats import Preference, Prompt
from qalign.data.tokenize import encode_pairs, encode_questions
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import Base, Role, load
from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of
from qalign.model.loading import auto_class
from qalign.model.logps import backbone, head_logits
from qalign.train.dataset import rendered_at
from qalign.train.run_folder import RunFolder

MAX_NEW_TOKENS = 64
Row = tuple[list[int], list[int]]  # (ids of a prompt, ids of an answer)


@dataclass(frozen=True)
class Fidelity:
    """How far an exported model is from the trained one, on `rows` prompts (of a reward model: pairs)."""

    kl_nats: float  # mean over tokens (of a reward model: over pairs)
    tokens: int  # that were compared; of a reward model the number of answers
    same: int  # rows with the same greedy answer (of a reward model: the same order of the two answers)
    rows: int
    is_reward: bool

    def __str__(self) -> str:
        if self.is_reward:
            return (
                f"{self.kl_nats:.5f} nats a pair from the trained reward model; "
                f"the same order in {self.same} of {self.rows} pairs"
            )
        return (
            f"{self.kl_nats:.5f} nats a token from the trained model on {self.tokens:,} tokens; "
            f"the same greedy answer to {self.same} of {self.rows} prompts"
        )

    def check(self, max_kl: float, *, force: bool) -> None:
        """A `UserError` if the exported model is too far from the trained one."""
        if not self.kl_nats <= max_kl and not force:  # NaN is too far as well
            unit = "pair" if self.is_reward else "token"
            raise UserError(
                f"--max-kl: the exported model is {self.kl_nats:.4f} nats a {unit} from the trained one, more than "
                f"{max_kl:g}; nothing was written; raise --max-kl, or write it anyway with --force"
            )


class Trained:
    """What the trained model of a run says about some rows, against which exported models are measured."""

    def __init__(self, run: RunFolder, rows: Sequence[Prompt] | Sequence[Preference], *, bare: bool = False):
        """`bare`: the base without the adapter is what is exported."""
        base = load(run.recipe.model, now=rendered_at(run))
        lineage.check(str(run.path), run.adapter, base.lineage(run.stage))
        self.is_reward, self.template = run.stage == "reward", base.template
        self.role = Role.BASE if bare else Role.REWARD if self.is_reward else Role.POLICY
        if not bare:
            base.load_adapter(self.role, str(run.adapter), trainable=False)
        self.rows = _pairs(base, rows) if self.is_reward else _answered(base, self.role, rows)
        with base.acting_as(self.role) as lm:
            score = (lambda ids: base.head_scores(self.role, _states(lm, ids)[-1:])[0]) if self.is_reward else None
            self.outputs = self._outputs(lm, score)

    def compare(self, lm: Any) -> Fidelity:
        """An exported model, of transformers: a sequence classifier for a reward model."""
        score = (lambda ids: lm(input_ids=_tensor(lm, ids)).logits[0, 0].float()) if self.is_reward else None
        outputs = self._outputs(lm, score)
        if self.is_reward:
            before, after = (torch.stack(found).view(-1, 2) for found in (self.outputs, outputs))
            p, q = before[:, 0] - before[:, 1], after[:, 0] - after[:, 1]
            kl = p.sigmoid() * (logsigmoid(p) - logsigmoid(q)) + (-p).sigmoid() * (logsigmoid(-p) - logsigmoid(-q))
            return Fidelity(kl.mean().item(), len(self.rows), int(((p > 0) == (q > 0)).sum()), len(p), True)
        kls = [(p.exp() * (p - q)).sum(dim=1) for p, q in zip(self.outputs, outputs, strict=True)]
        same = sum(
            bool((q.argmax(dim=1) == torch.tensor(answer)).all())
            for q, (_, answer) in zip(outputs, self.rows, strict=True)
        )
        kl = torch.cat(kls)
        return Fidelity(kl.mean().item(), len(kl), same, len(self.rows), False)

    @torch.no_grad()
    def _outputs(self, lm: Any, score: Callable[[list[int]], Tensor] | None) -> list[Tensor]:
        """Of each row, on the CPU: log-probs `(tokens of the answer, vocabulary)`, or a scalar score."""
        found = []
        for prompt, answer in tqdm(self.rows, desc="measuring", unit="row", disable=None):
            ids = prompt + answer
            if score is not None:
                found.append(score(ids).cpu())
            else:
                states = _states(lm, ids)[len(prompt) - 1 : -1]
                found.append(head_logits(lm, states).float().log_softmax(dim=1).cpu())
        return found


def load_exported(folder: Path, *, is_reward: bool = False) -> Any:
    """A merged folder, ready to be measured."""
    config = tf.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = tf.AutoModelForSequenceClassification if is_reward else auto_class(config)
    return placed(auto.from_pretrained(folder, trust_remote_code=False))


def placed(lm: Any) -> Any:
    """A model in float32, on the GPU if it fits there; in its own dtype where the memory is too small for that."""
    if torch.cuda.is_available() and HEADROOM * 4 * lm.num_parameters() < torch.cuda.mem_get_info()[0]:
        return lm.float().to("cuda").eval()
    return (lm.float() if fits_in_float32(lm) else lm).eval()


def _tensor(lm: Any, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=lm.device)


def _states(lm: Any, ids: list[int]) -> Tensor:
    return backbone(lm)(input_ids=_tensor(lm, ids), use_cache=False).last_hidden_state[0]


def _answered(base: Base, role: str, rows: Sequence[Any]) -> list[Row]:
    new = min(MAX_NEW_TOKENS, base.max_length // 2)
    asked, unfit = encode_questions(base.template, list(rows), base.max_length - new)
    if not asked:
        raise UserError(f"--prompts: none of the {len(unfit)} prompts can be used: {unfit[0].reason}")
    prompts, sampling = [ids for _, ids in asked], Sampling(new, 0.0, stop_ids_of(base.template))
    answers = TransformersEngine().generate(base, role, prompts, sampling, num_samples=1, seed=0)
    return [(prompt, answer) for prompt, (answer,) in zip(prompts, answers, strict=True)]


def _pairs(base: Base, rows: Sequence[Any]) -> list[Row]:
    pairs, unfit = encode_pairs(base.template, list(rows), base.max_length)
    if not pairs:
        raise UserError(f"--prompts: none of the {len(unfit)} pairs can be used: {unfit[0].reason}")
    return [(pair.prompt_ids, answer) for pair in pairs for answer in pair.answers]
