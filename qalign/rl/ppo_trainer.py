"""One PPO iteration, in the order in which it runs: collect, score, advantages, update.

docs/ppo.md gives the source of each detail. Every random number comes from the recipe's seed and the number of the
iteration, so an iteration depends only on the state before it, and a resumed run repeats it.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from qalign.config.stages import PPO
from qalign.data.collate import AnswerBatch, MicroBatchLimit
from qalign.errors import UserError, gradients_not_finite, not_finite
from qalign.losses import policy_gradient as losses
from qalign.model.base import Role
from qalign.model.logps import answer_states, state_logps, token_scores
from qalign.model.memory.first_step import FirstStep
from qalign.rl.ppo_setup import EncodedPrompt, Setup, make_deterministic, make_optimizer
from qalign.rl.rewards import combined, value_start
from qalign.rl.rollout_batch import Indices, RolloutBatch, SampledAnswers
from qalign.rl.user_code import random_state, set_stream_state, stream_state

ROLES = (Role.POLICY, Role.REFERENCE, Role.VALUE)
# Nats by which a log-prob may differ when computed twice. (In 16 bits too it is equal where kernels are deterministic.)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
COUNTERS = ("done", "tokens_seen", "kl_coefficient", "value_units")  # attributes that a checkpoint keeps as they are


class PPOTrainer:
    """The steps of PPO and their state.

    Args:
        setup: the base with policy, reference, value model and scorers attached; the prompts.
        limit: bound of one forward pass; changes memory and speed, and no number.
        iterations: of the whole run; `done` counts the finished ones.

    Attributes:
        kl_coefficient: its current value; `kl_target` and alarms change it.
        value_units: (shift, factor); a value is factor × (output of the value head − shift).
        seconds: wall-clock time by part: rollout, scoring, update, all.
    """

    def __init__(
        self, setup: Setup, settings: PPO, limit: MicroBatchLimit, checkpointed_layers: int, iterations: int, seed: int
    ):
        self.setup, self.base, self.scorers = setup, setup.base, setup.scorers.reward
        self.settings, self.limit, self.iterations, self.seed = settings, limit, iterations, seed
        self._first_step = FirstStep(limit)
        self.done, self.tokens_seen = 0, 0
        self.kl_coefficient, self.moments, self.value_units = settings.kl_coefficient, losses.Moments(), (0.0, 1.0)
        self.seconds: dict[str, float] = defaultdict(float)
        self._ratio_checked, self._value_adapter = False, settings.value == "adapter"
        set_stream_state(random_state())  # a run's functions draw what its seed gives, whatever ran before
        make_deterministic(self.base, checkpointed_layers)
        self.weights = {
            f"{role}/{name}": weight
            for role in (Role.POLICY, Role.VALUE)
            for name, weight in self.base.trained_weights(role).items()
        }
        trained = list(self.weights.values())
        optimizer, self._learning_rate, self._max_norm = make_optimizer(settings, trained, iterations)
        precision = "fp16" if self.base.dtype == torch.float16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=self.base.lm.device.type == "cpu")
        self.optimizer = self.accelerator.prepare(optimizer)

    def iterate(self) -> tuple[RolloutBatch, dict[str, float]]:
        """One iteration: (its answers, its metrics under TRL's names). Raises a `UserError` if a scorer fails (the
        weights are unchanged), the loss or the gradients are not finite, or log-probs can't be repeated."""
        began = time.monotonic()
        rollout = self.collect(self._next_prompts(), self.settings.samples_per_prompt, seed=self._seed(1))
        if not self.done:
            furthest = (rollout.old_logps - rollout.reference_logps).abs().max().item()
            problem = "the policy is {} from its reference before the first update, where KL must be 0"
            self._check_equal(furthest, problem)
        metrics = self.score(rollout) | self._learn(rollout)
        if self.settings.kl_target:
            self.kl_coefficient = losses.adapted_kl_coefficient(
                self.kl_coefficient, rollout.kl.mean().item(), self.settings.kl_target
            )
        self.done += 1
        self.tokens_seen += rollout.tokens
        self.seconds["all"] += time.monotonic() - began
        return rollout, metrics

    def _learn(self, rollout: RolloutBatch) -> dict[str, float]:
        """Advantages and update. Where memory runs out before the first optimiser step, all roles read the answers
        again, as they must in the micro-batches of the update."""
        read = [True]

        def learn() -> dict[str, float]:
            if not read:
                self._read_all(rollout, ROLES)
            read.clear()
            return self.advantages(rollout) | self.update(rollout)

        sizes = [self.base.tokens_taken(row.tokens) for row in rollout.rows]
        return self._first_step.run(learn, sizes, self.optimizer.zero_grad, self, ("moments", "value_units"))

    def collect(
        self, prompts: list[EncodedPrompt], num_samples: int, seed: int, roles: Sequence[Role] = ROLES
    ) -> RolloutBatch:
        """Samples answers, then runs every role over them in the micro-batches of the first update. So the ratio of
        new to old probability is exactly 1 at the first update, in 16 bits too."""
        with self._timed("rollout"):
            rows = self.setup.sample(prompts, num_samples, seed)
        rollout = RolloutBatch.empty(rows)
        self._read_all(rollout, roles)
        return rollout

    def _read_all(self, rollout: RolloutBatch, roles: Sequence[Role]) -> None:
        with self._timed("scoring"), torch.no_grad(), self.base.packed_attention():
            parts = [micro for mini in self._mini_batches(rollout.rows, epoch=0) for micro in mini]
            for role in roles:
                if role is Role.VALUE and not self._value_adapter:
                    continue  # read from the policy's hidden states
                with self.base.acting_as(role) as lm:
                    for where, batch in self._batches(rollout, parts):
                        self._read(rollout, role, lm, where, batch)

    def _read(self, rollout: RolloutBatch, role: Role, lm: PreTrainedModel, where: Indices, batch: AnswerBatch) -> None:
        """Fills the tensors of a rollout from one forward pass of a role."""
        temperature, states = self.setup.sampling.temperature, answer_states(lm, batch)
        if role is Role.VALUE or (role is Role.POLICY and not self._value_adapter):
            rollout.values[where] = self._values(states).cpu()
        if role is Role.POLICY:
            found = token_scores(lm, states, batch.targets, temperature)
            rollout.old_logps[where], rollout.entropies[where] = found.logps.cpu(), found.entropies.cpu()
        if role is Role.REFERENCE:
            rollout.reference_logps[where] = state_logps(lm, states, batch.targets, temperature).cpu()

    def score(self, rollout: RolloutBatch) -> dict[str, float]:
        """The combined reward of every answer."""
        with self._timed("scoring"):
            scores, means = combined(self.scorers, rollout.rows)
        rollout.scores = scores.flatten()
        k3 = losses.kl_k3(rollout.old_logps, rollout.reference_logps)
        return {
            "objective/scores": rollout.scores.mean().item(),
            "objective/scores_std": rollout.scores.std(correction=0).item(),
            **({f"scores/{name}": value for name, value in means.items()} if len(means) > 1 else {}),
            "objective/kl": rollout.kl.mean().item(),
            "objective/kl_k3": (k3 * rollout.mask).sum(dim=1).mean().item(),
            "objective/entropy": (rollout.entropies * rollout.mask).sum(dim=1).mean().item(),
            "policy/entropy_avg": (rollout.entropies.sum() / rollout.tokens).item(),
            "val/num_eos_tokens": int(rollout.ended.sum()),
            "completions/mean_length": rollout.mask.sum(dim=1).float().mean().item(),
        }

    def advantages(self, rollout: RolloutBatch) -> dict[str, float]:
        """From scores and KL to rewards per token, and to advantages that are whitened over the whole batch."""
        settings, scores = self.settings, rollout.scores
        if settings.reward_scaling != "none":
            self.moments = self.moments.updated(scores)
            scores = losses.normalised(scores, self.moments, settings.reward_clip)
        scores = scores - settings.missing_eos_penalty * ~rollout.ended
        if settings.reward_scaling == "prompt":
            scores = losses.centred(scores, rollout.num_samples)
        if not self.done and self._value_adapter:
            self._fit_value_units(rollout, scores)
        log_ratios = losses.log_ratio(rollout.old_logps, rollout.reference_logps)
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

    def _fit_value_units(self, rollout: RolloutBatch, scores: Tensor) -> None:
        """Gives the first values the mean and the standard deviation of the scores that they predict.

        The value model starts as a copy of the reward model, in the reward model's units, and before an answer's last
        token a reward model's level means nothing. An offset would remain on the advantage of every last token,
        whatever the score: the policy would learn to end at once, or never.
        """
        if not (copied := value_start(self.scorers)):
            return
        values = rollout.values[rollout.mask]
        score_std, value_std = scores.std(correction=0).item(), values.std(correction=0).item()
        known = min(score_std, value_std) > 1e-3  # scores that are all alike don't tell a unit
        factor = math.copysign(score_std / value_std if known else 1.0, copied.weight)
        shift = values.mean().item() - scores.mean().item() / factor
        self.value_units = shift, factor
        rollout.values = (rollout.values - shift) * factor * rollout.mask

    def update(self, rollout: RolloutBatch) -> dict[str, float]:
        """Several passes over the answers in shuffled mini-batches, one optimiser step each. It stops before the step
        at which KL to the policy that sampled is over `kl_stop`."""
        totals: dict[str, float] = defaultdict(float)
        steps, count, kl_stop, passes = 0.0, 0, self.settings.kl_stop, range(self.settings.update_epochs)
        learning_rate = self._learning_rate(self.done)  # one per iteration
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._timed("update"), self.base.packed_attention():
            self.base.train()
            for mini in (mini for epoch in passes for mini in self._mini_batches(rollout.rows, epoch)):
                found = self._gradients(rollout, mini)
                self._check(found)
                for name, value in found.items():
                    totals[name] += value
                count += 1
                too_far = kl_stop is not None and found["policy/approxkl_avg"] > kl_stop
                if not too_far:
                    norm = self.accelerator.clip_grad_norm_(list(self.weights.values()), self._max_norm)
                    if self.accelerator.scaler is None and not cast(Tensor, norm).isfinite():
                        raise gradients_not_finite(f"iteration {self.done + 1}")
                    self._first_step.done = True
                    self.optimizer.step()
                    steps += 1
                self.optimizer.zero_grad()  # sets gradients to None: they take no memory while answers are sampled
                if too_far:
                    break
            self.base.model.eval()
        means = {name: total / count for name, total in totals.items() if name != "furthest"}
        return means | {"optimizer_steps": steps, "lr": learning_rate}

    def _gradients(self, rollout: RolloutBatch, mini: list[list[int]]) -> dict[str, float]:
        """Forward and backward pass of one mini-batch. Each loss is a mean over the tokens of the mini-batch, so
        micro-batches change nothing. Returns means by metric, and the largest change of a log-prob as `furthest`."""
        settings, found = self.settings, defaultdict(float)
        tokens = len(rollout.token_indices([number for micro in mini for number in micro])[0])
        for where, batch in self._batches(rollout, mini):
            old_logps, advantages = self._tokens_of(where, rollout.old_logps, rollout.advantages)
            with self.base.acting_as(Role.POLICY) as lm:
                states = answer_states(lm, batch)
                logps = state_logps(lm, states, batch.targets, self.setup.sampling.temperature)
                loss, clipped = losses.clipped_policy_loss(logps, old_logps, advantages, settings.clip)
                total = loss.sum() / tokens
                if not self._value_adapter:
                    total = total + self._value_loss(states.detach(), rollout, where, tokens, found)
                self.accelerator.backward(total)
            change = logps.detach() - old_logps
            found["loss/policy_avg"] += loss.detach().sum().item() / tokens
            found["policy/approxkl_avg"] += losses.kl_k3(old_logps, logps.detach()).sum().item() / tokens
            found["policy/clipfrac_avg"] += clipped.sum().item() / tokens
            found["val/ratio"] += change.exp().sum().item() / tokens
            found["furthest"] = max(found["furthest"], change.abs().max().item())
        if self._value_adapter:
            with self.base.acting_as(Role.VALUE) as lm:  # backward inside: checkpointed layers run again in this role
                for where, batch in self._batches(rollout, mini):
                    states = answer_states(lm, batch)
                    self.accelerator.backward(self._value_loss(states, rollout, where, tokens, found))
        found["loss"] = found["loss/policy_avg"] + settings.value_coefficient * found["loss/value_avg"]
        return found

    def _value_loss(
        self, states: Tensor, rollout: RolloutBatch, where: Indices, tokens: int, found: dict[str, float]
    ) -> Tensor:
        """The weighted value loss of one micro-batch; adds its figures to `found`."""
        old_values, returns = self._tokens_of(where, rollout.values, rollout.returns)
        loss, clipped = losses.clipped_value_loss(self._values(states), old_values, returns, self.settings.value_clip)
        found["loss/value_avg"] += loss.detach().sum().item() / tokens
        found["val/clipfrac_avg"] += clipped.sum().item() / tokens
        return self.settings.value_coefficient * loss.sum() / tokens

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _values(self, states: Tensor) -> Tensor:
        shift, factor = self.value_units
        return (self.base.values(states) - shift) * factor

    def _next_prompts(self) -> list[EncodedPrompt]:
        """The prompts of this iteration. Every prompt comes once, in a shuffled order, before any comes again."""
        prompts, count = self.setup.rows.train, self.settings.batch_size // self.settings.samples_per_prompt
        places = range(self.done * count, (self.done + 1) * count)
        return [prompts[_shuffled(len(prompts), self.seed + n // len(prompts))[n % len(prompts)]] for n in places]

    def _seed(self, purpose: int) -> int:
        return (self.seed * 1_000_003 + self.done) * 16 + purpose

    def _mini_batches(self, rows: list[SampledAnswers], epoch: int) -> list[list[list[int]]]:
        """The mini-batches of one pass; each is a list of micro-batches of prompt numbers."""
        order = _shuffled(len(rows), self._seed(2) + 4096 * epoch)
        size = math.ceil(len(order) / self.settings.mini_batches)
        numbers = {id(row.tokens): number for number, row in enumerate(rows)}
        minis = [[rows[n].tokens for n in order[start : start + size]] for start in range(0, len(order), size)]
        split = [self.base.micro_batches(mini, self.limit) for mini in minis]
        return [[[numbers[id(tokens)] for tokens in micro] for micro in mini] for mini in split]

    def _batches(self, rollout: RolloutBatch, parts: list[list[int]]) -> Iterator[tuple[Indices, AnswerBatch]]:
        """The batch of each micro-batch, and where its answer tokens stand in the tensors of the rollout."""
        for numbers in parts:
            batch = self.base.batch([rollout.rows[number].tokens for number in numbers])
            yield rollout.token_indices(numbers), batch

    def _tokens_of(self, where: Indices, *tensors: Tensor) -> list[Tensor]:
        return [tensor[where].to(self.base.lm.device) for tensor in tensors]

    def _check(self, found: dict[str, float]) -> None:
        if not math.isfinite(found["loss"]):
            raise not_finite(f"iteration {self.done + 1}", "the loss is")
        if not self._ratio_checked:
            self._check_equal(found["furthest"], "the policy's log-probs can't be repeated: {} before the first update")
        self._ratio_checked = True

    def _check_equal(self, nats: float, problem: str) -> None:
        if nats > TOLERANCE[self.base.dtype]:
            found = problem.format(f"{nats:.2g} nats a token")
            raise UserError(f"{found}; is there randomness in this model? Try compute_dtype: float32")

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.monotonic() - began

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on, for `torch.save`."""
        scaler = self.accelerator.scaler
        return {
            "weights": {name: weight.detach().cpu() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            **{name: getattr(self, name) for name in COUNTERS},
            "moments": astuple(self.moments),
            **stream_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.moments = losses.Moments(*state["moments"])
        set_stream_state({name: value for name, value in state.items() if name.endswith("rng")})


def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
