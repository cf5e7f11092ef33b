"""Will it fit? A forecast of the memory that each stage of a recipe needs, before any weight is downloaded.

    python -m qalign.fit RECIPE [key=value …] [--memory 12GB] [--cards 2]

The forecast needs only the base's config: it runs the training step on tensors without content and counts the bytes
that are alive (`qalign.model.memory.forecast`). It assumes the longest row that the recipe allows.
"""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qalign.cli import SHARED_BASE, recipe_parser, run_parsed
from qalign.config.load import load
from qalign.config.paths import is_own_model
from qalign.config.recipe import NOT_SHARED, Recipe
from qalign.config.stages import RL_STAGES
from qalign.errors import UserError, short
from qalign.model import origin
from qalign.reports.answers import SIDE_BY_SIDE
from qalign.train.run_folder import print_table

if TYPE_CHECKING:
    from qalign.model.memory.forecast import Forecast

SHADES = "█▓▒░▚▞▤"
WIDTH, MAX_CARDS = 60, 1024
ROWS = {"sft": "rows", "reward": "pairs", "dpo": "pairs", "kto": "answers", "ppo": "prompts with their answers"}
ROWS["grpo"] = ROWS["ppo"]


def report(recipe: Recipe, given: str | None, cards: int = 1) -> None:
    """Show how much memory each stage of a recipe needs, and what would fit."""
    card = None if given is None else memory_of(given)
    if not 1 <= cards <= MAX_CARDS:
        raise UserError(f"--cards: {cards} is not a number of cards; expected 1 to {MAX_CARDS}")
    if recipe.model.shard and cards == 1:
        raise UserError("--cards: model.shard deals the base out to several cards; say how many, such as --cards 2")
    recipe = as_stored(recipe)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    import torch

    from qalign.model.loading import DTYPES, compute_dtype, device, load_config, readable
    from qalign.model.memory.forecast import Forecast, usable_memory, usable_of_card
    from qalign.model.memory.kv_cache import measured_cache

    spec, here = recipe.model, device().type
    where = here if card is None else "cuda"
    memory = usable_memory(where) if card is None else usable_of_card(card)
    dtype = compute_dtype(spec) if where == here else DTYPES.get(spec.compute_dtype, torch.bfloat16)
    config = load_config(spec)
    what = f"{spec.base}: {spec.quantization}, computing in {str(dtype).removeprefix('torch.')}"
    each = f" of each of {cards} processes" if cards > 1 else ""
    print(f"{what}, rows of up to {spec.max_length:,} tokens, {gib(memory)} usable on {where}{each}", flush=True)
    forecasts = {}
    for stage in recipe.stages:
        if spec.shard and stage not in SHARED_BASE:
            print_table(stage, [("fits", f"NO: model.shard: {NOT_SHARED}")])
            continue
        with readable(spec.base, "model.base", "can't be trained"):  # as it may have no class of language models
            forecasts[stage] = Forecast(recipe, stage, config, where, dtype, cards).decided(memory)
            table_of_stage = lines(forecasts[stage], memory, cards)
        print_table(stage, table_of_stage)
    if spec.shard:
        return
    if measured := forecasts.get("dpo") or forecasts.get("kto"):
        held = {name: size for name, size in measured.fixed.items() if name not in ("gradients", "optimiser")}
        cache = measured_cache(measured.model())
        held["KV cache" if cache.name else "whole rows"] = SIDE_BY_SIDE * cache.bytes(spec.max_length)
        print_table(f"evaluate, {SIDE_BY_SIDE} answers at once", table(held, memory))


def as_stored(recipe: Recipe) -> Recipe:
    """The recipe with the quantisation that its base is stored in, if it is published quantised. A base that isn't
    there or can't be used is reported before torch is imported."""
    if origin.gguf_file(recipe.model):
        return recipe
    return recipe.model_copy(update={"model": origin.find(recipe.model).held(recipe.model)})


