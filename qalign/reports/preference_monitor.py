"""Held-out answers while a policy learns from given ones: when to sample, what is measured, and what the run says.

It changes nothing: sampling has random numbers of its own, the same at every evaluation, so that points compare and a
resumed run repeats them. All of its state is in metrics.jsonl, which a resumed run takes back to its checkpoint. Counts
of tokens decide when to sample, not a clock.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm

from qalign.config.stages import DPO, PolicyStage
from qalign.data.formats import Labelled, Preference
from qalign.data.store.sequences import TokenAnswers
from qalign.data.store.tokens import outlines
from qalign.errors import not_finite
from qalign.model.base import Role
from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of
from qalign.model.memory.first_step import is_out_of_memory
from qalign.model.memory.lockstep import Reading, pair_logps_together
from qalign.model.memory.shard import shards_of
from qalign.reports.answers import SEED, answers_of, in_a_line, measure_answers, spread, write_samples
from qalign.reports.ppo_report import file_name
from qalign.reports.preference_report import PREFIX, PreferencePoint, alarms, as_metrics, draw, point_of
from qalign.train.callbacks import Monitor
from qalign.train.checkpoints import read_metrics
from qalign.train.loop import Session, planned_steps
from qalign.train.run_folder import print_table

PROMPTS, ROWS = 24, 64  # answered with `auto`; held-out rows that are measured beside
AFFORDED = 0.1  # share of the run's cost that `auto` may take
MOST = 6  # evaluations, where the recipe sets no interval
SAMPLES_SHOWN = 2
# Costs in units of one token's training (forward and backward). Decoding a token for all answers waits for the weights,
# whatever their number: on a CPU for as long as the training of 25 tokens (SmolLM2 in NF4, 8 to 32 answers), on a GPU
# for as long as 180 (Mistral-7B's shape, 16 answers; benchmarks/results/decode_gpu.md). A forward pass takes 0.4.
STEP_COST, FORWARD_COST = {"cpu": 25.0, "cuda": 180.0}, 0.4


class SamplingPlan(NamedTuple):
    """When a run is sampled from."""

    prompts: int  # 0: never
    steps: frozenset[int]  # optimiser steps done
    words: str  # for the header; empty if there is nothing to say


def sampling_plan(
    settings: PolicyStage, stage: str, steps: int, prompts: int, run_cost: float, evaluation_cost: float
) -> SamplingPlan:
    """When to sample `prompts` held-out prompts, which `sample_prompts` left to choose. Costs are in the same unit: of
    the run without sampling, and at most of one evaluation."""
    off, key, chosen = settings.sample_prompts == 0, f"{stage}.sample_prompts", settings.sample_prompts != "auto"
    if off or not (prompts and settings.has_held_out):
        said = f"none: no held-out prompt leaves {settings.max_new_tokens} tokens of model.max_length for an answer"
        return SamplingPlan(0, frozenset(), said if settings.has_held_out and not off else "")
    if settings.sample_every:
        every = settings.sample_every
    else:
        afforded = MOST if chosen else min(MOST, int(AFFORDED * run_cost / evaluation_cost))
        every = math.ceil(steps / max(1, afforded - 1))
    points = frozenset({*range(0, steps, every), steps})
    share = len(points) * evaluation_cost / run_cost
    if not chosen and share > AFFORDED:
        times = f"{len(points)} times" if len(points) > 2 else "before and after"
        words = f"none: {prompts} prompts {times} may cost {share:.0%} of the run; {key}={prompts} samples all the same"
        return SamplingPlan(0, frozenset(), words)
    between = f", every {every:,} steps" if every < steps else ""
    words = f"{prompts} held-out prompts before{between} and after, at most {share:.0%} of the run's cost"
    return SamplingPlan(prompts, points, f"{words} ({key}=0: none)")


class PreferenceMonitor(Monitor):
    """Samples held-out answers while a trainer of pairs or labelled answers runs, and writes `samples/` and the report
    into the run folder.

    Args:
        session: its run folder was begun, as `Session.trainer` does.
        rows: the held-out rows, with their prompts.
    """

    def __init__(self, session: Session, trainer: Any, rows: Sequence[Preference | Labelled]):
        self.run, self.base, self.trainer = session.run, session.base, trainer
        settings, train, held_out = cast(PolicyStage, self.run.settings), session.rows.train, session.rows.held_out
        self.settings, self.rows, self.seconds = settings, spread(held_out, ROWS), 0.0
        self.sampling = Sampling(settings.max_new_tokens, 1.0, stop_ids_of(self.base.template))
        self.picture, self.stage = self.run.path / file_name(self.run.stage), self.run.stage
        room = self.base.max_length - settings.max_new_tokens
        distinct = {
            sha256(str(row.prompt_ids).encode()).digest(): len(held_out) - back
            for back, row in enumerate(reversed(held_out), start=1)
            if len(row.prompt_ids) <= room
        }
        wanted = PROMPTS if settings.sample_prompts == "auto" else settings.sample_prompts
        self.prompts = [held_out[number] for number in spread([*reversed(distinct.values())], wanted)]
        places = {row.where for row in self.prompts}
        self.asked = {row.where: row.prompt for row in rows if row.where in places}
        steps, taken = planned_steps(settings, len(train)), self.base.tokens_taken
        run_cost = steps * settings.batch_size * sum(map(taken, outlines(train))) / len(train)
        count, new = len(self.prompts), settings.max_new_tokens
        read = 2 * (sum(map(taken, self.rows)) + count * new)  # by policy and reference
        cost = new * (STEP_COST.get(self.base.lm.device.type, STEP_COST["cuda"]) + count) + FORWARD_COST * read
        self.plan = sampling_plan(settings, self.stage, steps, count, run_cost, cost)
        if shards_of(self.base.lm):
            self.plan = SamplingPlan(0, frozenset(), "none: with model.shard no answers can be sampled")
        if self.rows and not any(getattr(row, "desirable", True) for row in self.rows):
            self.plan = SamplingPlan(0, frozenset(), "none: no held-out answer is good, whose log-probs could fall")
        self.header = {"sampling": self.plan.words} if self.plan.words else {}
        kept = read_metrics(self.run.metrics) if self.plan.prompts else []
        self.points = [point_of(line) for line in kept if any(name.startswith(PREFIX) for name in line)]

    def look(self, step: int) -> None:
        if step not in self.plan.steps or any(point.step == step for point in self.points):
            return
        began = time.monotonic()
        try:
            point, samples = self._evaluate(step)
        except RuntimeError as error:  # what is only looked at is no reason to end a run
            if not is_out_of_memory(error):
                raise
            tqdm.write(f"warning: step {step}: no memory is left to sample held-out answers; lower max_new_tokens")
            return
        self.points.append(point)
        write_samples(self.run.path, step, samples)
        draw(self.points, self.picture, self.stage, alarm_steps=self.alarm_steps)
        self.trainer.log(as_metrics(point))  # from here on time counts as training again
        self._say(point, samples)
        self.seconds += time.monotonic() - began

    def _evaluate(self, step: int) -> tuple[PreferencePoint, list[dict[str, Any]]]:
        """The point of this step, and its answers."""
        ids = [row.prompt_ids for row in self.prompts]
        with self.base.packing.left(self.base.lm):
            found = TransformersEngine().generate(self.base, Role.POLICY, ids, self.sampling, num_samples=1, seed=SEED)
        answers = answers_of(self.base.tokenizer, [tokens for (tokens,) in found], self.sampling.stop_ids)
        kl_nats = self._kl(found) if self.settings.needs_reference else None
        if kl_nats is not None and not math.isfinite(kl_nats):
            raise not_finite(f"step {step}", "log-probs of held-out answers are")
        measured = self.trainer.measure_alone([self.rows])
        figures, lengths = measure_answers(answers), sorted(len(answer.ids) for answer in answers)
        low, high = (float(lengths[round(share * (len(lengths) - 1))]) for share in (0.1, 0.9))
        chosen = [len(row.answers[0]) for row in self.rows if getattr(row, "desirable", True)]
        point = PreferencePoint(
            step=step,
            kl_nats=kl_nats,
            length_low=low,
            length_high=high,
            rows=len(self.rows),
            chosen_tokens=sum(chosen) / len(chosen),
            chosen_logps=measured["logps/chosen"],
            rejected_logps=measured.get("logps/rejected"),
            accuracy=measured.get("rewards/accuracies"),
            margin=measured.get("rewards/margins"),
            **figures,
        )
        samples = [
            {"prompt": list(self.asked[row.where]), "completion": answer.text, "tokens": len(answer.ids)}
            | {"ended": answer.ended, "looping": answer.loops, "where": row.where}
            for row, answer in zip(self.prompts, answers, strict=True)
        ]
        return point, samples

    def _kl(self, found: list[list[list[int]]]) -> float:
        """Mean of log pi - log pi_ref over the sampled answers, in nats."""
        rows = [TokenAnswers(row.prompt_ids, (tokens,)) for row, (tokens,) in zip(self.prompts, found, strict=True)]
        total = 0.0
        with torch.no_grad(), self.base.packed_attention():
            for some in self.base.micro_batches(rows, self.trainer.micro):
                batch = self.base.batch(some)
                readings = [Reading(Role.REFERENCE, batch), Reading(Role.POLICY, batch)]
                reference, policy = (each.double().sum().item() for each in pair_logps_together(self.base, readings))
                total += policy - reference
        return total / len(rows)

    # --- what it says ------------------------------------------------------------------------------------------------

    def warnings(self, count: int | None = None) -> list[str]:
        """The alarms of the last of the first `count` points, or of all."""
        losses = self.settings.losses if isinstance(self.settings, DPO) else None
        return alarms(self.points[:count], self.stage, losses)

    @property
    def alarm_steps(self) -> list[int]:
        return [point.step for number, point in enumerate(self.points, 1) if self.warnings(number)]

    def _say(self, point: PreferencePoint, samples: list[dict[str, Any]]) -> None:
        tqdm.write(f"step {point.step}: {point.answers} sampled answers: {', '.join(in_words(point))}")
        if found := self.warnings():
            for warning in found:
                tqdm.write(f"warning: step {point.step}: {warning}")
            # The worst first: loops, then answers that were cut, then the longest.
            worst = sorted(samples, key=lambda row: (row["looping"], not row["ended"], row["tokens"]), reverse=True)
            for row in worst[:SAMPLES_SHOWN]:
                tqdm.write(f"  {in_a_line(row)}")

    def report(self) -> dict[str, Any]:
        """Prints what changed; returns the figures for the summary."""
        if not self.points:
            return {}
        first, last, warnings = self.points[0], self.points[-1], self.warnings()
        lines = [("before", ", ".join(in_words(first))), ("after", ", ".join(in_words(last)))]
        lines += [("warning", warning) for warning in warnings]
        print_table(f"{last.answers} sampled answers to held-out prompts", [*lines, ("report", str(self.picture))])
        return {
            "held_out": {"first": asdict(first), "last": asdict(last)},
            "alarm_steps": self.alarm_steps,
            "warnings": warnings,
            "sampling_seconds": round(self.seconds, 1),
        }


def in_words(point: PreferencePoint) -> list[str]:
    """The most telling figures of a point."""
    parts = [] if point.kl_nats is None else [f"KL {point.kl_nats:.2f} nats"]
    parts += [f"{point.length:.0f} tokens", f"{point.ended:.0%} ended", f"{point.looping:.0%} loop"]
    parts += [] if point.accuracy is None else [f"pairs right {point.accuracy:.0%}"]
    return [*parts, f"chosen log-probs {point.chosen_logps:.0f} nats"]
