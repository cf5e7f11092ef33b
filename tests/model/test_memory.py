"""The forecast of a training step's memory against bytes counted by hand, bytes of real tensors, and the peak of real
steps of each stage's own trainer."""

import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from benchmarks import memory as benchmark
from qalign.config.recipe import Recipe
from qalign.config.stages import RL_STAGES, STAGES
from qalign.model.adapters.files import WEIGHTS
from qalign.model.base import Role, load
from qalign.model.memory import forecast as memory
from qalign.model.memory.forecast import Forecast
from qalign.train.callbacks import checkpoint_layers
from tests.families import config as family_config
from tests.helpers import slow

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
GIB = 2**30
HALF = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What PPO's section needs. Its step is forecast as DPO's: one prompt with two answers.
REWARDED = {"ppo": {"reward": "rewards.py:short", "value": "trunk"}, "grpo": {"reward": "rewards.py:short"}}
STEPS = tuple(stage for stage in STAGES if stage not in RL_STAGES)


def recipe_of(base: str = "unused", *, only: str = "", model=None, lora=None, **stage) -> Recipe:
    """A recipe with all stages; `stage` goes into the section `only`, or into all."""
    own = {name: stage if name == only or not only else {} for name in STAGES}
    return Recipe.model_validate({
        "model": {"base": base, "compute_dtype": "float32", **(model or {})},
        "lora": {"r": 4, "alpha": 8, **(lora or {})},
        "output": "unused",
        **{name: {"data": "unused", **REWARDED.get(name, {}), **own[name]} for name in STAGES},
    })  # fmt: skip


def shape(name: str):
    return tf.AutoConfig.from_pretrained(CONFIGS / name)


def forecast_of(config, stage: str = "dpo", device: str = "cpu", dtype=torch.float32, **keys) -> Forecast:
    if isinstance(config, str):
        keys, config = {"base": config, **keys}, tf.AutoConfig.from_pretrained(config)
    return Forecast(recipe_of(only=stage, **keys), stage, config, device, dtype)


@pytest.fixture(scope="module")
def mistral() -> Forecast:
    """DPO on a 7B in bfloat16 on a card."""
    return forecast_of(shape("Mistral-7B-v0.3"), "dpo", "cuda", HALF, lora={"r": 16, "alpha": 32})


@pytest.fixture(scope="module")
def variant(tmp_path_factory, tiny_folder):
    """The tiny model with other values in its config, as a folder."""
    made = {}

    def make(**values) -> str:
        key = str(values)
        if key not in made:
            config = tf.AutoConfig.from_pretrained(tiny_folder, **values)
            made[key] = str(tmp_path_factory.mktemp("variant") / "model")
            torch.manual_seed(0)
            tf.AutoModelForCausalLM.from_config(config).save_pretrained(made[key])
            tf.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(made[key])
        return made[key]

    return make


def assert_near(forecast: Forecast, expected: int, found: int, over: float = 0.1) -> None:
    """Together with base and adapters: at most 5% below what was found, at most `over` above."""
    always = forecast.fixed["base"] + forecast.fixed["adapters"]
    assert -0.05 < (expected + always) / (found + always) - 1 < over


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [("float32", False), slow("float32", True), ("bfloat16", False)], ids=str
)
@pytest.mark.parametrize("stage", STEPS)
def test_a_step_takes_what_is_forecast(stage, dtype, checkpointing, tiny_folder, variant):
    base = variant(vocab_size=40_000) if stage == "sft" else tiny_folder  # a head that takes something
    # The forecast counts full blocks of queries; answers shorter than one show where no head is larger.
    over = 0.35 if stage == "reward" else 0.1
    forecast = forecast_of(base, stage, dtype=getattr(torch, dtype), model={"compute_dtype": dtype})
    cases = [(96, 1), (96, 4), (384, 1), (1023, 1)]
    for tokens, rows in cases if dtype == "float32" else [(96, 4)]:
        step = forecast.step(tokens * rows, checkpointing=checkpointing)
        found = benchmark.measured(stage, forecast.recipe, tokens, rows, checkpointing)
        assert_near(forecast, step.total + forecast.fixed["gradients"], found, over)


