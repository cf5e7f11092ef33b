"""What layers keep, held in the computer's memory: the same numbers; and the planner takes it as its last resort."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.config.recipe import Lora, Model
from qalign.model.base import Base, Role, load
from qalign.model.logps import pair_logps
from qalign.model.memory import forecast as memory
from qalign.model.memory.forecast import Forecast, Plan
from qalign.model.memory.offload import Offload, offload, wide_modules
from qalign.train import loop
from tests.families import family, random_pairs
from tests.helpers import metrics, scramble, slow
from tests.model.test_memory import GIB, HALF, forecast_of, shape
from tests.reward_runs import run_stage, write_recipe

WIDTH, LAYERS = 64, 2  # of the tiny model


@pytest.fixture
def base(tiny_folder) -> Base:
    """A policy all of whose layers are checkpointed, with dropout."""
    torch.manual_seed(0)
    found = load(Model(base=tiny_folder, compute_dtype="float32"))
    found.add_adapter(Role.POLICY, Lora(r=4, dropout=0.1))
    scramble(found)
    found.lm.activation_checkpointing_enable({"use_reentrant": False})
    found.train()
    return found


def step(base: Base) -> list[torch.Tensor]:
    """Of a step on some pairs: the log-probs, and the gradients of their sum."""
    torch.manual_seed(1)
    batch, weights = base.batch(random_pairs()), list(base.trained_weights(Role.POLICY).values())
    with base.packed_attention(), base.acting_as(Role.POLICY) as lm:
        logps = pair_logps(lm, batch)
        return [logps.detach(), *torch.autograd.grad(logps[:, 0].sum(), weights)]


def test_what_is_offloaded_comes_back_with_the_same_bits(base):
    expected, tokens = step(base), base.batch(random_pairs()).input_ids.numel()
    held = Offload(base.lm, [], smallest=1)
    found = step(base)
    assert all(map(torch.equal, found, expected))
    # The input of each layer, and what the last norm keeps: states in float32 and a number for each token; no weight.
    states = tokens * WIDTH * 4
    assert LAYERS * states < held.bytes < (LAYERS + 3) * states
    small, held.smallest = held.bytes, states + 1
    assert all(map(torch.equal, step(base), expected))
    assert held.bytes == 0 < small
    held.remove()
    held.smallest = 1
    step(base)
    assert held.bytes == 0


def test_nothing_is_held_without_gradients_or_after_an_error(base, monkeypatch):
    held = Offload(base.lm, [], smallest=1)
    with torch.no_grad():
        base.lm.base_model(input_ids=torch.ones(1, 9, dtype=torch.int64))
    assert held.bytes == 0
    layer = base.lm.base_model.layers[1]
    monkeypatch.setattr(layer, "mlp", None)
    with pytest.raises(TypeError):
        step(base)
    before = held.bytes
    torch.ones(9, requires_grad=True).exp()
    assert held.bytes == before > 0, "the hooks were left open"


def test_wide_modules_run_on_tiles(base):
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its random numbers are drawn a tile at a time
    expected, seen = step(base), []
    held = offload(base.lm)
    assert [type(module).__name__ for module in held.wide] == ["LlamaMLP"] * LAYERS
    held.tile = 20
    hook = base.lm.base_model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    found = step(base)
    hook.remove()
    tokens = base.batch(random_pairs()).input_ids.numel()
    assert set(seen) == {20, tokens % 20}
    # Forward; again as the layer is checkpointed, up to the last tensor that it kept; again as the tile is.
    assert sum(seen) == 3 * tokens - tokens % 20
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    held.remove()
    assert all(map(torch.equal, step(base), expected))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gemma3", {"Gemma3MLP"}),
        ("gpt-oss", set()),  # its experts return their router's scores too
        ("lfm2", {"Lfm2MLP"}),
        ("qwen3_next", {"Qwen3NextSparseMoeBlock"}),
        ("phi3", {"Phi3MLP"}),
        ("mamba2", set()),
    ],
)
def test_modules_that_mix_tokens_never_run_on_tiles(name, found):
    lm = family(name)
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    wide = wide_modules(layers, lambda: lm.base_model(input_ids=torch.arange(1, 9)[None], use_cache=False))
    assert {type(module).__name__ for module in wide} == found


# --- the planner -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Forecast:
    return forecast_of(shape("Llama-3.1-8B"), "sft", "cuda", HALF, lora={"r": 16, "alpha": 32})


def test_what_is_held_and_what_is_left_of_it(llama):
    kept, held = (llama.step(8192, checkpointing=True, offloaded=offloaded) for offloaded in (False, True))
    states = 8192 * 4096 * 2
    assert kept.held == 0
    assert held.held == pytest.approx((32 + 2) * states, rel=0.06)  # and the last norm's states, in float32
    assert kept.activations - held.activations == pytest.approx(held.held, rel=0.06)
    assert held.backward < 0.7 * kept.backward
    assert llama.step(8192, checkpointing=True) == kept


@pytest.mark.slow
def test_it_is_the_last_resort(llama):
    """Nothing is offloaded that fits otherwise, nor over what the computer's memory holds, nor where the recipe says
    how many layers are checkpointed, nor on a CPU."""
    memory_bytes = 12 * GIB
    most = llama.largest(memory_bytes, 32)
    assert llama.plan(memory_bytes, most) == Plan(most, 32)
    furthest = llama.furthest(memory_bytes)
    assert furthest > 2 * most
    planned = llama.plan(memory_bytes, furthest)
    assert planned == Plan(furthest, 32, llama.step(furthest, checkpointing=True, offloaded=True).held)
    assert planned.lines["offloaded"].startswith(f"yes: {planned.offloaded / GIB:.2f} GiB of the computer's memory ")
    assert llama.plan(memory_bytes, furthest * 21 // 20) is None
    assert llama.plan(memory_bytes, furthest, host=planned.offloaded - 1) is None
    for device, layers in (("cpu", "auto"), ("cuda", 32)):
        other = forecast_of(shape("Llama-3.1-8B"), "sft", device, HALF, checkpointed_layers=layers)
        assert other.plan(other.total(1000, 32), 1100) is None


@pytest.mark.slow
@pytest.mark.parametrize(("card", "unsloth"), [(8, 2972), (12, 21_848), (16, 40_724), (24, 78_475)])
def test_longest_rows_of_an_8b(card, unsloth, llama):
    """Beside those that Unsloth's documentation gives."""
    assert llama.furthest(memory.usable_of_card(card * GIB)) > 1.3 * unsloth


@pytest.mark.parametrize("stage", [slow("sft"), "dpo"])
def test_a_run_that_offloads_has_the_same_numbers(stage, tmp_path, tiny_folder, monkeypatch, capsys):
    keys = {"micro_batch_size": "auto", "lora": {"dropout": 0.0}}
    expected = metrics(run_stage(write_recipe(tmp_path / "plain", tiny_folder, stage, **keys)))
    assert "offloaded" not in capsys.readouterr().out
    made, real = [], loop.offload
    monkeypatch.setattr(Forecast, "plan", Forecast._offloaded)
    monkeypatch.setattr(loop, "offload", lambda lm: made.append(real(lm)) or setattr(made[0], "smallest", 1))
    found = metrics(run_stage(write_recipe(tmp_path / "offloaded", tiny_folder, stage, **keys)))
    said = capsys.readouterr().out
    assert f", {LAYERS} layers checkpointed\n  offloaded      yes: " in said
    assert made[0].bytes > 0
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
