"""What PPO, GRPO and best-of-n begin with: one base with the policy and the scorers, the prompts, and sampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments

from qalign.config.stages import PPO
from qalign.data.collate import AnswerBatch, MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.store.sequences import TokenAnswers
from qalign.data.tokenize import encode_questions
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import Base, Role
from qalign.model.generation import Engine, Sampling, TransformersEngine, engine, stop_ids_of, text_of
from qalign.model.lineage import Lineage
from qalign.model.loading import load_config, reach_of
from qalign.model.logps import TokenScores, token_scores
from qalign.model.memory.lockstep import Reading, in_this_role, read_together
from qalign.rl.rewards import Scorers, open_scorers, value_start
from qalign.rl.rollout_batch import RolloutBatch, SampledAnswers, joined
from qalign.rl.scorers import Scorer
from qalign.train.callbacks import checkpoint_layers
from qalign.train.dataset import ReadRows, StageRows, encode_rows
from qalign.train.loop import Session, load_base
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder
from qalign.train.trainers.adapter import built, schedule_from_one

SERVED = "served"  # folder of a run: the adapters that a vLLM server reads while the run samples
EncodedPrompt = tuple[Prompt, list[int]]  # a row with its token ids


@dataclass
class Setup:
    """One base with its policy and scorers, and the prompts to answer."""

    base: Base  # with the policy on it; scorers are put on it by `scorers.attach`
    origin: Lineage  # of an adapter that is trained here
    scorers: Scorers
    engine: Engine
    sampling: Sampling
    rows: StageRows  # `EncodedPrompt`s
    other_bytes: int = 0  # of scorers that are models of their own

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, seed: int, role: str = Role.POLICY
    ) -> list[SampledAnswers]:
        """`num_samples` answers of a role to each prompt; of the base where no adapter for the role is on it. Several
        processes sample some of them each, and all get all."""
        role = role if role in self.base.adapters else Role.BASE
        ids = [prompt_ids for _, prompt_ids in prompts]
        wanted: Any = {"num_samples": num_samples, "seed": seed}
        if isinstance(self.engine, TransformersEngine):
            sampled, logps = self._sampled_together(self.engine, role, ids, **wanted), [()] * len(ids)
        else:
            sampled, logps = self.engine.generate_scored(self.base, role, ids, self.sampling, **wanted)
        return [
            SampledAnswers(
                prompt,
                TokenAnswers(prompt_ids, tuple(answers)),
                tuple(text_of(self.base.tokenizer, answer) for answer in answers),
                tuple(answer[-1] in self.sampling.stop_ids for answer in answers),
                tuple(scored),
            )
            for (prompt, prompt_ids), answers, scored in zip(prompts, sampled, logps, strict=True)
        ]

    def _sampled_together(
        self, engine: TransformersEngine, role: str, ids: list[list[int]], **wanted: Any
    ) -> list[list[list[int]]]:
        world = current()
        own = [number for number, _ in world.mine(ids, [*map(len, ids)])]
        sampled = world.agreed(lambda: engine.generate(self.base, role, ids, self.sampling, only=own, **wanted))
        return world.merged(zip(own, sampled, strict=True))


def read_answers(base: Base, rows: list[SampledAnswers], limit: MicroBatchLimit, temperature: float) -> RolloutBatch:
    """The log-probs of policy and reference, and the policy's entropies, of every token of the answers. Several
    processes read some of the answers each, and all get all."""
    rollout, numbers = RolloutBatch.empty(rows), {id(row.tokens): number for number, row in enumerate(rows)}
    world, answers = current(), [row.tokens for row in rows]
    parts = base.micro_batches(answers, limit.among(world.size, [*map(base.tokens_taken, answers)]))
    own = [part for _, part in world.mine(parts, [sum(map(base.tokens_taken, part)) for part in parts])]
    roles = Role.POLICY if Role.POLICY in base.adapters else Role.BASE, Role.REFERENCE

    def read_part(batch: AnswerBatch) -> dict[str, Tensor]:
        readings, scored = [Reading(role, batch) for role in roles], list[TokenScores]()
        for reading, states in zip(readings, read_together(base, readings), strict=True):
            with reading.on(base) as lm:
                scored.append(token_scores(lm, states, batch.targets, temperature))
        policy, reference = scored
        return {"old_logps": policy.logps, "entropies": policy.entropies, "reference_logps": reference.logps}

    with torch.no_grad(), base.packed_attention():
        order = [numbers[id(row)] for part in own for row in part]
        read = world.agreed(lambda: joined([read_part(base.batch(part)) for part in own]))
        for places, found in world.gathered((order, read)):
            rollout.fill(places, found)
    return rollout


def set_up(run: RunFolder, found: ReadRows, *, trainable: bool) -> Setup:
    """Checks the scorers, loads the base, and puts the policy on it: `trainable` with a reference beside it, or one
    that only samples. Prompts that leave no room for an answer are refused. A `UserError` if a scorer, the base or the
    starting adapter can't be loaded or doesn't fit the others, or `model.max_length` is beyond the base's reach."""
    recipe, settings, parent, world = run.recipe, cast(PPO, run.settings), run.parent, current()
    if world.size > 1 and settings.engine != "transformers":
        fix = "take 'transformers', or start one process"
        raise UserError(f"{run.stage}.engine: '{settings.engine}' samples for one process, not for {world.size}; {fix}")
    reach, length = reach_of(load_config(recipe.model)) or math.inf, recipe.model.max_length
    if length > reach:  # answers may be as long as that, and memory is planned for it
        raise UserError(
            f"model.max_length: {length} is beyond the {reach} tokens that '{recipe.model.base}' can read; set it to "
            f"{reach} at most"
        )
    scorers = open_scorers(recipe, run)
    found.intake.by_rewards = set(filter(scorers.takes, found.intake.seen))
    base = load_base(run)
    world.same(scorers.identities)
    # One position is left for the end of turn that a cut answer gets before a reward adapter scores it.
    room = int(min(length, reach - 1)) - settings.max_new_tokens
    session = Session(run, base, encode_rows(run, base.template, found, encode_questions, room))
    if trainable:
        session.add_adapter(reference=True)
    elif parent:
        lineage.check(f"{run.stage}.start_from", parent, session.origin)
        base.load_adapter(Role.POLICY, parent, trainable=False)
    stop_ids = stop_ids_of(base.template)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, stop_ids)
    source = engine(settings.engine, base, base.max_length, f"{run.stage}.engine", run.path / SERVED)
    other_bytes = world.in_turn(lambda: scorers.load_models(base))
    return Setup(base, session.origin, scorers, source, sampling, session.rows, other_bytes)


