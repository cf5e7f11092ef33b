"""A run's adapter merged into its base: a plain 16-bit model folder that needs neither qalign nor PEFT.

    python -m qalign.merge RUN [--onto dequantized | original] [--to FOLDER]

Never into the 4-bit weights: rounding to 4 bits again loses most of what was learned (docs/merging.md has the measured
table). The default is the dequantised base, which is the very model that was trained.
"""

import argparse
import sys
from pathlib import Path

from qalign.cli import exit_code
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder, open_run, print_table

WORDS = {
    "dequantized": "the dequantised base, the very model that was trained",
    "original": "the original 16-bit base, which the adapter has not seen",
}


def merge(folder: str, onto: str, to: str | None) -> None:
    """Merge a run's adapter into its base, as a plain 16-bit model folder."""
    run = open_run(folder, ("ppo", "dpo", "sft", "reward"))
    target = Path(to) if to else run.path / f"merged-{onto}"
    if target.exists():
        raise UserError(f"{target}: exists already; name another with --to, or remove it")

    if onto == "original" and run.recipe.lora.init == "loftq":
        raise UserError(
            f"--onto original: {run.path} has `init: loftq`, so its adapter mends what rounding to 4 bits did, and the "
            "original was never rounded; use --onto dequantized"
        )

    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    import torch
    from transformers import AutoConfig

    from qalign.data.tokenize import end_of_turn_id
    from qalign.model import lineage
    from qalign.model.base import Role, load, load_classifier
    from qalign.model.loading import save_tokenizer, written_aside

    spec = run.recipe.model
    if trained := lineage.read(run.adapter):  # `auto` may mean another dtype here than where it was trained
        spec = spec.model_copy(update={"compute_dtype": trained.compute_dtype})
    base = (load_classifier if run.stage == "reward" else load)(spec, onto)
    lineage.check(str(run.path), run.adapter, base.lineage(run.stage))
    role = Role.REWARD if run.stage == "reward" else Role.POLICY
    base.load_adapter(role, str(run.adapter), trainable=False)
    merged = _never_quantised(base.model.merge_and_unload(safe_merge=True, adapter_names=[role]))
    if merged.dtype == torch.float32:
        published = AutoConfig.from_pretrained(base.origin.folder).dtype
        merged = merged.to(published if published in (torch.float16, torch.bfloat16) else torch.bfloat16)
    if run.stage != "reward":  # so that `generate` and vLLM stop where the answers it learned from end
        ends = merged.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        end = end_of_turn_id(base.tokenizer, spec.chat_template_kwargs)
        merged.generation_config.eos_token_id = list(dict.fromkeys([end, *ends]))
    with written_aside(target) as aside:
        merged.save_pretrained(aside)
        save_tokenizer(base.tokenizer, aside)
        (aside / "README.md").write_text(_card(run, base.origin.source, onto), encoding="utf-8")
    size = sum(file.stat().st_size for file in target.iterdir())
    print_table(
        f"merged {run.path}",
        [
            ("onto", WORDS[onto]),
            ("model", f"{target} ({size / 1e9:,.2f} GB, {str(merged.dtype).removeprefix('torch.')})"),
            ("load it with", f'{type(merged).__name__}.from_pretrained("{target}")'),
        ],
    )


def _never_quantised(merged):
    """The same tensors in a fresh model: transformers 5.23 can't save one that was read from 4-bit files, not even once
    it is dequantised."""
    import torch

    with torch.device("meta"):
        fresh = type(merged)(merged.config)
    fresh.load_state_dict(merged.state_dict(), assign=True)
    fresh.tie_weights()
    if merged.can_generate():
        fresh.generation_config = merged.generation_config
    return fresh


def _card(run: RunFolder, source: str, onto: str) -> str:
    return f"""---
base_model: {source}
library_name: transformers
tags: [qalign, {run.stage}]
---
# {run.path.parent.name}: {run.stage}, merged

The adapter `{run.adapter}` merged onto {WORDS[onto]} (`{run.recipe.model.base}`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qalign.merge", description=merge.__doc__)
    parser.add_argument("run", help="a finished run, such as runs/demo/dpo")
    parser.add_argument("--onto", choices=WORDS, default="dequantized", help="which 16-bit base (default: dequantized)")
    parser.add_argument("--to", metavar="FOLDER", help="where the model goes; inside the run if left out")
    args = parser.parse_args()
    sys.exit(exit_code(lambda: merge(args.run, args.onto, args.to)))


if __name__ == "__main__":
    main()
