"""Settings as TRL's config, a plan and micro-batches, and what the loop says when it can't continue."""

import json
import math
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaAttention

import qalign.train.loop
import qalign.train.trainers.sft
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, PPO, SFT, Reward
from qalign.data.collate import MicroBatchLimit
from qalign.errors import StopRequest, UserError, not_finite
from qalign.model.adapters.members import member_roles
from qalign.model.base import Role
from qalign.model.memory.forecast import Plan
from qalign.train.callbacks import RunCallback, asked_to_stop
from qalign.train.loop import Session, few_steps, micro_batch, planned_steps
from qalign.train.processes.world import World, entered
from tests.helpers import TRAIN, dpo_config, metrics, slow
from tests.reward_runs import run_stage, write_recipe

PLANNED = Plan(4096, 2)


def settings(stage=DPO, **keys):
    return stage(data=TRAIN, **keys)


@pytest.mark.parametrize(
    ("stage", "keys", "limit"),
    [
        (DPO, {"micro_batch_size": "auto"}, MicroBatchLimit(tokens=4096)),
        (SFT, {"micro_batch_size": "auto"}, MicroBatchLimit(tokens=4096)),
        (DPO, {"micro_batch_size": 3, "batch_size": 12}, MicroBatchLimit(pairs=3)),
        (PPO, {"micro_batch_size": 8, "samples_per_prompt": 4, "reward": "a.py:f"}, MicroBatchLimit(pairs=2)),
    ],
)
def test_trainers_take_tokens_or_rows_at_a_time(stage, keys, limit):
    found = micro_batch(settings(stage, **keys), PLANNED, 100)
    assert (found, found.longest) == (limit, 100)


def test_planned_steps_count_a_short_last_batch():
    assert planned_steps(settings(batch_size=8), 17) == 3
    assert planned_steps(settings(batch_size=8, epochs=1.5), 17) == 5  # 3 an epoch, 4.5 rounded up
    assert planned_steps(settings(batch_size=8, max_steps=2), 17) == 2


@pytest.mark.parametrize(
    ("stage", "keys", "steps", "hint"),
    [
        (SFT, {"packing": True}, 4, "4 steps are few: epochs=3, packing=false"),
        (SFT, {"packing": True, "epochs": 3.0}, 6, "6 steps are few: packing=false"),
        (DPO, {}, 1, "1 step is few: epochs=3"),
        (DPO, {"epochs": 3.0, "batch_size": 16}, 5, "5 steps are few: batch_size=8"),
        (DPO, {"epochs": 3.0, "batch_size": 32, "micro_batch_size": 8}, 6, "6 steps are few: batch_size=16"),
        (DPO, {"epochs": 3.0, "batch_size": 8, "micro_batch_size": 8}, 6, None),
        (DPO, {"epochs": 3.0, "batch_size": 1}, 5, None),
        (DPO, {}, 10, None),
        (SFT, {"max_steps": 2, "packing": True}, 2, None),
    ],
)
def test_few_steps_come_with_a_hint_unless_their_number_was_chosen(stage, keys, steps, hint):
    assert few_steps(settings(stage, **keys), steps) == hint


@pytest.mark.parametrize(
    ("stage", "keys", "fix"),
    [
        (DPO, {"micro_batch_size": 5}, "dpo.micro_batch_size=1, or else model.max_length=150"),
        (DPO, {"micro_batch_size": "auto"}, "dpo.micro_batch_size=1, or else model.max_length=150"),
        (DPO, {"micro_batch_size": 1}, "model.max_length=150"),
        (PPO, {"reward": "a.py:f"}, "ppo.micro_batch_size=4, ppo.value=trunk, or ppo.max_new_tokens=128"),
    ],
)
def test_out_of_memory_suggests_what_takes_less(stage, keys, fix):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    recipe = SimpleNamespace(model=SimpleNamespace(max_length=300))
    batch = {} if stage is PPO else {"batch_size": 15}
    name = stage.__name__.lower()
    session = object.__new__(Session)
    session.run = SimpleNamespace(stage=name, recipe=recipe, settings=settings(stage, **batch, **keys))
    session.planned, session.micro = PLANNED, MicroBatchLimit(tokens=4096)
    session.base = SimpleNamespace(lm=torch.nn.Identity())
    with pytest.raises(UserError) as raised:
        session.to_the_end(out_of_memory)
    (line,) = raised.value.lines
    assert line.startswith("out of GPU memory with up to 4,096 tokens at a time, 2 layers checkpointed (CUDA out of ")
    assert line.endswith(f"). Try {fix}")


@pytest.mark.parametrize(
    ("plans", "taken"),
    [
        ([Plan(4096, 2), Plan(2048, 0)], Plan(2048, 0)),
        ([Plan(2048, 0), Plan(2048, 2)], Plan(2048, 2)),
        ([Plan(2048, 2), Plan(2048, 2, offloaded=7)], Plan(2048, 2, offloaded=7)),
    ],
)
def test_processes_take_the_plan_of_the_one_with_the_least_room(plans, taken, monkeypatch):
    class Several(World):
        def gathered(self, value):
            return plans

    offloaded = []
    monkeypatch.setattr(qalign.train.loop, "offload", offloaded.append)
    session = object.__new__(Session)
    session.world, session._plan, session.run = Several(), lambda *_: plans[0], SimpleNamespace(settings=settings())
    session.base = SimpleNamespace(role="policy", acting_as=nullcontext)
    session.plan(100)
    assert (session.planned, len(offloaded)) == (taken, bool(taken.offloaded))