def add_value_model(base: Base, run: RunFolder, scorers: list[Scorer]) -> None:
    """The value model, unless `value` is `none`: a head on the policy's hidden states (`trunk`), or an adapter with a
    head of its own, which begins as a copy of the first reward adapter if there is one."""
    kind = cast(PPO, run.settings).value
    if kind == "none":
        return
    if kind == "trunk":
        base.add_head(Role.VALUE)
    elif copied := value_start(scorers):
        base.load_adapter(Role.VALUE, str(copied.folders[0]), trainable=True)
    else:
        base.add_adapter(Role.VALUE, run.recipe.lora.model_copy(update={"init": "default"}))
        base.add_head(Role.VALUE)


def make_deterministic(base: Base, checkpointed_layers: int) -> None:
    """Turns the adapters' dropout off, so that the policy that learns has the log-probs of the policy that sampled (N+
    details: Huang et al. 2024, arXiv:2403.17031), and recomputes the activations of the first `checkpointed_layers`
    layers."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    checkpoint_layers(base.lm, checkpointed_layers, partial(in_this_role, base))


def make_optimizer(
    settings: PPO, weights: list[nn.Parameter], iterations: int
) -> tuple[Optimizer, Callable[[int], float], float]:
    """The optimiser; values under `trainer:` override the others. Adam's epsilon is 1e-5, not 1e-8 (Huang et al. 2023,
    "The N Implementation Details of RLHF with PPO").

    Returns (it, the learning rate as a function of the number of iterations done, the norm that gradients are clipped
    to: infinite for `max_grad_norm: 0`, which turns clipping off in transformers too).
    """
    values: dict[str, Any] = {
        "output_dir": "unused",
        "report_to": "none",
        "learning_rate": settings.learning_rate,
        "adam_epsilon": 1e-5,
        "use_cpu": not torch.cuda.is_available(),
    }
    warmup = math.ceil(settings.warmup_ratio * iterations)

    def build(trainer: dict[str, Any]) -> tuple[TrainingArguments, Optimizer, LRScheduler]:
        args = TrainingArguments(**values | trainer)
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = make(weights, **options | {"weight_decay": args.weight_decay})
        return args, optimizer, schedule_from_one(settings.scheduler, optimizer, warmup, iterations, args)

    args, optimizer, schedule = built(settings.stage, settings.trainer, build)
    (share,) = cast(LambdaLR, schedule).lr_lambdas
    return optimizer, lambda done: settings.learning_rate * share(done), args.max_grad_norm or math.inf


def bytes_by_role(base: Base, optimizer: Optimizer) -> dict[str, dict[str, int]]:
    """Memory of each role in bytes: `weights`, `gradients` (held during an update only) and `optimiser`."""
    size: Callable[[Any], int] = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
    found: dict[str, dict[str, int]] = {Role.BASE: {"weights": base.held_bytes}}
    for role in base.adapters:
        weights = base.trained_weights(role).values()
        trained = [weight for weight in weights if weight.requires_grad]
        moments = [t for w in trained for t in optimizer.state.get(w, {}).values() if torch.is_tensor(t)]
        found[role] = {"weights": size(weights), "gradients": size(trained), "optimiser": size(moments)}
    return found
