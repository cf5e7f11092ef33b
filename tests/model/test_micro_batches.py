"""How the planner's micro-batches split optimiser steps of short pairs and of long ones, at a 7B's shape."""

import random
from types import SimpleNamespace

import torch
import transformers as tf

from benchmarks.gpu_sides import pairs_like
from qalign.config.recipe import Recipe
from qalign.data.collate import MicroBatchLimit, micro_batches, packed_tokens
from qalign.model.memory.forecast import Forecast, tokens_of_most_steps
from tests.conftest import ROOT

GIB, BATCH = 2**30, 8


def planned(pairs, gib: float, *, known: bool):
    recipe = Recipe.model_validate({"model": {"base": "unused"}, "output": "unused", "dpo": {"data": "unused"}})
    config = tf.AutoConfig.from_pretrained(ROOT / "tests" / "fixtures" / "configs" / "Mistral-7B-v0.3")
    forecast = Forecast(recipe, "dpo", config, "cuda", torch.bfloat16)
    taken = [packed_tokens(pair) for pair in pairs]
    if known:
        forecast.most_steps = tokens_of_most_steps(taken, BATCH)
    return forecast.plan(int(gib * GIB), max(taken))


def forwards(pairs, tokens: int) -> list[int]:
    """How many forward passes each optimiser step takes, over two epochs in random order."""
    order = [pair for seed in (0, 1) for pair in random.Random(seed).sample(pairs, len(pairs))]
    steps = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [len(micro_batches(step, MicroBatchLimit(tokens=tokens), layout="packed")) for step in steps]


def test_a_short_step_is_one_forward_and_checkpoints_no_more_layers_than_it_needs():
    pairs = pairs_like("hh", 400, 2000, SimpleNamespace(max_length=1024))
    plain, known = planned(pairs, 24, known=False), planned(pairs, 24, known=True)
    passes = forwards(pairs, known.tokens)
    assert passes.count(1) >= 0.9 * len(passes)
    assert max(passes) <= 2
    assert known.checkpointed_layers < plain.checkpointed_layers
    assert planned(pairs, 140, known=True) == planned(pairs, 140, known=False), "nothing is checkpointed there"


def test_long_steps_are_split_as_before():
    pairs = pairs_like("ultrafeedback", 400, 2000, SimpleNamespace(max_length=2048))
    for gib in (12, 24):
        assert planned(pairs, gib, known=True) == planned(pairs, gib, known=False)


def test_the_tokens_of_most_steps_by_hand():
    assert tokens_of_most_steps([100], 8) == 800
    assert tokens_of_most_steps([100, 300], 4) == 4 * 200 + 2 * 2 * 100
