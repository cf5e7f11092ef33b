"""Will it fit? The memory of every stage of a recipe, before any weight is fetched.

    python -m qalign.fit RECIPE [key=value …] [--memory 12GB]

The base's config is enough: the training step runs on tensors without content, and what would be alive is counted
(`qalign.model.memory`). The longest row that the recipe allows is assumed: `model.max_length`, or for a pair two of it.
"""

import re
import sys

from qalign.cli import exit_code, recipe_parser
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.errors import UserError
from qalign.evaluate import SIDE_BY_SIDE
from qalign.train.run_folder import print_table

SHADES = "█▓▒░▚▞▖"
WIDTH = 60
ROWS = {"sft": "rows", "reward": "pairs", "dpo": "pairs", "ppo": "prompts with their answers"}
SHORTEST = 256  # a max_length below this is no help


def report(recipe: Recipe, given: str | None) -> None:
    """Show what each stage of a recipe takes of a card's memory, and what would fit."""
    memory = None if given is None else memory_of(given)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    import torch

    from qalign.model.loading import DTYPES, compute_dtype, device, load_config
    from qalign.model.memory import USABLE, Forecast, kv_cache_bytes, usable_memory

    spec, here = recipe.model, device().type
    where = here if memory is None else "cuda"
    elsewhere = DTYPES.get(spec.compute_dtype, torch.bfloat16)
    dtype = compute_dtype(spec) if where == here else elsewhere
    memory = usable_memory(where) if memory is None else int(memory * USABLE)
    config = load_config(spec)
    what = f"{spec.base}: {spec.quantization}, computing in {str(dtype).removeprefix('torch.')}"
    print(f"{what}, rows of up to {spec.max_length:,} tokens, {gib(memory)} usable on {where}", flush=True)
    for stage in recipe.stages:
        forecast = Forecast(recipe, stage, config, where, dtype)
        print_table(stage, lines(forecast, memory))
    if recipe.dpo:
        forecast = Forecast(recipe, "dpo", config, where, dtype)
        held = {name: size for name, size in forecast.fixed.items() if name not in ("gradients", "optimiser")}
        held["KV cache"] = kv_cache_bytes(config, SIDE_BY_SIDE * spec.max_length, dtype.itemsize)
        print_table(f"evaluate, {SIDE_BY_SIDE} answers at once", table(held, memory))


def lines(forecast, memory: int) -> list[tuple[str, str]]:
    """A stage's table: its parts, their sum as a bar, and what fits."""
    from qalign.model.memory import longest_row, max_length_of
    from qalign.train.loop import rows_at_once

    size = rows_at_once(forecast.settings)
    rows = 1 if size == "auto" else size
    longest = longest_row(forecast.recipe, forecast.stage)
    plan = forecast.plan(memory, rows * longest)
    others = not_counted(forecast)
    layers = plan.checkpointed_layers if plan else forecast.layers
    tokens = plan.tokens if plan and size == "auto" else rows * longest
    parts = forecast.parts(tokens, layers)
    found = table(parts, memory)
    at_once = f"{tokens:,} tokens at once, {layers or 'no'} of {forecast.layers} layers checkpointed"
    if plan is None:
        return [*found, *others, ("fits", f"NO: {at_once}"), ("change", advice(forecast, memory, rows))]
    largest = longest_row(forecast.recipe, forecast.stage, forecast.reach)
    limit = min(forecast.largest(memory, forecast.layers), largest)
    reach = max_length_of(forecast.recipe, forecast.stage, limit)
    return [
        *found,
        *others,
        ("fits", f"yes: {at_once}; that is {tokens // longest} of the longest {ROWS[forecast.stage]}"),
        ("limit", f"{limit:,} tokens with all layers checkpointed: one row of max_length {reach:,}"),
    ]


def not_counted(forecast) -> list[tuple[str, str]]:
    """What PPO may hold beside the base and its roles; how large it is shows only when it is loaded."""
    from qalign.config.paths import is_own_model
    from qalign.model.generation import VLLM_SHARE

    if forecast.stage != "ppo":
        return []
    found = [f"the model {s.source}" for _, s in forecast.settings.sources if is_own_model(s.source)]
    found += [f"vLLM, {VLLM_SHARE:.0%} of the card"] if forecast.settings.engine == "vllm" else []
    return [("not counted", ", ".join(found))] if found else []


def table(parts: dict[str, int], memory: int) -> list[tuple[str, str]]:
    """Each part, and their sum as a bar."""
    rows = [(name, f"{gib(part):>10}  {shade}") for shade, (name, part) in zip(SHADES, parts.items(), strict=False)]
    return [*rows, ("in all", f"{gib(sum(parts.values())):>10}  {bar(parts, memory)}")]


def advice(forecast, memory: int, rows: int) -> str:
    """The one setting to change when the longest row doesn't fit."""
    from qalign.model.memory import longest_row, max_length_of

    recipe = forecast.recipe
    limit = max_length_of(recipe, forecast.stage, forecast.largest(memory, forecast.layers))
    if rows > 1 and limit >= recipe.model.max_length:
        return f"{forecast.stage}.micro_batch_size=auto"
    if limit >= SHORTEST:
        return f"model.max_length={limit // 64 * 64}"
    for section, change in (("model", {"quantization": "nf4"}), ("lora", {"r": 8})):
        part = getattr(recipe, section)
        other = forecast.with_recipe(recipe.model_copy(update={section: part.model_copy(update=change)}))
        if part.model_dump().items() >= change.items():
            continue
        if other.largest(memory, other.layers) >= longest_row(recipe, forecast.stage, SHORTEST):
            return ", ".join(f"{section}.{key}={value}" for key, value in change.items())
    fixed = gib(sum(forecast.fixed.values()))
    return f"model.base: a smaller model; this one takes {fixed} of {gib(memory)} before the first token"


def bar(parts: dict[str, int], memory: int) -> str:
    """The parts in a row; dots are what is left of the memory, and what is behind the end mark doesn't fit."""
    drawn = "".join(shade * round(WIDTH * part / memory) for shade, part in zip(SHADES, parts.values(), strict=False))
    return f"{drawn[:WIDTH]:·<{WIDTH}}|{drawn[WIDTH : 2 * WIDTH]} {sum(parts.values()) / memory:.0%} of {gib(memory)}"


def memory_of(text: str) -> int:
    """`12GB`, `12 GiB` or `12` as bytes. Cards are sold by GiB and labelled GB, so both mean 2^30.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:[gG](?:i?[bB])?)?\s*", text)
    if not match or not float(match[1]):
        raise UserError(f"--memory: '{text}' is no size; write 12GB for a card with 12 GB")
    return int(float(match[1]) * 2**30)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main() -> None:
    parser = recipe_parser("fit", report.__doc__)
    parser.add_argument("--memory", help="the card's, such as 12GB; this computer's own where it is left out")
    args = parser.parse_intermixed_args()
    sys.exit(exit_code(lambda: report(load(args.recipe, args.overrides), args.memory)))


if __name__ == "__main__":
    main()
