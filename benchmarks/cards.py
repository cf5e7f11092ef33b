"""Stages at a real model's shape on a card that looks smaller than it is, for `memory.py` and `gpu.py`: a base of
random weights, the planner's plan for the card, and optimiser steps of each stage's own trainer."""

import gc
import math
import random
import tempfile
import traceback
from contextlib import contextmanager

import torch
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from benchmarks.random_models import as_base, config_of, fixture_tokenizer, random_lm
from qalign.config.recipe import Lora, Model, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.store.sequences import TokenAnswers, TokenDialogue, TokenLabelled, TokenPair
from qalign.model.base import Role
from qalign.model.generation import Sampling, TransformersEngine
from qalign.model.kernels import fuse
from qalign.model.loading import compute_dtype, device
from qalign.model.memory.first_step import is_out_of_memory
from qalign.model.memory.forecast import CUDA_CONTEXT, Forecast, Plan, longest_row, usable_memory
from qalign.model.memory.offload import Offload, offload
from qalign.model.memory.step import LiveBytes
from qalign.model.memory.stream import LayerStream
from qalign.model.reference import ReferenceLogps
from qalign.rl.ppo_setup import Setup
from qalign.rl.ppo_trainer import ROLES, PPOTrainer
from qalign.rl.rewards import Scorers
from qalign.rl.rollout_batch import RolloutBatch, SampledAnswers
from qalign.train.callbacks import checkpoint_layers
from qalign.train.dataset import StageRows
from qalign.train.trainers.policy import LabelTrainer, PreferenceTrainer
from qalign.train.trainers.reward import RewardModelTrainer
from qalign.train.trainers.sft import SupervisedTrainer

ON_CUDA = torch.cuda.is_available()
CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
PPO = {"reward": "unused.py:f", "value": "adapter", "samples_per_prompt": 4, "mini_batches": 1, "update_epochs": 1}


@contextmanager
def card(gib: float):
    """A card of this size, of which CUDA takes a part. Yields the bytes that a run may use. On a CPU they are all."""
    if not ON_CUDA:
        yield int(gib * 2**30)
        return
    size, real = int(gib * 2**30) - CUDA_CONTEXT, torch.cuda.mem_get_info
    share = size / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    torch.cuda.mem_get_info = lambda *_: (size - torch.cuda.memory_reserved(), int(gib * 2**30))
    try:
        yield usable_memory("cuda")
    finally:
        torch.cuda.mem_get_info = real
        torch.cuda.set_per_process_memory_fraction(1.0)


def emptied() -> None:
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()


