"""What each stage's own held-out rows say before and after training, measured on the one base in memory.

`of_pairs` is for DPO and KTO, `of_labelled` for KTO's single answers, `of_dialogues` for SFT and for the alignment tax,
`of_scores` for reward models, `of_policy` for what learned from a reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from qalign.config.stages import DPO, KTO
from qalign.data.collate import AnsweredPrompt, MicroBatchLimit, in_groups
from qalign.data.formats import Prompt
from qalign.data.store.sequences import IGNORED, TokenAnswers, TokenDialogue, TokenLabelled, TokenPair
from qalign.data.tokenize import encode_questions
from qalign.errors import scores_not_finite
from qalign.losses.kto import kl_estimate, label_loss
from qalign.losses.preference import PreferenceLoss, margin, shares
from qalign.model.adapters.members import Ensemble, answer_scores
from qalign.model.base import Base, Role
from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of
from qalign.model.logps import token_scores
from qalign.model.memory.lockstep import Reading, pair_logps_together, read_together
from qalign.reports import reward_report
from qalign.reports.answers import SEED, SIDE_BY_SIDE, Answer, answers_of, change, measure_answers, spread
from qalign.rl.ppo_setup import Setup, read_answers
from qalign.rl.rewards import combined
from qalign.rl.rollout_batch import SampledAnswers
from qalign.train.processes.world import current
from qalign.train.trainers.policy import mismatched

ANSWERED = 16  # held-out prompts that are answered before and after
MAX_NEW_TOKENS = 128
BATCH_TOKENS = 2048

Figures = dict[str, Any]
Found = TypeVar("Found")


def batches_of(base: Base, rows: Sequence[AnsweredPrompt]) -> list[list[AnsweredPrompt]]:
    """Rows in groups for one forward pass each."""
    limit = MicroBatchLimit(tokens=BATCH_TOKENS)
    return [some for group in in_groups(rows) for some in base.micro_batches(group, limit)]


def over_all(base: Base, rows: Sequence[AnsweredPrompt], what: str, work: Callable[[Any], Found]) -> list[Any]:
    """(Batch of rows, what `work` gives for it), batch by batch. Several processes share the batches that one process
    would run. `what` is the word beside the progress bar."""
    world, batches = current(), batches_of(base, rows) if rows else []
    own = world.mine(batches, [sum(map(base.tokens_taken, some)) for some in batches])

    def worked() -> list[tuple[int, Found]]:
        return [(number, work(some)) for number, some in tqdm(own, desc=what, unit="batch")]

    return [*zip(batches, world.merged(world.agreed(worked)), strict=True)]


def sampled(base: Base, role: str, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
    """An answer to each prompt, as token ids; several processes answer some of them each."""
    world, engine = current(), TransformersEngine()
    own = [number for number, _ in world.mine(prompts, [*map(len, prompts)])]
    found = world.agreed(
        lambda: engine.generate(base, role, prompts, sampling, num_samples=1, seed=0, only=own) if own else []
    )
    return [ids for (ids,) in world.merged(zip(own, found, strict=True))]


@torch.no_grad()
def answer_logps(base: Base, roles: Sequence[str], rows: Sequence[AnsweredPrompt]) -> dict[str, Tensor]:
    """Log-probs of the answers, summed over their tokens, under each role: float64 `(rows, answers each)` on the CPU,
    in the order given."""
    rows = [*rows]
    numbers, shape = {id(row): number for number, row in enumerate(rows)}, (len(rows), len(rows[0].answers))
    found = {role: torch.zeros(shape, dtype=torch.float64) for role in roles}

    def read(some: Sequence[AnsweredPrompt]) -> list[Tensor]:
        batch = base.batch(some)
        together = pair_logps_together(base, [Reading(role, batch) for role in roles])
        return [logps.double().cpu() for logps in together]

    base.model.eval()
    with base.packed_attention():
        for some, logps in over_all(base, rows, "measuring", read):
            places = [numbers[id(row)] for row in some]
            for role, values in zip(roles, logps, strict=True):
                found[role][places] = values
    return found


def of_pairs(base: Base, pairs: Sequence[TokenPair], settings: DPO | KTO) -> Figures:
    """Preference figures of reference and policy on held-out pairs, by the recipe's `settings`.

    Returns:
        `accuracy_base`, `accuracy_before` and `accuracy_after`: of the bare base, the reference and the policy, the
        share of pairs whose chosen answer has the higher mean log-prob per token; a tie counts a half, the raters' too.
        `accuracy_error`: standard error of the last one. `pairs_gained`, `pairs_lost`: number of pairs that the policy
        gets right and the reference doesn't, and the reverse. `reward_accuracy` and `reward_margin`: share of positive
        margins, and mean margin, of the reward that the loss trains (`PreferenceLoss.rewards`). `pairs`: their number.
    """
    roles = [Role.REFERENCE, Role.POLICY]
    if Role.REFERENCE in base.adapters:  # otherwise the reference is the bare base
        roles.insert(0, Role.BASE)
    logps = answer_logps(base, roles, pairs)
    lengths = torch.tensor([[len(answer) for answer in pair.answers] for pair in pairs])
    labels = torch.tensor([pair.chosen_probability for pair in pairs], dtype=torch.float64)
    found: dict[str, Tensor] = {role: margin(logps[role] / lengths) for role in roles}
    reference = logps[Role.REFERENCE] if settings.needs_reference else None
    rewards = PreferenceLoss(**settings.loss_options).rewards(logps[Role.POLICY], reference, lengths)
    found["reward"] = margin(rewards)
    accuracy = {name: shares(values, labels).mean().item() for name, values in found.items()}
    gains = shares(found[Role.POLICY], labels) - shares(found[Role.REFERENCE], labels)
    return {
        "pairs": len(pairs),
        "accuracy_base": accuracy[roles[0]],
        "accuracy_before": accuracy[Role.REFERENCE],
        "accuracy_after": accuracy[Role.POLICY],
        "accuracy_error": sqrt(accuracy[Role.POLICY] * (1 - accuracy[Role.POLICY]) / len(pairs)),
        "pairs_gained": int((gains > 0).sum()),
        "pairs_lost": int((gains < 0).sum()),
        "reward_accuracy": accuracy["reward"],
        "reward_margin": found["reward"].mean().item(),
    }


@torch.no_grad()
def of_labelled(base: Base, rows: Sequence[TokenLabelled], settings: KTO) -> Figures:
    """KTO's own figures on held-out answers that are labelled good or bad, before training (policy = reference) and
    after it, by the recipe's `settings`.

    Returns:
        `rows`: their number. `loss`: its name. `loss_change`: its mean, as `change` has it, as the trainer measures it
        (the KL estimate is over `batch_size` rows). `rewards`: of `desirable` and `undesirable` answers, if there are
        any, the mean of beta (log pi - log pi_ref) as `change` has it, and the number of `answers`.
    """
    rows, roles, size = [*rows], [Role.REFERENCE, Role.POLICY], settings.batch_size
    reference, policy = (logps[:, 0] for logps in map(answer_logps(base, roles, rows).__getitem__, roles))
    kl = torch.zeros_like(policy)
    if settings.loss == "kto":
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        others = answer_logps(base, roles, [row for some in groups for row in mismatched(some, base.max_length)])
        both = zip(others[Role.POLICY].split(size), others[Role.REFERENCE].split(size), strict=True)
        kl = torch.cat([kl_estimate(*some).expand(len(some[0])) for some in both])
    desirable = torch.tensor([row.desirable for row in rows])
    weights = {"desirable_weight": settings.desirable_weight, "undesirable_weight": settings.undesirable_weight}

    def losses(logps: Tensor, kl: Tensor) -> list[float]:
        return label_loss(settings.loss, logps, reference, desirable, kl, beta=settings.beta, **weights).tolist()

    rewards, found = settings.beta * (policy - reference), dict[str, Figures]()
    for name, of_side in (("desirable", desirable), ("undesirable", ~desirable)):
        if values := rewards[of_side].tolist():
            found[name] = {"answers": len(values), **change([0.0] * len(values), values)}
    moved = change(losses(reference, torch.zeros_like(kl)), losses(policy, kl))
    return {"rows": len(rows), "loss": settings.loss, "loss_change": moved, "rewards": found}


@torch.no_grad()
def of_dialogues(base: Base, rows: Sequence[TokenDialogue], before: str, after: str = Role.POLICY) -> Figures:
    """How well two roles predict the supervised tokens of dialogues.

    Returns:
        `rows`, `tokens`: how many. `loss`: mean negative log-likelihood in nats per token, as `change` has it, rows
        resampled. `perplexity` and `token_accuracy` (share of tokens that are the most likely one): `before`, `after`.
    """
    rows = [*rows]
    asked = [TokenAnswers(row.ids[:1], (row.ids[1:],)) for row in rows]  # the first token is predicted from nothing
    numbers = {id(row): number for number, row in enumerate(asked)}
    sums = {role: torch.zeros(len(rows), 2, dtype=torch.float64) for role in (before, after)}  # nats, tokens right

    def read(some: Sequence[TokenAnswers]) -> list[Tensor]:
        batch, found = base.batch(some), list[Tensor]()
        counts = [label != IGNORED for row in some for label in rows[numbers[id(row)]].labels[1:]]
        mask, readings = torch.tensor(counts, device=base.device), [Reading(role, batch) for role in sums]
        for reading, states in zip(readings, read_together(base, readings), strict=True):
            with reading.on(base) as lm:
                scored = token_scores(lm, states[mask], batch.targets[mask])
            values = torch.stack([-scored.logps.double(), scored.is_top.double()], dim=1).cpu()
            found.append(values.new_zeros(len(some), 2).index_add_(0, batch.owners[mask].cpu(), values))
        return found

    base.model.eval()
    with base.packed_attention():
        for some, found in over_all(base, asked, "reading", read):
            for role, values in zip(sums, found, strict=True):
                sums[role][[numbers[id(row)] for row in some]] = values
    tokens = torch.tensor([sum(label != IGNORED for label in row.labels[1:]) for row in rows])
    means = {role: (values / tokens[:, None]).T.tolist() for role, values in sums.items()}
    loss = change(means[before][0], means[after][0], tokens.tolist())
    right = {role: (values[:, 1].sum() / tokens.sum()).item() for role, values in sums.items()}
    return {
        "rows": len(rows),
        "tokens": int(tokens.sum()),
        "loss": loss,
        "perplexity": {name: exp(loss[name]) for name in ("before", "after")},
        "token_accuracy": {"before": right[before], "after": right[after]},
    }


def of_scores(base: Base, model: str | Ensemble, pairs: Sequence[TokenPair]) -> tuple[Figures, Tensor]:
    """(What the bare base itself prefers, by mean log-prob per token, before there was a reward model:
    `accuracy_base` and its 95% interval; the reward model's scores of the pairs `(pairs, 2, members)`.)"""
    logps = answer_logps(base, [Role.BASE], pairs)[Role.BASE]
    lengths = torch.tensor([[len(answer) for answer in pair.answers] for pair in pairs])
    labels = torch.tensor([pair.chosen_probability for pair in pairs], dtype=torch.float64)
    accuracy = shares(margin(logps / lengths), labels).mean().item()
    world, limit = current(), MicroBatchLimit(tokens=BATCH_TOKENS)
    own = world.agreed(lambda: answer_scores(base, model, pairs, limit, progress=True, mine=world.mine))
    scores = torch.stack(world.gathered(own)).sum(dim=0)
    if not scores.isfinite().all():
        raise scores_not_finite(base.precision)
    interval = reward_report.wilson(accuracy, len(pairs))
    figures = {"pairs": len(pairs), "accuracy_base": accuracy, "accuracy_base_interval": interval}
    return figures, scores.view(len(scores), 2, -1)


@dataclass(frozen=True)
class Answered:
    """Answers of the models to the same held-out prompts."""

    prompts: list[Prompt]
    answers: dict[str, list[Answer]]
    """By model: `base`, `SFT` if the run started from one, and `aligned`; fewer of a base that is not the reference."""
    max_new_tokens: int

    @property
    def figures(self) -> Figures:
        """`before` and `after` training as `measure_answers` has them, the number of texts that are `unchanged`, and
        `max_new_tokens`."""
        *_, before, after = self.answers.values()
        same = sum(one.text == other.text for one, other in zip(before, after, strict=True))
        both = {"before": measure_answers(before), "after": measure_answers(after)}
        return {**both, "unchanged": same, "max_new_tokens": self.max_new_tokens}


def greedy_answers(base: Base, asked: Sequence[Prompt]) -> Answered:
    """Greedy answers of the reference and the policy to `ANSWERED` prompts, spread evenly over the rows; of a bare base
    beside them, what will be shown."""
    new = min(MAX_NEW_TOKENS, base.max_length // 2)
    prompts, _ = encode_questions(base.template, spread(asked, ANSWERED), base.max_length - new)
    sampling, with_sft = Sampling(new, 0.0, stop_ids_of(base.template)), Role.REFERENCE in base.adapters
    roles = {"base": Role.BASE, "SFT": Role.REFERENCE} if with_sft else {"base": Role.REFERENCE}
    answers = {}
    for name, role in (roles | {"aligned": Role.POLICY}).items():
        ids = [ids for _, ids in (spread(prompts, SIDE_BY_SIDE) if role is Role.BASE else prompts)]
        answers[name] = answers_of(base.tokenizer, sampled(base, role, ids, sampling), sampling.stop_ids)
    return Answered([prompt for prompt, _ in prompts], answers, new)


def of_policy(setup: Setup, limit: MicroBatchLimit) -> tuple[Figures, Answered]:
    """What a policy earns that learned from a reward, on the held-out prompts of `setup`, whose base has the policy and
    its reference. Both answer each prompt once, at the temperature of the run, with the same random numbers.

    Returns:
        `prompts`: their number. `reward`, and with a judge `judge`: mean scores as `change` has them, prompts
        resampled. `kl_nats`: KL from the reference, the mean of log π − log π_ref over the policy's answers, as
        `change` from 0. `answers`: as `Answered.figures`. And the answers themselves.
    """
    base, prompts, scores = setup.base, setup.rows.held_out, dict[str, list[list[float]]]()
    answers, rows = dict[str, list[Answer]](), list[SampledAnswers]()
    name = "SFT" if Role.REFERENCE in base.adapters else "base"
    scorers = {"reward": setup.scorers.reward} | ({"judge": setup.scorers.judge} if setup.scorers.judge else {})
    for model, role in ((name, Role.REFERENCE), ("aligned", Role.POLICY)):  # an ensemble's zero is the mean before
        rows = setup.sample(prompts, 1, SEED, role)
        found = [row.tokens.answers[0] for row in rows]
        answers[model] = answers_of(base.tokenizer, found, setup.sampling.stop_ids)
        for key, some in scorers.items():
            scores.setdefault(key, []).append(combined(some, rows)[0][:, 0].tolist())
    kl = cast(list[float], read_answers(base, rows, limit, setup.sampling.temperature).kl.tolist())
    answered = Answered([prompt for prompt, _ in prompts], answers, setup.sampling.max_new_tokens)
    figures: Figures = {key: change(before, after) for key, (before, after) in scores.items()}
    figures |= {"kl_nats": change([0.0] * len(kl), kl), "answers": answered.figures}
    return {"prompts": len(prompts), **figures}, answered