@pytest.mark.parametrize("members", [1, 2])
def test_processes_begin_with_the_weights_of_the_first_one(members, tiny_base):
    sent = []

    class Several(World):
        def copied(self, weights):
            sent.extend(weights)

    given = settings(Reward, members=members)
    roles = member_roles(given) or (Role.REWARD,)
    session = object.__new__(Session)
    session.world, session.base, session.roles = Several(), tiny_base, roles
    session.run = SimpleNamespace(recipe=Recipe(model=tiny_base.spec, output="unused"), settings=given, parent=None)
    session.add_adapter()
    assert sent
    assert {*map(id, sent)} == {id(w) for role in roles for w in tiny_base.trained_weights(role).values()}


def test_not_finite_names_each_row_once():
    (line,) = not_finite("step 5", "the loss is", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:1"]).lines
    assert line.startswith("step 5: the loss is not finite on a.jsonl:1, a.jsonl:2; ")


def test_gradients_that_are_not_finite_stop_before_the_update(tmp_path):
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full_like(layer.weight, math.nan)
    callback, state = RunCallback(None), SimpleNamespace(global_step=6)
    with pytest.raises(UserError, match="step 7: the gradients are not finite"):
        callback.on_pre_optimizer_step(dpo_config(tmp_path), state, None, model=layer)


@pytest.mark.parametrize(
    ("said", "late"), [([None, None], None), ([None, signal.SIGTERM], None), ([None] * 2, signal.SIGINT)]
)
def test_no_signal_is_lost_between_processes(said, late):
    """One that comes while processes tell each other of theirs counts at the next step."""
    run = SimpleNamespace(stop=StopRequest())
    run.stop.patient = True

    class Both(World):
        def gathered(self, value):
            if late and value is None:
                run.stop(late, None)
                return said
            return [value, *said[1:]]

    with entered(Both()):
        assert asked_to_stop(run) == any(said)
        assert asked_to_stop(run) == bool(late or any(said))
    assert run.stop.number == (late or said[1])


def test_a_resumed_run_counts_its_tokens_on():
    """TRL's trainers count from zero in each session."""
    logged = []
    callback = RunCallback(SimpleNamespace(log=logged.append), tokens_before=100)
    logs = {"loss": 1.0, "num_tokens": 20.0, "grad_norm": math.inf}
    callback.on_log(None, SimpleNamespace(global_step=3), None, logs=logs)
    assert callback.tokens_seen == 120
    (line,) = logged
    assert line["num_tokens"] == 120
    assert json.loads(json.dumps(line, allow_nan=False))["grad_norm"] is None


def test_the_header_has_the_hint(tmp_path, tiny_folder, capsys):
    run_stage(write_recipe(tmp_path, tiny_folder, "sft", packing=True, model={"max_length": 256}))
    assert " steps are few: epochs=3, packing=false\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "dtype"), [("sft", "float32"), slow("reward", "float32"), slow("dpo", "float32"), ("dpo", "bfloat16")]
)
def test_checkpointing_one_layer_of_two_changes_no_number(stage, dtype, tmp_path, tiny_folder, monkeypatch, capsys):
    """In bfloat16 this is a GPU's default path: autocast, and recomputation after the role's context was left. There
    the policy starts from an adapter, so a frozen copy of it could be recomputed by mistake."""
    keys: dict = {"model": {"compute_dtype": dtype}}
    if dtype == "bfloat16":
        keys["start_from"] = str(run_stage(write_recipe(tmp_path / "parent", tiny_folder, "sft", **keys)).adapter)
    forward, calls = LlamaAttention.forward, []

    def counted(layer, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(layer.layer_idx)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    curves = []
    for layers in (0, 1):
        calls.clear()
        # No report on held-out pairs and no checkpoints: three steps and nothing else.
        run = run_stage(write_recipe(tmp_path / str(layers), tiny_folder, stage, checkpointed_layers=layers, **keys))
        assert calls.count(1) >= 3
        assert calls.count(0) == (1 + layers) * calls.count(1)  # a checkpointed layer runs again backward
        assert (", 1 layers checkpointed" in capsys.readouterr().out) == (layers == 1)
        curves.append(metrics(run))
    names = {"loss", "grad_norm", "logps/chosen", "rewards/margins"} & set(curves[0][0])
    assert {"loss", "grad_norm"} <= names
    for one, other in zip(*curves, strict=True):
        for name in names & set(one):
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(
    ("stage", "kept"),
    [("sft", True), slow("reward", True), ("dpo", True), pytest.param("sft", False, id="with TRL's cast")],
)
def test_updates_too_small_for_bfloat16_survive_on_a_bfloat16_base(stage, kept, tmp_path, tiny_folder, monkeypatch):
    """TRL casts the adapters of a quantised base to bfloat16, where updates of 1e-5 round away. The last case shows
    that they would; it fails the day TRL casts no more."""
    if not kept:
        monkeypatch.setattr(qalign.train.trainers.sft, "float32_kept", nullcontext)
    keys = {"lora": {"dora": True}, "model": {"compute_dtype": "bfloat16"}}
    first = run_stage(write_recipe(tmp_path / "first", tiny_folder, stage, **keys))
    keys |= {"scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-5, "max_steps": 1}
    second = run_stage(write_recipe(tmp_path / "second", tiny_folder, stage, start_from=str(first.adapter), **keys))
    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert ({tensor.dtype for tensor in after.values()} == {torch.float32}) or not kept
    kinds = ["lora_A", "lora_B"] + ["magnitude"] * kept + ["score"] * (stage == "reward")  # TRL casts no magnitudes
    for kind in kinds:
        changes = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if kind in name])
        share = ((changes > 5e-6) & (changes < 1.5e-5)).float().mean()  # Adam's first step is the learning rate
        assert share > 0.99 if kept else share < 0.2, kind
