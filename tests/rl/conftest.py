"""Reward functions, runs and trainers for the tests of PPO, on the tiny model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalign.config.recipe import Lora, Model
from qalign.config.stages import PPO
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.store.sequences import TokenAnswers
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_prompt
from qalign.model.base import Role, load
from qalign.model.generation import Sampling, TransformersEngine
from qalign.rl.ppo_setup import Setup
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import FunctionScorer, Scorers
from qalign.rl.rollout_batch import SampledAnswers
from qalign.train.dataset import StageRows
from qalign.train.run_folder import RunFolder
from tests.helpers import TEST, metrics
from tests.reward_runs import run_stage, write_recipe

TEXTS = [("Why?", ("Because.", "It depends on what you mean by that.")), ("Name a river.", ("The Elbe.", "Elbe"))]
SECTION = {
    "batch_size": 8, "samples_per_prompt": 2, "max_new_tokens": 8, "learning_rate": 1e-2,
    "scheduler": "constant", "warmup_ratio": 0.0, "kl_stop": None,
}  # fmt: skip
REWARDS = """
def many(completion_ids):
    return [sum(token in GOOD for token in ids) / len(ids) for ids in completion_ids]

def many_too(completion_ids):
    return many(completion_ids)

def long(completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def shrinking(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def flat(completions):
    return [1.0] * len(completions)

def broken(completions, calls=[]):
    calls.append(1)
    return [float("nan") if len(calls) == 4 else 1.0] * len(completions)
"""


@pytest.fixture
def rewards(tmp_path, tiny_folder) -> str:
    """A file of reward functions. `many` likes half of all tokens, those that one direction of the hidden states makes
    likelier: a model of random weights can learn that."""
    head = load_file(Path(tiny_folder) / "model.safetensors")["lm_head.weight"]
    good = (head[:, 0] > 0).nonzero()[:, 0].tolist()
    (tmp_path / "mine.py").write_text(f"GOOD = set({good})\n{REWARDS}")
    return str(tmp_path / "mine.py")


@pytest.fixture(scope="package")
def reward_run(tiny_folder, tmp_path_factory) -> RunFolder:
    """A reward model on the tiny base."""
    return run_stage(write_recipe(tmp_path_factory.mktemp("ppo_reward") / "runs", tiny_folder))


@pytest.fixture(scope="package")
def sft_run(tiny_folder, tmp_path_factory) -> RunFolder:
    return run_stage(write_recipe(tmp_path_factory.mktemp("ppo_sft") / "runs", tiny_folder, "sft"))


@pytest.fixture
def held_out() -> list[dict]:
    return [{"path": TEST, "limit": 6}]


@pytest.fixture
def recipe_of(tmp_path, tiny_folder, rewards):
    """Writes a PPO recipe for the tiny model; keyword arguments go into its ppo section."""

    def write(name: str = "runs", **keys) -> str:
        section = SECTION | {
            "limit": 8,
            "reward": f"{rewards}:many",
            "micro_batch_size": 2,
            "max_steps": 3,
            "save_every": 1,
        }
        return write_recipe(tmp_path / name, tiny_folder, "ppo", model={"max_length": 256}, **section | keys)

    return write


@pytest.fixture
def trainer_of(tiny_folder, rewards, reward_run):
    """A trainer on a fresh base, ready to iterate; keyword arguments go into its settings."""

    def make(
        dtype: str = "float32", limit: MicroBatchLimit | None = None, value: str = "trunk", layers: int = 0, **keys
    ) -> PPOTrainer:
        torch.manual_seed(0)
        base = load(Model(base=tiny_folder, compute_dtype=dtype, max_length=256))
        base.add_adapter(Role.POLICY, Lora(r=4))
        if value == "trunk":
            base.add_head(Role.VALUE)
        elif value == "adapter":
            base.load_adapter(Role.VALUE, str(reward_run.adapter), trainable=True)
        given = {"data": "unused.jsonl", "reward": "unused.py:f", "value": value}
        settings = PPO.model_validate(SECTION | given | keys)
        turns = [{"role": "user", "content": f"Why is {subject}?"} for subject in "abcd"]
        prompts = [
            (Prompt((turn,), f"rows.jsonl:{n}", {}), encode_prompt(base.template, [turn]))
            for n, turn in enumerate(turns, start=1)
        ]
        scorers = Scorers([FunctionScorer("ppo.reward", f"{rewards}:many", 1.0)], [])
        stop_ids = (base.tokenizer.eos_token_id, *range(200))  # a tenth of all tokens ends an answer
        sampling = Sampling(settings.max_new_tokens, settings.temperature, stop_ids)
        rows = StageRows(prompts, [], [], {})
        setup = Setup(base, base.lineage("ppo"), scorers, TransformersEngine(), sampling, rows)
        return PPOTrainer(setup, settings, limit or MicroBatchLimit(pairs=1), layers, 10, 3)

    return make


def collected(trainer: PPOTrainer, seed: int = 1, *, advantages: bool = True):
    """The rollout of one iteration, with scores and advantages."""
    rollout = trainer.collect(trainer._next_prompts(), 2, seed)
    if advantages:
        trainer.score(rollout)
        trainer.advantages(rollout)
    return rollout


def logged(run: RunFolder) -> list[dict]:
    """The metrics without speeds."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("tokens_per_second/", "share/"))} for line in metrics(run)
    ]


def change_json(file: Path, **values) -> None:
    """Sets some keys of a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_alike(one: list[dict], other: list[dict], tolerance: float = 1e-6) -> None:
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for a, b in zip(one, other, strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=tolerance) if isinstance(value, float) else value), key


def answers(tokenizer, texts=TEXTS, **columns) -> list[SampledAnswers]:
    """Prompts with texts as if they had been sampled; each ends by itself."""
    rows = []
    for number, (question, found) in enumerate(texts, start=1):
        turns = ({"role": "user", "content": question},)
        ids = encode_prompt(ChatTemplate(tokenizer), list(turns))
        end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        sampled = [[*tokenizer(text, add_special_tokens=False).input_ids, end] for text in found]
        prompt = Prompt(turns, f"rows.jsonl:{number}", {name: values[number - 1] for name, values in columns.items()})
        rows.append(SampledAnswers(prompt, TokenAnswers(ids, tuple(sampled)), tuple(found), (True,) * len(found)))
    return rows


@pytest.fixture
def rows(tiny_base) -> list[SampledAnswers]:
    return answers(tiny_base.tokenizer)