@pytest.mark.parametrize("checkpointed", [0, 2, 5, 6])
def test_layers_that_were_not_run_are_inferred(checkpointed, variant, monkeypatch):
    """Six layers (the forecast runs two and four), of which some are checkpointed as `checkpoint_layers` does it."""
    forecast = forecast_of(variant(num_hidden_layers=6))
    real = benchmark.trainer_of

    def some_checkpointed(*args):
        trainer = real(*args)
        enable = trainer.model.activation_checkpointing_enable

        def enable_some(*_):
            trainer.model.activation_checkpointing_enable = enable
            checkpoint_layers(trainer.model, checkpointed)

        trainer.model.activation_checkpointing_enable = enable_some
        return trainer

    monkeypatch.setattr(benchmark, "trainer_of", some_checkpointed)
    expected = forecast.total(600, checkpointed) - forecast.fixed["base"] - forecast.fixed["adapters"]
    found = benchmark.measured("dpo", forecast.recipe, 600, 1, checkpointed > 0)
    assert_near(forecast, expected - forecast.fixed["optimiser"], found)


@pytest.mark.parametrize(("checkpointed", "allocated"), [(31, 8.371), (28, 12.417), (23, 19.162)])
def test_what_a_gpu_allocated(checkpointed, allocated):
    """SFT at Mistral-7B's shape with some of its 32 layers checkpointed: benchmarks/results/gpu_mistral7b.md."""
    keys = {"lora": {"r": 16, "alpha": 32}, "trainer": {"optim": "paged_adamw_8bit"}}
    forecast = forecast_of(shape("Mistral-7B-v0.3"), "sft", "cuda", HALF, **keys)
    assert forecast.total(8192, checkpointed) == pytest.approx(allocated * GIB, rel=0.03)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_layers_of_several_kinds(name):
    """Alternating windows: each layer keeps about as much as the others, and no count of layers is refused."""
    found = {}
    for layers in (1, 3, 8):
        config = family_config(name)
        config.num_hidden_layers = layers
        config.layer_types = [config.layer_types[number % 2] for number in range(layers)]
        forecast = forecast_of(config)
        assert forecast.layers == layers
        found[layers] = forecast.step(300, checkpointing=False).activations
    assert (found[8] - found[1]) / (found[3] - found[1]) == pytest.approx(7 / 2, rel=0.02)


@pytest.mark.parametrize("stage", STEPS)
def test_layers_that_return_a_tuple(stage):
    """As Falcon-H1's do: one layer is run for all of a kind, and each counts alike."""
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}
    found = {}
    for layers in (1, 2, 8):
        forecast = forecast_of(tf.FalconH1Config(**small, **sizes, num_hidden_layers=layers), stage)
        found[layers] = forecast.step(300, checkpointing=False).activations
        assert len(forecast._step_model.layers) == 1
    assert found[8] - found[1] == 7 * (found[2] - found[1]) > 0


@pytest.mark.parametrize("stage", STEPS)
def test_more_tokens_than_a_model_that_scans_is_run_with(stage):
    """Layers without attention and the rest grow in straight lines; the head is counted by itself."""
    forecast = forecast_of(family_config("lfm2"), stage, "cuda", HALF)
    found = [forecast.step(tokens, checkpointing=True) for tokens in (512, 1024, 1536)]
    assert found[2].activations - found[1].activations == found[1].activations - found[0].activations > 0
    assert found[0].logits <= found[1].logits <= found[2].logits


def test_a_model_with_fewer_layers_than_its_pattern_is_run_as_it_is():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = family_config("gemma3")
    config.num_hidden_layers, config.layer_types = 3, kinds
    step = forecast_of(config).step(300, checkpointing=True)
    config.num_hidden_layers, config.layer_types = 6, 2 * kinds
    twice = forecast_of(config).step(300, checkpointing=True)
    assert step.total > step.activations > 0
    assert twice.activations > step.activations
    assert (twice.logits, twice.backward) == pytest.approx((step.logits, step.backward), rel=0.01)


def test_the_config_given_stays_as_it_was():
    config = family_config("gemma2")
    before = config.to_dict()
    forecast_of(config).step(96, checkpointing=True)
    assert config.to_dict() == before


def held(base) -> int:
    """Bytes of a loaded base's weights and of the scales of quantised ones, without the tables that all weights of a
    kind have in common."""
    found = 0
    for name, parameter in base.lm.named_parameters():
        if "lora_" in name:
            continue
        found += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return found


