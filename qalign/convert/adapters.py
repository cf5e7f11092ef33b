"""A run's adapter alone, for a base that another program holds: what it adds, and as a LoRA of llama.cpp."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import gguf
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qalign.convert.gguf import close, gguf_name, layout_of, permuted
from qalign.errors import UserError
from qalign.model.base import Base, Role
from qalign.train.run_folder import RunFolder


class Update(NamedTuple):
    """What LoRA adds to a matrix W: `scale` · B A."""

    a: Tensor  # float32 (rank, inputs)
    b: Tensor  # float32 (outputs, rank)
    scale: float


def updates(run: RunFolder, base: Base) -> dict[str, Update]:
    """Loads the adapter of a run and returns what it adds to each layer, by the layer's name; a `UserError` if it
    changes more than that."""
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    role, found = str(Role.POLICY), dict[str, Update]()
    for name, module in base.lm.named_modules():
        if isinstance(module, LoraLayer) and role in module.lora_A and not module.use_dora.get(role):
            a, b = (cast(Any, part[role]).weight.detach().float().cpu() for part in (module.lora_A, module.lora_B))
            found[name] = Update(a, b, module.scaling[role])
    if len(found) * 2 != len(base.trained_weights(role)):
        raise UserError(
            f"{run.path}: its adapter has more than LoRA on layers (DoRA, biases, or rows of the embeddings), which "
            "can't stand alone there; export the whole model, without --base or with --to gguf"
        )
    return found


def write_gguf(found: dict[str, Update], lm: Any, file: Path, name: str) -> None:
    """Writes an adapter as llama.cpp's LoRA, in float32. llama.cpp scales by alpha / rank; with alpha = 1, what is
    missing to the layer's own scale is part of B."""
    layout = layout_of(lm.config)
    names = gguf.get_tensor_name_map(layout, lm.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
    for layer, update in found.items():
        named = gguf_name(names, f"{layer}.weight")
        b = permuted(lm.config, f"{layer}.weight", update.b * update.scale * len(update.a))
        writer.add_tensor(f"{named}.lora_a", update.a.contiguous().numpy())
        writer.add_tensor(f"{named}.lora_b", b.contiguous().numpy())
    close(writer)


def with_adapter(tensors: dict[str, Tensor], adapter: dict[str, Tensor], alpha: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a `.gguf` file with those of an adapter's file added, as llama.cpp computes them."""
    found = dict(tensors)
    for name, a in adapter.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            found[layer] = tensors[layer] + alpha / len(a) * adapter[f"{layer}.lora_b"] @ a
    return found
