"""One iteration of PPO or GRPO, in the order in which it runs: collect, score, advantages, update.

docs/ppo.md gives the source of each detail. Every random number comes from the recipe's seed and the number of the
iteration, so an iteration depends only on the state before it, and a resumed run repeats it.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from qalign.config.stages import PPO
from qalign.data.collate import AnswerBatch, MicroBatchLimit, on_device
from qalign.errors import UserError, gradients_not_finite, not_finite
from qalign.losses import policy_gradient as losses
from qalign.model.base import Role
from qalign.model.logps import state_logps, token_scores
from qalign.model.memory.first_step import FirstStep
from qalign.model.memory.lockstep import Reading, learn_together, read_together
from qalign.rl import objective
from qalign.rl.ppo_setup import EncodedPrompt, Setup, make_deterministic, make_optimizer
from qalign.rl.rewards import combined, value_start
from qalign.rl.rollout_batch import Indices, RolloutBatch, joined, shuffled
from qalign.rl.user_code import random_state, set_stream_state, stream_state
from qalign.train.processes.world import current

ROLES = (Role.POLICY, Role.REFERENCE, Role.VALUE)
# Nats by which a log-prob may differ when computed twice. (In 16 bits too it is equal where kernels are deterministic.)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# The figures of an iteration whose prompts were all left out.
NO_UPDATE = dict.fromkeys(["loss", "loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"], 0.0)
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
        self.setup, self.base, self.scorers, self.world = setup, setup.base, setup.scorers.reward, current()
        self.settings, self.limit, self.iterations, self.seed = settings, limit, iterations, seed
        self._first_step = FirstStep(limit)
        self.done, self.tokens_seen = 0, 0
        self.kl_coefficient = 0.0 if settings.kl == "none" else settings.kl_coefficient
        self.moments, self.value_units = losses.Moments(), (0.0, 1.0)
        self.seconds: dict[str, float] = defaultdict(float)
        self._ratio_checked = False
        set_stream_state(random_state())  # a run's functions draw what its seed gives, whatever ran before
        make_deterministic(self.base, checkpointed_layers)
        self.weights = {
            f"{role}/{name}": weight
            for role in ((Role.POLICY,) if settings.value == "none" else (Role.POLICY, Role.VALUE))
            for name, weight in self.base.trained_weights(role).items()
        }
        trained = list(self.weights.values())
        self.world.copied(trained)  # whatever random numbers each process has drawn so far
        optimizer, self._learning_rate, self._max_norm = make_optimizer(settings, trained, iterations)
        precision = "fp16" if self.base.dtype == torch.float16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=self.base.lm.device.type == "cpu")
        self.optimizer = self.accelerator.prepare(optimizer)

    def iterate(self) -> tuple[RolloutBatch, dict[str, float]]:
        """One iteration: (its answers, its metrics under TRL's names). Raises a `UserError` if a scorer fails (the
        weights are unchanged), the loss or the gradients are not finite, or log-probs can't be repeated."""
        began = time.monotonic()
        rollout = self._sampled(self._next_prompts(), self.settings.samples_per_prompt, seed=self._seed(1))
        metrics = self.score(rollout)
        self._read_all(rollout, ROLES)
        metrics |= rollout.correct(self.settings.importance_cap)
        if not self.done:
            furthest = (rollout.old_logps - rollout.reference_logps).abs().max().item()
            problem = "the policy is {} from its reference before the first update, where KL must be 0"
            self._check_equal(furthest, problem)
        metrics |= rollout.figures() | self._learn(rollout)
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
        self, prompts: Sequence[EncodedPrompt], num_samples: int, seed: int, roles: Sequence[Role] = ROLES
    ) -> RolloutBatch:
        """Samples answers, then runs every role over them."""
        rollout = self._sampled(prompts, num_samples, seed)
        self._read_all(rollout, roles)
        return rollout

    def _sampled(self, prompts: Sequence[EncodedPrompt], num_samples: int, seed: int) -> RolloutBatch:
        with self._timed("rollout"):
            return RolloutBatch.empty(self.setup.sample(prompts, num_samples, seed))

    def _read_all(self, rollout: RolloutBatch, roles: Sequence[Role]) -> None:
        """Runs roles over the answers in the micro-batches of the first update. So the ratio of new to old probability
        is exactly 1 there, in 16 bits too."""
        with self._timed("scoring"), torch.no_grad(), self.base.packed_attention():
            parts = [micro for mini in self._mini_batches(rollout, epoch=0) for micro in mini]
            if unused := sorted({*range(len(rollout.rows))} - {*rollout.used}):
                parts += self._micro_batches(rollout, unused)
            roles = [role for role in roles if role is not Role.VALUE or self.settings.value == "adapter"]
            own = self._mine(rollout, parts)
            read = self.world.agreed(lambda: joined([self._read(roles, b) for _, b in self._batches(rollout, own)]))
            for numbers, found in self.world.gathered(([number for part in own for number in part], read)):
                rollout.fill(numbers, found)

    def _read(self, roles: Sequence[Role], batch: AnswerBatch) -> dict[str, Tensor]:
        """Tensors of a rollout from a forward pass of each role, on its device, in the order of the batch's targets."""
        temperature, found = self.setup.sampling.temperature, dict[str, Tensor]()
        readings = [Reading(role, batch) for role in roles]
        for role, reading, states in zip(roles, readings, read_together(self.base, readings), strict=True):
            with reading.on(self.base) as lm:
                if role is Role.VALUE or (role is Role.POLICY and self.settings.value == "trunk"):
                    found["values"] = self._values(states)
                if role is Role.POLICY:
                    scored = token_scores(lm, states, batch.targets, temperature)
                    found |= {"old_logps": scored.logps, "entropies": scored.entropies}
                if role is Role.REFERENCE:
                    found["reference_logps"] = state_logps(lm, states, batch.targets, temperature)
        return found

    def score(self, rollout: RolloutBatch) -> dict[str, float]:
        """The combined reward of every answer, and with `dynamic_sampling` which prompts the update uses."""
        with self._timed("scoring"):
            scores, means = combined(self.scorers, rollout.rows)
        rollout.scores = scores.flatten()
        if self.settings.dynamic_sampling:
            rollout.used = objective.informative(rollout, self.settings)
        return {
            "objective/scores": rollout.scores.mean().item(),
            "objective/scores_std": rollout.scores.std(correction=0).item(),
            **({f"scores/{name}": value for name, value in means.items()} if len(means) > 1 else {}),
            "val/num_eos_tokens": int(rollout.ended.sum()),
            "completions/mean_length": rollout.mask.sum(dim=1).float().mean().item(),
        }

    def advantages(self, rollout: RolloutBatch) -> dict[str, float]:
        """From scores and KL to advantages, which are set on the rollout."""
        scores, self.moments = objective.shaped(rollout, self.settings, self.moments)
        copied = value_start(self.scorers) if self.settings.value == "adapter" else None
        if copied and not self.done:
            self.value_units = shift, factor = objective.value_units(rollout, scores, copied.weight)
            rollout.values = (rollout.values - shift) * factor * rollout.mask
        return objective.set_advantages(rollout, scores, self.settings, self.kl_coefficient)

    def update(self, rollout: RolloutBatch) -> dict[str, float]:
        """Several passes over the answers in shuffled mini-batches, one optimiser step each. It stops before the step
        at which KL to the policy that sampled is over `kl_stop`."""
        totals: dict[str, float] = defaultdict(float)
        steps, count, kl_stop, passes = 0.0, 0, self.settings.kl_stop, range(self.settings.update_epochs)
        learning_rate = self._learning_rate(self.done)  # one per iteration
        is_scaled = self.accelerator.scaler is not None  # it leaves out steps whose gradients aren't finite
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._timed("update"), self.base.packed_attention():
            self.base.train()
            for mini in (mini for epoch in passes for mini in self._mini_batches(rollout, epoch)):
                figures = self.world.agreed(lambda mini=mini: self._gradients(rollout, mini))
                self._first_step.done = True
                self.world.summed(figures["loss"], lambda: list(self.weights.values()), self.accelerator.scaler)
                if not is_scaled:
                    figures["grad_norm"] = self._clipped_norm()
                found = objective.on_host(figures)  # the host waits for the device here, once a step
                norm = found.pop("grad_norm", 0.0)
                found = objective.over_all(self.world.gathered(found))
                self._check(found)
                for name, value in found.items():
                    totals[name] += value
                count += 1
                too_far = kl_stop is not None and found["policy/approxkl_avg"] > kl_stop
                if not too_far:
                    if is_scaled:
                        self._clipped_norm()
                    elif not math.isfinite(norm):
                        raise gradients_not_finite(f"iteration {self.done + 1}")
                    self.optimizer.step()
                    steps += 1
                self.optimizer.zero_grad()  # sets gradients to None: they take no memory while answers are sampled
                if too_far:
                    break
            self.base.model.eval()
        means = {name: total / count for name, total in totals.items() if name != "furthest"}
        return (means or NO_UPDATE) | {"optimizer_steps": steps, "lr": learning_rate}

    def _clipped_norm(self) -> Tensor:
        """Clips the gradients; their norm before."""
        return cast(Tensor, self.accelerator.clip_grad_norm_(list(self.weights.values()), self._max_norm))

    def _gradients(self, rollout: RolloutBatch, mini: list[list[int]]) -> dict[str, Tensor]:
        """Forward and backward pass of the micro-batches of one mini-batch that this process runs. Each loss is a
        weighted sum over the tokens of the whole mini-batch, so micro-batches and processes change nothing. Returns
        figures by metric, and the largest change of a log-prob as `furthest`, as scalars on the device."""
        figures, roles = objective.Figures(), (Role.POLICY, *([Role.VALUE] if self.settings.value == "adapter" else []))
        numbers = [number for micro in mini for number in micro]
        all_weights = objective.weights_of(rollout, numbers, self.settings)
        if not (own := self._mine(rollout, mini)):
            return dict.fromkeys(["loss", "furthest"], torch.zeros((), device=self.base.device))
        for where, batch in self._batches(rollout, own):
            weights = objective.Weights(*self._tokens_of(where, *all_weights))
            old_logps, reference = self._tokens_of(where, rollout.old_logps, rollout.reference_logps)
            advantages, values, returns = self._tokens_of(where, rollout.advantages, rollout.values, rollout.returns)
            owners, lengths = batch.owners, batch.lengths.flatten()
            part = objective.Part(old_logps, reference, advantages, values, returns, weights, owners, lengths)
            readings = [Reading(role, batch, gradients=True) for role in roles]
            learn_together(self.base, readings, partial(self._loss, part, figures), self.accelerator.backward)
        return figures.sums | {"furthest": torch.stack(figures.furthest).max()}

    def _loss(
        self, part: objective.Part, figures: objective.Figures, reading: Reading, lm: PreTrainedModel, states: Tensor
    ) -> Tensor:
        """The loss of a role in a micro-batch, from its hidden states; adds its figures."""
        if reading.role == Role.VALUE:
            return objective.value_loss(self.settings, self._values(states), part, figures)
        logps = state_logps(lm, states, reading.batch.targets, self.setup.sampling.temperature)
        loss = objective.policy_loss(self.settings, self.kl_coefficient, logps, part, figures)
        if self.settings.value == "trunk":
            loss = loss + objective.value_loss(self.settings, self._values(states.detach()), part, figures)
        return loss

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _values(self, states: Tensor) -> Tensor:
        shift, factor = self.value_units
        return (self.base.head_scores(Role.VALUE, states) - shift) * factor

    def _next_prompts(self) -> list[EncodedPrompt]:
        """The prompts of this iteration. Every prompt comes once, in a shuffled order, before any comes again."""
        prompts, count = self.setup.rows.train, self.settings.batch_size // self.settings.samples_per_prompt
        places = range(self.done * count, (self.done + 1) * count)
        return [prompts[shuffled(len(prompts), self.seed + n // len(prompts))[n % len(prompts)]] for n in places]

    def _seed(self, purpose: int) -> int:
        return (self.seed * 1_000_003 + self.done) * 16 + purpose

    def _mini_batches(self, rollout: RolloutBatch, epoch: int) -> list[list[list[int]]]:
        """The mini-batches of one pass over the prompts in use; each is a list of micro-batches of prompt numbers."""
        minis = rollout.mini_batches(self.settings.mini_batches, self._seed(2) + 4096 * epoch)
        return [self._micro_batches(rollout, numbers) for numbers in minis]

    def _micro_batches(self, rollout: RolloutBatch, numbers: Sequence[int]) -> list[list[int]]:
        """Prompt numbers in groups, one for each forward pass."""
        rows = [rollout.rows[number].tokens for number in numbers]
        number_of = {id(row): number for number, row in zip(numbers, rows, strict=True)}
        limit = self.limit.among(self.world.size, [self.base.tokens_taken(row) for row in rows])
        return [[number_of[id(row)] for row in micro] for micro in self.base.micro_batches(rows, limit)]

    def _mine(self, rollout: RolloutBatch, parts: list[list[int]]) -> list[list[int]]:
        """The micro-batches that this process runs."""
        sizes = [sum(self.base.tokens_taken(rollout.rows[number].tokens) for number in part) for part in parts]
        return [part for _, part in self.world.mine(parts, sizes)]

    def _batches(self, rollout: RolloutBatch, parts: list[list[int]]) -> Iterator[tuple[Indices, AnswerBatch]]:
        """The batch of each micro-batch, and where its answer tokens stand in the tensors of the rollout."""
        for numbers in parts:
            batch = self.base.batch([rollout.rows[number].tokens for number in numbers])
            yield rollout.token_indices(numbers), batch

    def _tokens_of(self, where: Indices, *tensors: Tensor) -> list[Tensor]:
        return [on_device(tensor[where], self.base.device) for tensor in tensors]

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