@pytest.mark.parametrize(
    "model",
    [
        {"quantization": "nf4", "double_quant": True},
        {"quantization": "nf4", "double_quant": False},
        {"quantization": "fp4", "double_quant": True},
        {"quantization": "none"},
        {"quantization": "none", "compute_dtype": "bfloat16"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_the_base_takes_what_its_tensors_hold(model, tiny_folder):
    dtype = getattr(torch, model.get("compute_dtype", "float32"))
    forecast = forecast_of(tiny_folder, dtype=dtype, model=model)
    base = load(forecast.recipe.model)
    # Each of 14 weights may have one scale more than full blocks make.
    assert forecast.fixed["base"] == pytest.approx(held(base), abs=14 * 4 if model["quantization"] != "none" else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_gradients_and_optimiser_are_exact(stage, tiny_folder):
    forecast = forecast_of(tiny_folder, stage)
    base = load(forecast.recipe.model)
    base.add_adapter(Role.REWARD if stage == "reward" else Role.POLICY, forecast.recipe.lora)
    weights = [p for p in base.model.parameters() if p.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert forecast.fixed["adapters"] == sum(p.nbytes for p in weights)  # and the reward model's head
    assert forecast.fixed["gradients"] == sum(p.grad.nbytes for p in weights)
    assert forecast.fixed["optimiser"] == sum(moment.nbytes for moment in moments)


def write_adapter(folder: Path, *shapes: tuple[int, ...]) -> None:
    """The files of an adapter with tensors of these shapes."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    save_file({f"{number}": torch.zeros(shape) for number, shape in enumerate(shapes)}, folder / WEIGHTS)


def test_an_adapter_to_start_from_has_the_weights_of_its_file(tiny_folder, tmp_path):
    """Its rank need not be the recipe's, of which a value model and the recipe's own reward adapter are."""
    write_adapter(tmp_path / "other", (4, 150))
    found = forecast_of(
        tiny_folder, "ppo", start_from=str(tmp_path / "other"), reward=["reward"], value="adapter"
    ).fixed
    assert (found["adapters"], found["gradients"]) == (4 * (2 * 600 + 2 * 8192), 4 * (600 + 8192))
    reward = forecast_of(tiny_folder, "reward", start_from=str(tmp_path / "other")).fixed
    assert reward["adapters"] == 4 * (600 + 64), "and its head"


def test_what_the_roles_of_ppo_take(tiny_folder, tmp_path):
    """An adapter of the tiny model at rank 4 has 8,192 weights. Policy and value model are trained; the reference, each
    reward adapter and each judge are frozen; a function is nothing, and a model of its own is counted as it is
    loaded. Rewards of other recipes have the weights of their files: b one adapter of 600, c an ensemble of two."""
    adapter = 8192
    for name, shapes in {"b": [(4, 150)], "c/member_1": [(4, 100), (4, 10)], "c/member_2": [(4, 90)]}.items():
        run, _, member = name.partition("/")
        write_adapter(tmp_path / run / "reward" / "adapter" / member, *shapes)
    sources = ["reward", str(tmp_path / "b" / "reward"), "someone/a-model"]
    keys = {"reward": sources, "judge": str(tmp_path / "c"), "eval_data": "unused", "value": "adapter"}
    copied = forecast_of(tiny_folder, "ppo", reward=sources[1], value="adapter").fixed
    assert (copied["adapters"], copied["gradients"]) == (4 * (adapter + 2 * 600), 4 * (adapter + 600))
    plain, full = forecast_of(tiny_folder, "ppo").fixed, forecast_of(tiny_folder, "ppo", start_from="sft", **keys).fixed
    assert (plain["adapters"], plain["gradients"], plain["optimiser"]) == (4 * adapter, 4 * adapter, 8 * adapter)
    others = 4 * (600 + 440 + 360)
    frozen = 4 * 4 * adapter + others
    assert (full["adapters"], full["gradients"], full["optimiser"]) == (frozen, 8 * adapter, 16 * adapter)
    assert plain["base"] == full["base"]
    grpo = forecast_of(tiny_folder, "grpo", start_from="sft", reward=sources).fixed
    frozen = 3 * 4 * adapter + 4 * 600
    assert (grpo["adapters"], grpo["gradients"], grpo["optimiser"]) == (frozen, 4 * adapter, 8 * adapter)


def test_what_more_adapters_take(tiny_folder):
    """The rank, the reference's frozen copy, autocast's 16-bit copy, and the optimiser's moments in a byte each."""
    count = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    plain = forecast_of(tiny_folder).fixed
    assert plain["adapters"] == plain["gradients"] == 4 * count
    assert plain["optimiser"] == 8 * count
    assert forecast_of(tiny_folder, lora={"r": 8}).fixed["adapters"] == 2 * 4 * count
    assert forecast_of(tiny_folder, start_from="sft").fixed["adapters"] == 2 * 4 * count
    for loss in ("simpo", "orpo", {"simpo": 1.0, "sft": 0.1}):
        assert forecast_of(tiny_folder, start_from="sft", loss=loss).fixed["adapters"] == 4 * count
    mixed = {"simpo": 1.0, "ipo": 0.1}
    assert forecast_of(tiny_folder, start_from="sft", loss=mixed).fixed["adapters"] == 2 * 4 * count
    head = 64  # of a reward model; it has no reference
    assert forecast_of(tiny_folder, "reward", start_from="sft").fixed["adapters"] == 4 * (count + head)
    assert forecast_of(tiny_folder, dtype=HALF).fixed["adapters"] == (4 + 2) * count
    paged = forecast_of(tiny_folder, trainer={"optim": "paged_adamw_8bit"}).fixed["optimiser"]
    assert 2 * count < paged < 2.1 * count


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Mistral-7B-v0.3", 3.85 * GIB),  # measured by bitsandbytes' own tensors on a card
        ("Llama-3.1-8B", 5.70e9),  # what its published bnb-4bit copies weigh
    ],
)
def test_a_large_base_is_forecast_in_no_time_and_without_weights(name, size):
    config = shape(name)
    began = time.process_time()
    forecast = forecast_of(config, "dpo", "cuda", HALF)
    step = forecast.step(4096, checkpointing=True)
    assert time.process_time() - began < 3
    assert forecast.fixed["base"] == pytest.approx(size, rel=0.003)
    # Between layers 4,096 x 4,096 hidden states in bfloat16 each, 32 times; and little more.
    assert 1 <= step.activations / (32 * 4096 * 4096 * 2) < 1.15


@pytest.mark.parametrize(("stage", "device"), [("sft", "cpu"), ("reward", "cuda"), ("dpo", "cpu")])
def test_more_tokens_take_more_and_checkpointing_takes_less(stage, device, tiny_folder):
    config = tf.AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=12)
    forecast = forecast_of(config, stage, device)
    table = [[forecast.total(tokens, layers) for layers in (12, 6, 1, 0)] for tokens in (64, 500, 4000, 4200)]
    for one in [*table, *map(list, zip(*table, strict=True))]:
        assert one == sorted(set(one))
    assert sum(forecast.parts(500, 6).values()) == table[1][1]
    assert forecast.total(500, 40) == forecast.total(500, 12)  # a recipe may ask for more layers than there are


@pytest.mark.parametrize(("checkpointed", "size"), [(0, 7), (32, 6), (32, 9)])  # the last one over 4,096 tokens
def test_the_largest_fits_and_a_little_more_does_not(checkpointed, size, mistral):
    tokens = mistral.largest(size * GIB, checkpointed)
    assert (tokens > 4096) == (size == 9)
    assert mistral.total(tokens, checkpointed) <= size * GIB * (1 + 1e-6)
    assert mistral.total(round(tokens * 1.02) + 64, checkpointed) > size * GIB
    assert mistral.largest(4 * GIB, checkpointed) == 0


def test_a_plan_takes_as_few_checkpointed_layers_as_fit(mistral):
    layers = []
    for size in (80, 24, 16, 12):
        planned = mistral.plan(size * GIB, 2048)
        assert 2048 <= planned.tokens <= memory.BUSY_TOKENS["cuda"]
        assert mistral.total(planned.tokens, planned.checkpointed_layers) <= size * GIB
        if planned.checkpointed_layers:
            assert mistral.total(planned.tokens, planned.checkpointed_layers - 1) > size * GIB
        layers.append(planned.checkpointed_layers)
    assert layers == sorted(layers)
    assert layers[0] == 0
    assert 0 < layers[2] < 32


def test_a_plan_always_takes_the_longest_row(mistral):
    assert mistral.plan(80 * GIB, 12_000).tokens == 12_000
    small = mistral.largest(6 * GIB, 32)
    assert mistral.plan(6 * GIB, small).tokens == small
    assert mistral.plan(4 * GIB, 1) is None
    assert mistral.plan(0, 1) is None


def test_processes_that_share_a_step_compute_fewer_layers_twice():
    """16 pairs of 1,000 tokens a step: what must fit is what a process has of it."""
    found = {}
    for processes in (1, 4, 16):
        recipe = recipe_of(only="dpo", batch_size=16, lora={"r": 16, "alpha": 32})
        forecast = Forecast(recipe, "dpo", shape("Mistral-7B-v0.3"), "cuda", HALF, processes)
        assert (forecast.cards, forecast.dealt) == (1, 0)
        forecast.most_steps = 16_000
        found[processes] = forecast.plan(16 * GIB, 1000)
    assert found[1].tokens > found[4].tokens == 4000 > found[16].tokens == 1000
    assert found[1].checkpointed_layers > found[4].checkpointed_layers > found[16].checkpointed_layers