class Stage:
    """A stage on a fresh base with an adapter.

    Attributes:
        forecast: what the planner says of it on a GPU.
        longest: tokens of the longest row.
    """

    def __init__(self, stage: str, shape: str, max_length: int, *, fused: bool = False, streamed: bool = False):
        self.stage, self.offload = stage, None
        torch.manual_seed(0)
        config = config_of(shape)
        where = torch.device("cpu") if streamed else device()
        lm = random_lm(config, compute_dtype(Model(base="random")), where=where)
        self.stream = LayerStream(lm, device()) if streamed else None
        self.base = as_base(lm, fixture_tokenizer())
        if fused:
            fuse(self.base.lm)
        model = self.base.spec.model_dump() | {"max_length": max_length, "stream": "always" if streamed else "never"}
        optimiser = {"optim": "paged_adamw_8bit" if ON_CUDA else "adamw_torch"}
        own = PPO | {"max_new_tokens": max_length // 4, "batch_size": 4} if stage == "ppo" else {}
        section = {"data": "unused", "trainer": optimiser, **own}
        self.recipe = Recipe.model_validate({"model": model, "output": "unused", stage: section})
        self.forecast = Forecast(self.recipe, stage, config, "cuda", self.base.dtype)
        self.longest = longest_row(self.recipe, stage)
        if stage == "reward":
            self.base.lm.set_output_embeddings(None)
        self.base.add_adapter(Role.REWARD if stage == "reward" else Role.POLICY, Lora())
        self.micro = MicroBatchLimit(tokens=1)
        self.trainer = self._ppo(optimiser) if stage == "ppo" else self._trainer(optimiser)

    def _trainer(self, optimiser: dict):
        values = {
            "output_dir": tempfile.mkdtemp(), "remove_unused_columns": False, "report_to": "none",
            "bf16": self.base.dtype == torch.bfloat16, "fp16": self.base.dtype == torch.float16,
            "activation_checkpointing": False, "use_cpu": not ON_CUDA, **optimiser,
        }  # fmt: skip
        args, rows = CONFIGS[self.stage](**values), [self.row(9)]
        settings = getattr(self.recipe, self.stage)
        if self.stage == "sft":
            trainer = SupervisedTrainer(self.base, args, self.micro, rows, None)
        elif self.stage == "reward":
            trainer = RewardModelTrainer(self.base, settings, args, self.micro, rows)
        else:
            kind = LabelTrainer if self.stage == "kto" else PreferenceTrainer
            trainer = kind(self.base, settings, ReferenceLogps(), args, self.micro, rows)
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        return trainer

    def _ppo(self, optimiser: dict) -> PPOTrainer:
        self.base.add_adapter(Role.VALUE, Lora())
        self.base.add_head(Role.VALUE)
        sampling = Sampling(self.recipe.ppo.max_new_tokens, 1.0, ())
        rows = StageRows([], [], [], {})
        setup = Setup(self.base, None, Scorers([], []), TransformersEngine(), sampling, rows)
        return PPOTrainer(setup, self.recipe.ppo, self.micro, 0, 10, 0)

    def ids(self, count: int) -> list[int]:
        return [random.randrange(10, self.base.lm.config.vocab_size) for _ in range(count)]

    def row(self, tokens: int):
        """A row that takes this many tokens; a pair has a third of them in each part."""
        if self.stage == "sft":
            ids = self.ids(tokens)
            return TokenDialogue(ids, ids, "")
        if self.stage == "ppo":
            new, number = self.recipe.ppo.max_new_tokens, self.recipe.ppo.samples_per_prompt
            answers = tuple(self.ids(new) for _ in range(number))
            prompt = Prompt(({"role": "user", "content": ""},), "", {})
            tokens = TokenAnswers(self.ids(tokens - new * number), answers)
            return SampledAnswers(prompt, tokens, ("",) * number, (True,) * number)
        if self.stage == "kto":
            return TokenLabelled(self.ids(tokens // 2), self.ids(tokens - tokens // 2), True, "")
        third = tokens // 3
        return TokenPair(self.ids(tokens - 2 * third), self.ids(third), self.ids(third), "")

    def take(self, plan: Plan) -> None:
        """Goes on as a run with this plan."""
        self.micro.tokens = plan.tokens
        self.trainer._first_step.done = True  # a run would go on with half as much where memory runs out
        checkpoint_layers(self.base.lm, plan.checkpointed_layers)
        if self.offload:
            self.offload.remove()
        self.offload: Offload | None = None
        if plan.offloaded:
            with self.base.acting_as(self.base.role) as lm:
                self.offload = offload(lm)

    def step(self, rows: list) -> None:
        """One optimiser step on these rows; of PPO what follows sampling and scoring."""
        if self.stage == "ppo":
            rollout = RolloutBatch.empty(rows)
            self.trainer._read_all(rollout, ROLES)
            rollout.scores = torch.randn(rollout.old_logps.shape[0])
            self.trainer.advantages(rollout)
            self.trainer.update(rollout)
            return
        if self.stage == "sft":
            rows = self.trainer.data_collator([{"input_ids": row.ids, "labels": row.labels} for row in rows])
        packed = self.trainer.packed_attention if self.stage == "sft" else self.base.packed_attention
        with packed():
            self.trainer.training_step(self.model, rows, len(rows))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peaks(self, plan: Plan, rows: list, steps: int) -> tuple[int, int] | None:
        """(allocated, reserved) bytes at the peak of some steps, or None if memory ran out. On a CPU the bytes of all
        tensors that steps made, with what was there before, are both."""
        emptied()
        self.take(plan)
        try:
            if not ON_CUDA:
                with LiveBytes() as counted:
                    self.step(rows)
                always = self.forecast.fixed["base"] + self.forecast.fixed["adapters"]
                return counted.peak + always, counted.peak + always
            torch.cuda.reset_peak_memory_stats()
            for _ in range(steps):
                self.step(rows)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.print_exc()
        self.base.model.zero_grad()
        return None

    def rows_for(self, plan: Plan) -> list:
        """Rows as long as they may be, of two full micro-batches."""
        return [self.row(self.longest) for _ in range(2 * math.ceil(plan.tokens / self.longest))]
