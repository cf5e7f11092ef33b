"""Merges a run's adapter into its base: a plain 16-bit model folder that needs neither qalign nor PEFT.

    python -m qalign.merge RUN [--onto dequantized | original] [--to FOLDER]

It never merges into the 4-bit weights: rounding to 4 bits again would lose most of what was learned (measured in
docs/merging.md). The default is the dequantised base, on which the adapter was trained.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.cli import Parser, new_target, program, run_parsed
from qalign.config.atomic import clear_leftovers, new_folder
from qalign.config.paths import adapters_in
from qalign.errors import UserError
from qalign.model import origin
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder, open_run, print_table

if TYPE_CHECKING:
    from qalign.model.base import Base
    from qalign.model.loading import Form

WORDS = {
    "dequantized": "the dequantised base, on which the adapter was trained",
    "original": "the original 16-bit base, which the adapter was not trained on",
}


def merge(folder: str, onto: "Form", to: str | None) -> None:
    """Merge a run's adapter into its base, as a plain 16-bit model folder."""
    run = open_run(folder, ("grpo", "ppo", "kto", "dpo", "sft", "reward"))
    if members := [place.name for place in adapters_in(run.adapter)][1:]:
        fix = f"name one of them, such as {run.path / members[0]}"
        raise UserError(f"{folder}: is an ensemble of {len(members) + 1} members, and a model can hold one; {fix}")
    suffix = "" if run.adapter.name == "adapter" else f"-{run.adapter.name}"
    target = new_target(to, run.path / f"merged-{onto}{suffix}")
    origin.check(run.recipe.model)
    if onto == "original" and run.recipe.lora.init == "loftq":
        raise UserError(
            f"--onto original: {run.path} has `init: loftq`, so its adapter corrects the rounding to 4 bits, and the "
            "original was never rounded; use --onto dequantized"
        )

    if to:
        _write(run, onto, target)
        return
    with locked(Path(os.path.realpath(run.path))):  # a stage would take the unfinished model for leftovers
        clear_leftovers(run.path)
        _write(run, onto, target)


def _write(run: RunFolder, onto: "Form", target: Path) -> None:
    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.model.adapters import generation_config
    from qalign.model.loading import save_tokenizer

    base, merged = _merged(run, onto)
    card = CARD.format(run=run, source=base.origin.source, words=WORDS[onto], name=run.path.parent.name)
    with new_folder(target) as aside:
        merged.save_pretrained(aside)
        save_tokenizer(base.tokenizer, aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in target.iterdir())
    changed = generation_config.mended(base.origin)[1]
    lines = {
        "onto": WORDS[onto],
        "model": f"{target} ({size / 1e9:,.2f} GB, {str(merged.dtype).removeprefix('torch.')})",
        "load it with": f'{type(merged).__name__}.from_pretrained("{target}")',
    }
    if base.left_out:
        lines["left out"] = f"{', '.join(base.left_out)}: this is the text model alone"
    if changed:
        lines["generation"] = f"the base's settings contradict each other; changed or left out: {', '.join(changed)}"
    print_table(f"merged {run.path}", lines.items())


def _merged(run: RunFolder, onto: "Form") -> tuple["Base", Any]:
    """The run's base, and its 16-bit weights with the adapter added."""
    import torch
    from transformers import AutoConfig

    from qalign.model import lineage
    from qalign.model.adapters import generation_config
    from qalign.model.base import Role, load

    spec, is_reward = run.recipe.model, run.stage == "reward"
    if trained := lineage.read(run.adapter):  # `auto` may be another dtype here than where the run was trained
        spec = spec.model_copy(update={"compute_dtype": trained.compute_dtype})
    base = load(spec, onto)
    lineage.check(str(run.path), run.adapter, base.lineage(run.stage))
    role = Role.REWARD if is_reward else Role.POLICY
    base.load_adapter(role, str(run.adapter), trainable=False)
    model: Any = base.model  # PEFT finds its methods at run time, so they have no types
    try:
        with _untied(base.lm):
            plain = model.merge_and_unload(safe_merge=True, adapter_names=[role])
    except (RuntimeError, ValueError) as error:  # such as a bias of LoRA on layers that have none
        raise UserError(f"{run.path}: its adapter can't be merged: {error}") from None
    merged = _fresh(_classifier(base) if is_reward else type(plain), plain)
    published = AutoConfig.from_pretrained(base.origin.folder, trust_remote_code=False)
    if merged.dtype == torch.float32:
        merged = merged.to(published.dtype if published.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16)
    if not is_reward:  # `generate` and vLLM must stop where the answers of the training data end
        merged.generation_config = generation_config.trained(merged, base.template)
    return base, merged


@contextmanager
def _untied(lm: Any) -> Generator[None]:
    """Gives the output layer weights of its own while an adapter is merged. An adapter on the embeddings changes only
    what the model reads, not what it predicts with; both are one tensor in many small models. Afterwards they are tied
    again unless the adapter has changed the embeddings."""
    import torch

    head, configs = lm.get_output_embeddings(), (lm.config, lm.config.get_text_config())
    if head is None or not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        yield
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    before = [config.tie_word_embeddings for config in configs]
    for config in configs:
        config.tie_word_embeddings = False
    yield
    if torch.equal(lm.get_input_embeddings().weight, head.weight):
        for config, tied in zip(configs, before, strict=True):
            config.tie_word_embeddings = tied


def _classifier(base: "Base") -> Any:
    """The sequence classifier of transformers that a reward model becomes, as the base's config asks for it."""
    import transformers as tf

    from qalign.data.tokenize import pad_for_scores

    base.tokenizer.pad_token, config = pad_for_scores(base.template), base.lm.config
    config.num_labels, config.get_text_config().pad_token_id = 1, base.tokenizer.pad_token_id
    if type(config) not in tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{base.spec.base}: transformers has no sequence classifier of this family, so a merged reward model could "
            "not be loaded; the README.md in the adapter's folder shows how to load the adapter"
        )
    return tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def _fresh(kind: Any, merged: Any) -> Any:
    """The same tensors in a fresh model: transformers 5.23 can't save a model that was loaded from 4-bit files, not
    even after it is dequantised. A sequence classifier has no use for the language model's own head."""
    import torch

    from qalign.model.adapters.targets import name_of

    with torch.device("meta"):
        fresh = kind(merged.config)
    tensors, names = merged.state_dict(), fresh.state_dict().keys()
    head = f"{name_of(merged, merged.get_output_embeddings())}."
    kept = {name: t for name, t in tensors.items() if name in names or not name.startswith(head)}
    fresh.load_state_dict(kept, assign=True)
    fresh.tie_weights()
    if fresh.can_generate():
        fresh.generation_config = merged.generation_config
    return fresh


CARD = """\
---
base_model: {source}
library_name: transformers
tags: [qalign, {run.stage}]
---
# {name}: {run.stage}, merged

The adapter `{run.adapter}` merged onto {words} (`{run.recipe.model.base}`).
"""


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("merge"), description=merge.__doc__)
    parser.add_argument("run", help="a finished run, such as runs/demo/dpo")
    parser.add_argument("--onto", choices=WORDS, default="dequantized", help="which 16-bit base (default: dequantized)")
    parser.add_argument("--to", metavar="FOLDER", help="the output folder (default: inside the run)")
    run_parsed(parser, lambda args: merge(args.run, args.onto, args.to), words)


if __name__ == "__main__":
    main()
