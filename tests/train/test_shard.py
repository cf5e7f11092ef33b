"""A base that is dealt out to two or three processes: the curve of one process that holds all of it."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from qalign import dpo, fit, ppo
from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.base import Role, load
from qalign.model.memory.forecast import Forecast
from qalign.model.memory.shard import shards_of
from tests.helpers import scramble, slow, summary
from tests.model.test_memory import GIB, HALF, recipe_of, shape
from tests.model.test_stream import step
from tests.reward_runs import write_recipe
from tests.train import runs
from tests.train.processes import (
    assert_killed,
    assert_same_curve,
    ended,
    launch,
    lines_of,
    opened,
    run_together,
    wait_until,
)
from tests.train.test_world import LONG, alone, write  # noqa: F401  (a fixture)

SHARD = {"model": {"shard": True}}


def run_sharded(stage: str, folder: Path, base: str, count: int, *words: str, **keys) -> str:
    """Runs a stage in `count` processes with the base dealt out; returns the path of its recipe."""
    model = SHARD["model"] | keys.pop("model", {})
    path = write(folder, base, stage, model=model, **keys)
    assert f"over {count} processes" in run_together(stage, path, count, *words)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "count", "keys"),
    [
        ("sft", 2, {}),
        ("sft", 3, {"neftune_alpha": 5, "limit": 7}),
        ("dpo", 3, {}),
        ("dpo", 2, {"checkpointed_layers": 1, "lora": {"dropout": 0.1}}),
        ("dpo", 2, {"model": {"quantization": "none"}, "limit": 6}),
        ("dpo", 2, {"loss": "aot", "micro_batch_size": 2}),
        ("kto", 3, {}),
        ("reward", 3, {"micro_batch_size": "auto", "limit": 7}),
        ("reward", 2, {"members": 2, "limit": 6}),
    ],
)
def test_a_base_that_is_dealt_out_trains_the_same_adapter(stage, count, keys, alone, tiny_folder, tmp_path):  # noqa: F811
    path = run_sharded(stage, tmp_path, tiny_folder, count, **keys)
    assert_same_curve(path, alone(stage, **keys))


@pytest.mark.slow
def test_each_process_holds_half_of_the_base(tiny_folder, tmp_path):
    path = run_sharded("sft", tmp_path, tiny_folder, 2, limit=4, epochs=1)
    whole = load(Model(base=tiny_folder, compute_dtype="float32")).held_bytes
    shares = [size / whole for size in summary(opened(path))["base_bytes_each"]]
    assert shares == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_run_resumes_with_the_base_dealt_out_and_back(sharded_first, alone, tiny_folder, tmp_path):  # noqa: F811
    path, way = write(tmp_path, tiny_folder, "dpo"), [("model.shard=true",), ()]
    first, then = way if sharded_first else way[::-1]
    run_together("dpo", path, 2, *first)
    run = opened(path)
    run.summary.unlink()  # as if it had been killed after its checkpoint of step 6
    for late in run.checkpoints.glob("checkpoint-8"):
        (late / "manifest.json").unlink()
    assert "checkpoint-6" in run_together("dpo", path, 2, *then, "--resume")
    assert_same_curve(path, alone("dpo"))


@pytest.mark.slow
def test_another_process_with_other_cached_references_waits_for_none(alone, tiny_folder, tmp_path):  # noqa: F811
    """One process knows the reference's log-probs of all pairs, the other of none."""
    path = write(tmp_path, tiny_folder, "dpo", model=SHARD["model"], limit=6, epochs=1)
    with_cache = launch("dpo", [path, path])
    assert ended(with_cache)[0] == [0, 0]
    run = opened(path)
    shutil.rmtree(run.path)
    processes = launch("dpo", [path, path], own=[{}, {"XDG_CACHE_HOME": str(tmp_path / "empty")}])
    codes, _, errors = ended(processes)
    assert codes == [0, 0], errors
    assert_same_curve(path, alone("dpo", limit=6, epochs=1))


@pytest.mark.slow
def test_a_killed_process_ends_those_that_wait_for_its_part(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "dpo", model=SHARD["model"], **LONG)
    processes = launch("dpo", [path] * 2)
    wait_until(lambda: len(lines_of(opened(path).metrics)) > 12, processes)
    assert_killed(processes, 1)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("quantization", ["nf4", slow("none")])
def test_layers_that_are_gathered_have_the_gradients_of_whole_ones(quantization, tiny_folder, one_process):
    found = []
    for shard in (False, True):
        spec = Model(base=tiny_folder, compute_dtype="float32", quantization=quantization, shard=shard)
        base = load(spec, in_turn=lambda work: work())
        base.add_adapter(Role.POLICY, Lora(r=4))
        scramble(base)
        base.lm.activation_checkpointing_enable({"use_reentrant": False})
        base.train()
        found.append([*step(base), *step(base, passes=2)])
        assert (shards_of(base.lm) is not None) == shard
    weight = base.lm.base_model.layers[0].mlp.up_proj.get_base_layer().weight
    assert isinstance(weight, DTensor)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("keys", "line", "fix"),
    [
        ({}, "model.shard: needs a process for each card", "torchrun --nproc-per-node 2 -m qalign.dpo"),
        ({"model": {"stream": "always"}}, "model.shard: can't be used with stream", "remove one"),
        ({"model": {"quantization": "int8"}}, "model.shard: can't be used with quantization int8", "use nf4"),
        ({"lora": {"dora": True}}, "lora.dora:", "remove it"),
        ({"sample_prompts": 8, "holdout": 0.5}, "dpo.sample_prompts:", "set it to 0"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(keys, line, fix, tmp_path, capsys):
    model = {"shard": True, **keys.pop("model", {})}
    assert_refused(capsys, dpo.main, write_recipe(tmp_path, str(tmp_path), "dpo", model=model, **keys), line, fix)


def test_commands_that_sample_refuse_it(tmp_path, capsys):
    path = runs.recipe_of(tmp_path, str(tmp_path), "ppo", model=SHARD["model"])
    assert_refused(capsys, ppo.main, path, "model.shard: only sft, reward, dpo and kto", "set it to false")
    with pytest.raises(UserError, match=r"model\.shard: only sft, reward, dpo and kto"):
        load(Model(base="unused", shard=True))


def assert_refused(capsys, main, path: str, line: str, fix: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([path])
    (said,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line in said
    assert fix in said


def test_the_forecast_deals_the_base_out():
    """Mistral-7B on two cards: embeddings, head and layers in halves, three layers whole while they are at work."""
    config = shape("Mistral-7B-v0.3")
    whole, dealt = (Forecast(recipe_of(model={"shard": True}), "dpo", config, "cuda", HALF, cards) for cards in (1, 2))
    linear, norms = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), 2 * 4096 * 2
    layers, vocabulary = 32 * (linear // 2 + norms), 2 * 32768 * 4096 * 2
    assert dealt.layers_dealt == layers
    assert dealt.dealt == layers + vocabulary
    assert whole.fixed["base"] - dealt.fixed["base"] == (layers + vocabulary) // 2
    assert dealt.fixed["gathered"] == max(3 * layers // 32, vocabulary)
    assert not dealt.can_offload
    (said,) = fit.sharded(dealt)
    assert said[1].startswith(f"yes: each of 2 processes holds {dealt.dealt / 2 / GIB:.2f} GiB of")
    assert fit.sharded(whole) == []
