"""PPO on one base, to be read from top to bottom: collect, score, advantages, update.

Sources of each detail: docs/ppo.md. All that is random is drawn from the seed and the number of the iteration, so an
iteration depends on nothing but the state before it, and a resumed run repeats it.
"""

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from qalign import losses
from qalign.config.stages import PPO
from qalign.data.collate import MicroBatchLimit
from qalign.data.prompts import Prompt
from qalign.errors import UserError
from qalign.model.base import Base, Role
from qalign.model.generation import Engine, Sampling
from qalign.model.logps import answer_states, state_entropies, state_logps
from qalign.rl.ppo_setup import optimiser_of, prepare
from qalign.rl.rewards import SampledAnswers, Scorer, combined, sampled_answers, value_start
from qalign.rl.rollout_batch import RolloutBatch

ROLES = (Role.POLICY, Role.REFERENCE, Role.VALUE)  # that read what was sampled
# How far a log-prob may be from itself, computed again in the same way. (In 16 bits it is exact too where kernels are
# deterministic.)
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class PPOTrainer:
    """The loop's parts and their state.

    Args:
        base: with its roles; the policy is being played.
        settings: the recipe's `ppo` section.
        prompts: rows, and their ids.
        scorers: of the reward.
        engine: what samples.
        sampling: how.
        micro: how much one forward pass takes; changes memory and speed, and no number.
        checkpointed_layers: that compute their activations again in the backward.
        iterations: of the whole run.
        seed: the recipe's.

    Attributes:
        done: iterations so far.
        kl_coefficient: as it is now.
        moments: of all scores so far.
        value_units: (shift, factor): the value model's guess is factor × (what its head says − shift).
        tokens_seen: sampled so far.
    """

    def __init__(
        self,
        base: Base,
        settings: PPO,
        prompts: list[tuple[Prompt, list[int]]],
        scorers: list[Scorer],
        engine: Engine,
        sampling: Sampling,
        micro: MicroBatchLimit,
        checkpointed_layers: int,
        iterations: int,
        seed: int,
    ):
        self.base, self.settings, self.prompts, self.scorers = base, settings, prompts, scorers
        self.engine, self.sampling, self.micro, self.seed = engine, sampling, micro, seed
        self.done, self.tokens_seen, self.iterations = 0, 0, iterations
        self.kl_coefficient, self.moments = settings.kl_coefficient, losses.Moments()
        self.seconds: dict[str, float] = defaultdict(float)
        self._checked = False
        self.value_units = 0.0, 1.0
        self._own_values = settings.value == "adapter"
        prepare(base, checkpointed_layers)
        self.weights = {
            f"{role}/{name}": weight
            for role in (Role.POLICY, Role.VALUE)
            for name, weight in base.trained_weights(role).items()
        }
        optimizer, self._rate, self._max_norm = optimiser_of(settings, list(self.weights.values()), iterations)
        self.accelerator = Accelerator(
            mixed_precision="fp16" if base.dtype == torch.float16 else "no", cpu=base.lm.device.type == "cpu"
        )
        self.optimizer = self.accelerator.prepare(optimizer)

    def iterate(self) -> tuple[RolloutBatch, dict[str, float]]:
        """One iteration: (its answers, its metrics under TRL's names).

        Raises:
            UserError: the reward fails or isn't finite (nothing was changed), the loss isn't finite, or log-probs can't
                be repeated.
        """
        began = time.monotonic()
        rollout = self.collect(self._drawn(), self.settings.samples_per_prompt, seed=self._seed(1))
        if not self.done:
            self._check_reference(rollout)
        metrics = self.score(rollout)
        metrics |= self.advantages(rollout)
        metrics |= self.update(rollout)
        if self.settings.kl_target:
            self.kl_coefficient = losses.adapted_kl_coefficient(
                self.kl_coefficient, rollout.kl.mean().item(), self.settings.kl_target
            )
        self.done += 1
        self.tokens_seen += rollout.tokens
        self.seconds["all"] += time.monotonic() - began
        return rollout, metrics

    # --- collect -----------------------------------------------------------------------------------------------------

    def collect(
        self, prompts: list[tuple[Prompt, list[int]]], each: int, seed: int, roles: tuple[Role, ...] = ROLES
    ) -> RolloutBatch:
        """Samples answers, then computes what all roles make of them, in the micro-batches in which the first update
        will see them: the ratio of new to old is then exactly 1 there, in 16 bits too."""
        with self._timed("rollout"):
            found = self.engine.generate(
                self.base, Role.POLICY, [ids for _, ids in prompts], self.sampling, each=each, seed=seed
            )
        rows = [
            sampled_answers(self.base.tokenizer, prompt, ids, answers, self.sampling)
            for (prompt, ids), answers in zip(prompts, found, strict=True)
        ]
        lengths = torch.tensor([len(answer) for row in rows for answer in row.tokens.answers])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        rollout = RolloutBatch(rows, mask, *(torch.zeros(mask.shape) for _ in range(4)))
        with self._timed("scoring"), torch.no_grad(), self.base.packed_attention():
            parts = [micro for mini in self._mini_batches(rows, epoch=0) for micro in mini]
            for role in roles if self._own_values else roles[:2]:
                with self.base.acting_as(role) as lm:
                    for numbers, batch in self._batches(rows, parts):
                        self._read(rollout, role, rollout.places(numbers), answer_states(lm, batch), batch.targets)
        return rollout

    def _read(self, rollout: RolloutBatch, role: Role, where, states: Tensor, targets: Tensor) -> None:
        """Keeps what a role makes of some answers, from the hidden states before their tokens."""
        lm, temperature = self.base.lm, self.sampling.temperature
        if role is Role.VALUE or (role is Role.POLICY and not self._own_values):
            rollout.values[where] = self._values(states).cpu()
        if role is Role.POLICY:
            rollout.old[where] = state_logps(lm, states, targets, temperature).cpu()
            rollout.entropies[where] = state_entropies(lm, states, temperature).cpu()
        if role is Role.REFERENCE:
            rollout.reference[where] = state_logps(lm, states, targets, temperature).cpu()

    # --- score -------------------------------------------------------------------------------------------------------

    def score(self, rollout: RolloutBatch) -> dict[str, float]:
        """The reward of every answer, read at its true end."""
        with self._timed("scoring"):
            scores, means = combined(self.scorers, rollout.rows)
        rollout.scores = scores.flatten()
        kl, length = rollout.kl, rollout.mask.sum(dim=1).float()
        mean = lambda values: (values * rollout.mask).sum(dim=1).mean().item()  # noqa: E731
        k3 = losses.kl_k3(rollout.old, rollout.reference)
        return {
            "objective/scores": rollout.scores.mean().item(),
            "objective/scores_std": rollout.scores.std(correction=0).item(),
            **({f"scores/{name}": value for name, value in means.items()} if len(means) > 1 else {}),
            "objective/kl": kl.mean().item(),
            "objective/kl_k3": mean(k3),
            "objective/entropy": mean(rollout.entropies),
            "policy/entropy_avg": (rollout.entropies.sum() / rollout.tokens).item(),
            "val/num_eos_tokens": int(rollout.ended.sum()),
            "completions/mean_length": length.mean().item(),
        }

    # --- advantages --------------------------------------------------------------------------------------------------

    def advantages(self, rollout: RolloutBatch) -> dict[str, float]:
        """Scores and KL to rewards of tokens, rewards and values to advantages, whitened over the whole batch."""
        settings, scores = self.settings, rollout.scores
        if settings.reward_scaling != "none":
            self.moments = self.moments.updated(scores)
            scores = losses.normalised(scores, self.moments, settings.reward_clip)
        scores = scores - settings.missing_eos_penalty * ~rollout.ended
        if settings.reward_scaling == "prompt":
            scores = losses.centred(scores, rollout.each)
        if not self.done and self._own_values:
            self._take_over_units(rollout, scores)
        log_ratios = losses.log_ratio(rollout.old, rollout.reference)
        rewards = losses.token_rewards(scores, log_ratios, rollout.mask, self.kl_coefficient)
        raw = losses.gae(rewards, rollout.values, rollout.mask, settings.gamma, settings.gae_lambda)
        rollout.returns = (raw + rollout.values) * rollout.mask
        rollout.advantages = losses.whiten(raw, rollout.mask)
        total = rewards.sum(dim=1)
        returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
        return {
            "objective/rlhf_reward": total.mean().item(),
            "objective/non_score_reward": (total - scores).mean().item(),
            "val/explained": 1 - ((returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)).item(),
            "kl_coefficient": self.kl_coefficient,
        }

    def _take_over_units(self, rollout: RolloutBatch, scores: Tensor) -> None:
        """A copy of the reward model speaks in the reward model's units, and before an answer's end its level means
        nothing. Left so, every last token's advantage would carry the offset, whatever the score: the policy would
        learn to end at once, or never. So its first guesses get the mean of what they guess at, and its spread."""
        if not (copied := value_start(self.scorers)):
            return
        guesses = rollout.values[rollout.mask]
        spreads = [values.std(correction=0).item() for values in (scores, guesses)]
        known = min(spreads) > 1e-3  # where all are alike, there is no unit to learn from them
        factor = math.copysign(spreads[0] / spreads[1] if known else 1.0, copied.weight)
        shift = guesses.mean().item() - scores.mean().item() / factor
        self.value_units = shift, factor
        rollout.values = (rollout.values - shift) * factor * rollout.mask

    # --- update ------------------------------------------------------------------------------------------------------

    def update(self, rollout: RolloutBatch) -> dict[str, float]:
        """Several passes over the answers in shuffled mini-batches, an optimiser step each, until the policy is too far
        from the one that sampled."""
        sums: dict[str, float] = defaultdict(float)
        # One iteration's rate for all its updates; counted from 1, as a warm-up from 0 would waste its answers.
        rate = self._rate(self.done + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._timed("update"), self.base.packed_attention():
            self.base.model.train()  # for the checkpointed layers; dropout is 0
            for mini in self._schedule(rollout.rows):
                found = self._gradients(rollout, mini)
                self._check(found)
                too_far = self.settings.kl_stop is not None and found["approxkl"] > self.settings.kl_stop
                if not too_far:
                    norm = self.accelerator.clip_grad_norm_(list(self.weights.values()), self._max_norm)
                    self._check_finite(norm)
                    self.optimizer.step()
                self.optimizer.zero_grad()  # to None: no gradient stays in memory while answers are sampled
                for name, value in found.items():
                    sums[name] += value
                sums["steps"] += not too_far
                sums["mini_batches"] += 1
                if too_far:
                    break
            self.base.model.eval()
        count = sums["mini_batches"]
        return {
            "loss": sums["loss"] / count,
            "loss/policy_avg": sums["policy"] / count,
            "loss/value_avg": sums["value"] / count,
            "policy/approxkl_avg": sums["approxkl"] / count,
            "policy/clipfrac_avg": sums["clipped"] / count,
            "val/clipfrac_avg": sums["value_clipped"] / count,
            "val/ratio": sums["ratio"] / count,
            "optimizer_steps": sums["steps"],
            "lr": rate,
        }

    def _gradients(self, rollout: RolloutBatch, mini: list[list[int]]) -> dict[str, float]:
        """Forward and backward of one mini-batch; each loss is a mean over its tokens, whatever the micro-batches."""
        settings, sums = self.settings, defaultdict(float)
        tokens = len(rollout.places([number for micro in mini for number in micro])[0])
        for numbers, batch in self._batches(rollout.rows, mini):
            old, advantages, old_values, returns = self._of(rollout, numbers, "old", "advantages", "values", "returns")
            with self.base.acting_as(Role.POLICY) as lm:
                states = answer_states(lm, batch)
                logps = state_logps(lm, states, batch.targets, self.sampling.temperature)
                loss, clipped = losses.clipped_policy_loss(logps, old, advantages, settings.clip)
                total = loss.sum() / tokens
                if not self._own_values:
                    total = total + self._value_loss(self._values(states.detach()), old_values, returns, tokens, sums)
                self.accelerator.backward(total)
            ratios = (logps.detach() - old).exp()
            sums["policy"] += loss.detach().sum().item() / tokens
            sums["clipped"] += clipped.sum().item() / tokens
            sums["approxkl"] += losses.kl_k3(old, logps.detach()).sum().item() / tokens
            sums["ratio"] += ratios.sum().item() / tokens
            sums["furthest"] = max(sums["furthest"], (logps.detach() - old).abs().max().item())
        if self._own_values:
            with self.base.acting_as(Role.VALUE) as lm:  # its backward inside: checkpointed layers run again
                for numbers, batch in self._batches(rollout.rows, mini):
                    old_values, returns = self._of(rollout, numbers, "values", "returns")
                    values = self._values(answer_states(lm, batch))
                    self.accelerator.backward(self._value_loss(values, old_values, returns, tokens, sums))
        sums["loss"] = sums["policy"] + settings.value_coefficient * sums["value"]
        return sums

    def _value_loss(self, values: Tensor, old: Tensor, returns: Tensor, tokens: int, sums: dict) -> Tensor:
        loss, clipped = losses.clipped_value_loss(values, old, returns, self.settings.value_clip)
        sums["value"] += loss.detach().sum().item() / tokens
        sums["value_clipped"] += clipped.sum().item() / tokens
        return self.settings.value_coefficient * loss.sum() / tokens

    # --- what these need ---------------------------------------------------------------------------------------------

    def _values(self, states: Tensor) -> Tensor:
        shift, factor = self.value_units
        return (self.base.values(states) - shift) * factor

    def _drawn(self) -> list[tuple[Prompt, list[int]]]:
        """The prompts of this iteration: every prompt once, in an order drawn anew, before any comes again."""
        count = self.settings.batch_size // self.settings.samples_per_prompt
        places = range(self.done * count, (self.done + 1) * count)
        return [self.prompts[self._order(place // len(self.prompts))[place % len(self.prompts)]] for place in places]

    def _order(self, time: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + time)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _seed(self, what: int) -> int:
        return (self.seed * 1_000_003 + self.done) * 16 + what

    def _schedule(self, rows: list[SampledAnswers]) -> Iterator[list[list[int]]]:
        for epoch in range(self.settings.update_epochs):
            yield from self._mini_batches(rows, epoch)

    def _mini_batches(self, rows: list[SampledAnswers], epoch: int) -> list[list[list[int]]]:
        """The numbers of the prompts in each mini-batch of a pass, in micro-batches."""
        generator = torch.Generator().manual_seed(self._seed(2) + 4096 * epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        size = math.ceil(len(order) / self.settings.mini_batches)
        numbers = {id(row.tokens): number for number, row in enumerate(rows)}
        return [
            [
                [numbers[id(tokens)] for tokens in micro]
                for micro in self.base.micro_batches([rows[n].tokens for n in order[start : start + size]], self.micro)
            ]
            for start in range(0, len(order), size)
        ]

    def _batches(self, rows: list[SampledAnswers], parts: Sequence[list[int]]):
        for numbers in parts:
            yield numbers, self.base.batch([rows[number].tokens for number in numbers])

    def _of(self, rollout: RolloutBatch, numbers: list[int], *names: str) -> list[Tensor]:
        """Tensors of a rollout, token by token as a batch of these prompts has them, on the model's device."""
        where = rollout.places(numbers)
        return [getattr(rollout, name)[where].to(self.base.lm.device) for name in names]

    def _check(self, found: dict[str, float]) -> None:
        if not math.isfinite(found["loss"]):
            raise UserError(
                f"iteration {self.done + 1}: the loss is not finite; the last checkpoint, if there is one, is "
                "kept. Try a lower learning_rate, or compute_dtype: bfloat16 or float32"
            )
        if not self._checked and found["furthest"] > EXACT[self.base.dtype]:
            raise UserError(
                f"the policy's log-probs can't be repeated: {found['furthest']:.2g} nats off before the first update, "
                "where the ratio must be 1; is there randomness in this model? Try compute_dtype: float32"
            )
        self._checked = True

    def _check_reference(self, rollout: RolloutBatch) -> None:
        """Before the first update the policy is the reference."""
        furthest = (rollout.old - rollout.reference).abs().max().item()
        if furthest > EXACT[self.base.dtype]:
            raise UserError(
                f"the policy is {furthest:.2g} nats a token from its reference before the first update, where KL must "
                "be 0; is there randomness in this model? Try compute_dtype: float32"
            )

    def _check_finite(self, norm: Tensor) -> None:
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            raise UserError(
                f"iteration {self.done + 1}: the gradients are not finite; nothing was updated, and the last "
                "checkpoint, if there is one, is kept. Try a lower learning_rate, or compute_dtype: float32"
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.monotonic() - began

    def state(self) -> dict:
        """All that the next iteration depends on, for `torch.save`."""
        scaler = self.accelerator.scaler
        return {
            "weights": {name: weight.detach().cpu() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "done": self.done,
            "tokens_seen": self.tokens_seen,
            "kl_coefficient": self.kl_coefficient,
            "moments": tuple(self.moments),
            "value_units": self.value_units,
            "rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
        }

    def load_state(self, state: dict) -> None:
        """Goes on from what `state` gave."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.done, self.tokens_seen = state["done"], state["tokens_seen"]
        self.kl_coefficient, self.moments = state["kl_coefficient"], losses.Moments(*state["moments"])
        self.value_units = state["value_units"]
        torch.set_rng_state(state["rng"])
        random.setstate(state["python_rng"])
