"""A run's adapter merged into its base, as a plain 16-bit model folder that needs neither qalign nor PEFT.

It is never merged into the 4-bit weights: rounding to 4 bits again would lose most of what was learned (measured in
docs/merging.md). The default is the dequantised base, on which the adapter was trained.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers as tf

from qalign.data.tokenize import pad_for_scores
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.adapters import generation_config
from qalign.model.adapters.targets import name_of
from qalign.model.base import Base, Role, load
from qalign.model.loading import Form, save_tokenizer
from qalign.train.run_folder import RunFolder

WORDS = {
    "dequantized": "the dequantised base, on which the adapter was trained",
    "original": "the original 16-bit base, which the adapter was not trained on",
}
HEADROOM = 1.2  # times its weights: the memory that a model needs to run a row of a few hundred tokens
CARD = """\
---
base_model: {source}
library_name: transformers
tags: [qalign, {run.stage}]
---
# {name}: {run.stage}, merged

The adapter `{run.adapter}` merged onto {words} (`{run.recipe.model.base}`).
"""


def merged(run: RunFolder, onto: Form, *, bits: Literal[16, 32] = 16) -> tuple[Base, Any]:
    """The run's base, and its weights with the adapter added: the sums rounded to 16 bits, or in float32 for who will
    round them otherwise (as far as the memory allows)."""
    base = loaded(run, onto)
    if bits == 32 and fits_in_float32(base.lm):
        base.lm.float()
    is_reward = run.stage == "reward"
    role = Role.REWARD if is_reward else Role.POLICY
    base.load_adapter(role, str(run.adapter), trainable=False)
    model: Any = base.model  # PEFT finds its methods at run time, so they have no types
    try:
        with _untied(base.lm):
            plain = model.merge_and_unload(safe_merge=True, adapter_names=[role])
    except (RuntimeError, ValueError) as error:  # such as a bias of LoRA on layers that have none
        raise UserError(f"{run.path}: its adapter can't be merged: {error}") from None
    fresh = _fresh(_classifier(base) if is_reward else type(plain), plain)
    published = tf.AutoConfig.from_pretrained(base.origin.folder, trust_remote_code=False)
    if bits == 16 and fresh.dtype == torch.float32:
        fresh = fresh.to(published.dtype if published.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16)
    if not is_reward:  # `generate` and vLLM must stop where the answers of the training data end
        fresh.generation_config = generation_config.trained(fresh, base.template)
    return base, fresh


def loaded(run: RunFolder, onto: Form) -> Base:
    """The run's base on the CPU, not quantised, without the adapter."""
    spec = run.recipe.model
    if trained := lineage.read(run.adapter):  # `auto` may be another dtype here than where the run was trained
        spec = spec.model_copy(update={"compute_dtype": trained.compute_dtype})
    base = load(spec, onto)
    lineage.check(str(run.path), run.adapter, base.lineage(run.stage))
    return base


def fits_in_float32(lm: Any) -> bool:
    """Whether the memory is enough for a second copy of a model, in float32."""
    return HEADROOM * 4 * lm.num_parameters() < psutil.virtual_memory().available


def write(run: RunFolder, onto: Form, folder: Path) -> dict[str, str]:
    """Writes the merged model into an empty folder. Returns lines about it, by name."""
    base, model = merged(run, onto)
    card = CARD.format(run=run, source=base.origin.source, words=WORDS[onto], name=run.path.parent.name)
    model.save_pretrained(folder)
    save_tokenizer(base.tokenizer, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    lines = {"onto": WORDS[onto], "in": str(model.dtype).removeprefix("torch.")}
    lines["load it with"] = f'{type(model).__name__}.from_pretrained("{{target}}")'
    if base.left_out:
        lines["left out"] = f"{', '.join(base.left_out)}: this is the text model alone"
    if changed := generation_config.mended(base.origin)[1]:
        lines["generation"] = f"the base's settings contradict each other; changed or left out: {', '.join(changed)}"
    return lines


@contextmanager
def _untied(lm: Any) -> Generator[None]:
    """Gives the output layer weights of its own while an adapter is merged. An adapter on the embeddings changes only
    what the model reads, not what it predicts with; both are one tensor in many small models. Afterwards they are tied
    again unless the adapter has changed the embeddings."""
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


def _classifier(base: Base) -> Any:
    """The sequence classifier of transformers that a reward model becomes, as the base's config asks for it."""
    base.tokenizer.pad_token, config = pad_for_scores(base.template), base.lm.config
    config.num_labels, config.get_text_config().pad_token_id = 1, base.tokenizer.pad_token_id
    if type(config) not in tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{base.spec.base}: transformers has no sequence classifier of this family, so a merged reward model could "
            "not be loaded; the README.md in the adapter's folder shows how to load the adapter"
        )
    return tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def _fresh(kind: Any, plain: Any) -> Any:
    """The same tensors in a fresh model: transformers 5.23 can't save a model that was loaded from 4-bit files, not
    even after it is dequantised. A sequence classifier has no use for the language model's own head."""
    with torch.device("meta"):
        fresh = kind(plain.config)
    tensors, names = plain.state_dict(), fresh.state_dict().keys()
    head = f"{name_of(plain, plain.get_output_embeddings())}."
    kept = {name: t for name, t in tensors.items() if name in names or not name.startswith(head)}
    fresh.load_state_dict(kept, assign=True)
    fresh.tie_weights()
    if fresh.can_generate():
        fresh.generation_config = plain.generation_config
    return fresh