def lines(forecast: "Forecast", memory: int, cards: int = 1) -> list[tuple[str, str]]:
    """A stage's table: the parts, their sum as a bar, and what fits on each of `cards` cards."""
    from qalign.model.memory.forecast import longest_row, max_length_of
    from qalign.train.loop import rows_at_once

    recipe, stage, layers = forecast.recipe, forecast.stage, forecast.layers
    size, longest = rows_at_once(forecast.settings), longest_row(recipe, stage)
    needed = longest * (1 if size == "auto" else size)
    plan = forecast.plan(memory, needed)
    checkpointed = plan.checkpointed_layers if plan else layers
    tokens = plan.tokens if plan and size == "auto" else needed
    offloaded = forecast.can_offload if plan is None else bool(plan.offloaded)
    parts = forecast.parts(tokens, checkpointed, offloaded=offloaded)
    found = [*table(parts, memory), *streamed(forecast), *sharded(forecast), *not_counted(forecast)]
    at_once = f"{tokens:,} tokens at once, {checkpointed or 'no'} of {layers} layers checkpointed"
    if plan is None:
        return [*found, ("fits", f"NO: {at_once}"), ("change", advice(forecast, memory, needed // longest, cards))]
    limit = min(forecast.furthest(memory), longest_row(recipe, stage, forecast.reach))
    reach = max_length_of(recipe, stage, limit)
    means = "all layers checkpointed" + (" and offloaded" if forecast.can_offload else "")
    return [
        *found,
        ("fits", f"yes: {at_once}; that is {tokens // longest} of the longest {ROWS[stage]}"),
        *plan.lines.items(),
        ("limit", f"{limit:,} tokens with {means}: one row of max_length {reach:,}"),
    ]


def streamed(forecast: "Forecast") -> list[tuple[str, str]]:
    """What `model.stream` keeps in the computer's memory, and copies."""
    if not (size := forecast.streamed):
        return []
    copied = f"a forward and its backward copy {gib(2 * size)}, at 25 GB/s in {2 * size / 25e9:.1f} s"
    where = f"{forecast.config.get_text_config().num_hidden_layers} layers from {gib(size)} of the computer's memory"
    return [("streamed", f"yes: {where}; {copied}")]


def sharded(forecast: "Forecast") -> list[tuple[str, str]]:
    """What `model.shard` deals out, and what each process receives from the others."""
    if not (size := forecast.dealt):
        return []
    received = 2 * forecast.layers_dealt * (forecast.cards - 1) / forecast.cards
    held = f"yes: each of {forecast.cards} processes holds {gib(size / forecast.cards)} of {gib(size)}"
    return [
        (
            "sharded",
            f"{held}; a forward and its backward receive {gib(received)}, at 25 GB/s in {received / 25e9:.1f} s",
        )
    ]


def not_counted(forecast: "Forecast") -> list[tuple[str, str]]:
    """What PPO and GRPO may hold beside the base and its adapters; its size is known only once it is loaded."""
    from qalign.model.decoding.vllm_engine import VLLM_SHARE

    if forecast.stage not in RL_STAGES:
        return []
    found = [f"the model {s.source}" for _, s in forecast.settings.sources if is_own_model(s.source)]
    if (engine := forecast.settings.engine) != "transformers":
        found += [f"vLLM, {VLLM_SHARE:.0%} of the card" if engine == "vllm" else f"the vLLM server {engine}"]
    return [("not counted", ", ".join(found))] if found else []


def table(parts: dict[str, int], memory: int) -> list[tuple[str, str]]:
    """Each part, and their sum as a bar."""
    rows = [(name, f"{gib(part):>10}  {shade}") for shade, (name, part) in zip(SHADES, parts.items(), strict=False)]
    return [*rows, ("in all", f"{gib(sum(parts.values())):>10}  {bar(parts, memory)}")]


def advice(forecast: "Forecast", memory: int, rows: int, cards: int = 1) -> str:
    """The one setting to change if the longest row doesn't fit."""
    from qalign.model.memory.forecast import SHORTEST, Forecast, longest_row, max_length_of

    recipe, stage = forecast.recipe, forecast.stage
    limit = max_length_of(recipe, stage, forecast.furthest(memory))
    if rows > 1 and limit >= recipe.model.max_length:
        return f"{stage}.micro_batch_size=auto"
    if limit >= SHORTEST:
        return f"model.max_length={limit // 64 * 64}"
    for section, key, value in (("model", "quantization", "nf4"), ("lora", "r", 8)):
        part = getattr(recipe, section)
        if getattr(part, key) == value:
            continue
        other = forecast.with_recipe(recipe.model_copy(update={section: part.model_copy(update={key: value})}))
        if other.furthest(memory) >= longest_row(recipe, stage, SHORTEST):
            return f"{section}.{key}={value}"
    if cards > forecast.cards and stage in SHARED_BASE:
        shared = recipe.model_copy(update={"model": recipe.model.model_copy(update={"shard": True})})
        other = Forecast(shared, stage, forecast.config, forecast.device, forecast.dtype, cards)
        if other.furthest(memory) >= longest_row(recipe, stage, SHORTEST):
            return "model.shard=true"
    fixed = gib(sum(forecast.fixed.values()))
    return f"model.base: a smaller model; this one takes {fixed} of {gib(memory)} before the first token"


def bar(parts: dict[str, int], memory: int) -> str:
    """The parts in a row. Dots are free memory; what lies behind the end mark `|` doesn't fit."""
    drawn = "".join(shade * round(WIDTH * part / memory) for shade, part in zip(SHADES, parts.values(), strict=False))
    return f"{drawn[:WIDTH]:·<{WIDTH}}|{drawn[WIDTH : 2 * WIDTH]} {sum(parts.values()) / memory:.0%} of {gib(memory)}"


def memory_of(text: str) -> int:
    """`12GB`, `12 GiB` or `12` in bytes, or a `UserError`. A card labelled in GB has GiB, so both mean 2^30."""
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)\s*(?:[gG](?:i?[bB])?)?\s*", text)
    if not match or not float(match[1]):
        raise UserError(f"--memory: {short(text)} is not a size; write 12GB for a card with 12 GB")
    return int(float(match[1]) * 2**30)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main(words: Sequence[str] | None = None) -> None:
    parser = recipe_parser("fit", report.__doc__)
    parser.add_argument("--memory", help="of the card, such as 12GB (default: this computer's own)")
    parser.add_argument("--cards", type=int, default=1, help="that share the work, and the base with model.shard")

    def work(args: argparse.Namespace) -> None:
        report(load(args.recipe, args.overrides, files_of=("model",)), args.memory, args.cards)

    run_parsed(parser, work, words)


if __name__ == "__main__":
    main()
