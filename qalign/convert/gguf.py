"""A language model of transformers as one `.gguf` file: weights, chat template, and where an answer ends.

Names of tensors and the simple quantisers come from the `gguf` package. The layout of queries and keys and the names of
metadata follow llama.cpp (docs: github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalign.convert.gguf_tokenizer import add_tokenizer
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError, one_line

LAYOUTS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
ROPE = ("default", "linear", "llama3", "yarn")  # kinds of rotary positions that are written
FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Type.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
}
EMBEDDINGS = ("token_embd.weight", "output.weight")  # never in fewer than 8 bits: every token depends on them
QUANTIZE = "llama-quantize"


def write_model(lm: Any, template: ChatTemplate, file: Path, quantization: str, name: str) -> None:
    """Writes a language model with its tokenizer and chat template. `quantization` is a key of `qalign.export`'s."""
    if quantization.upper() not in Type.__members__ or Type[quantization.upper()] not in FILE_TYPES:
        with_f32 = file.with_name(f"{file.stem}-f32.gguf")
        try:
            write_model(lm, template, with_f32, "f32", name)
            _quantize(with_f32, file, quantization)
        finally:
            with_f32.unlink(missing_ok=True)
        return
    wanted, layout = Type[quantization.upper()], layout_of(lm.config)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_hyperparameters(writer, lm.config)
    add_tokenizer(writer, template, lm.config.vocab_size)
    for named, tensor in tensors_of(lm, layout):
        data = tensor.float().numpy()
        kind = _kind(named, data.shape, wanted)
        writer.add_tensor(named, gguf.quants.quantize(data, kind), raw_dtype=kind)
    close(writer)


def close(writer: gguf.GGUFWriter) -> None:
    """Writes everything that a writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.gguf` file by their names in it, dequantised to float32: what llama.cpp computes with, but for
    its rounding of activations."""
    found: dict[str, Tensor] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()  # of a read-only file
        found[tensor.name] = torch.from_numpy(data.reshape(tensor.shape[::-1].tolist()))
    return found


def model_of(tensors: dict[str, Tensor], lm: Any) -> Any:
    """A model like `lm` of transformers, with the tensors of a `.gguf` file in place of its own."""
    names, own = gguf.get_tensor_name_map(layout_of(lm.config), lm.config.num_hidden_layers), {}
    for name in lm.state_dict():
        named = gguf_name(names, name)
        source = tensors[named if named in tensors else EMBEDDINGS[0]]  # the output layer may be the embeddings
        own[name] = permuted(lm.config, name, source, back=True)
    return type(lm).from_pretrained(
        None, config=lm.config, state_dict=own, dtype=torch.float32, trust_remote_code=False
    )


def layout_of(config: Any) -> gguf.MODEL_ARCH:
    """The layout of llama.cpp that a model of transformers has; a `UserError` if there is none that is known here."""
    family, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if family not in LAYOUTS:
        raise UserError(f"--to: models of the family '{family}' can't be written as GGUF; {', '.join(LAYOUTS)} can")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    problems = {
        f"its activation is {config.hidden_act}": config.hidden_act != "silu",
        f"its rotary positions are of the kind '{rope.get('rope_type')}'": rope.get("rope_type", "default") not in ROPE,
        f"it has layers with {', '.join(sorted(kinds))}": kinds != {"full_attention"} and family != "mistral",
    }
    if problem := next((words for words, is_so in problems.items() if is_so), None):
        raise UserError(f"--to: this {family} can't be written as GGUF: {problem}")
    return LAYOUTS[family]


def _add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """The shape of a model, by the names that llama.cpp reads."""
    heads, rope = config.num_attention_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # llama.cpp has no window for these layouts: within it the two are the same.
    reach = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(reach)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim * heads != config.hidden_size or config.model_type == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (kind := rope.get("rope_type", "default")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def tensors_of(lm: Any, layout: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by llama.cpp's names, in its layout, one after the other."""
    names = gguf.get_tensor_name_map(layout, lm.config.num_hidden_layers)
    is_tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    head = "lm_head.weight"
    for name, tensor in lm.state_dict().items():
        if is_tied and name == head:
            continue
        yield gguf_name(names, name), permuted(lm.config, name, tensor)
    if (factors := _rope_factors(lm.config)) is not None:
        yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", factors


def gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"--to: GGUF has no place for the tensor {name} of this model")
    return found


def permuted(config: Any, name: str, tensor: Tensor, *, back: bool = False) -> Tensor:
    """A tensor as llama.cpp lays it out, or `back` from there. Its layout `llama` rotates neighbouring numbers of a
    head, where transformers rotates the first half with the second: rows of queries and keys change places."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if LAYOUTS[config.model_type] != gguf.MODEL_ARCH.LLAMA or count is None:
        return tensor
    half = tensor.shape[0] // count // 2
    halves = tensor.reshape(count, *((half, 2) if back else (2, half)), *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> Tensor | None:
    """What Llama 3.1 divides each frequency of its rotary positions by; None for other kinds."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled


def _kind(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """In what a tensor is stored: vectors in float32, matrices as wanted as far as their rows have whole blocks."""
    if len(shape) == 1:
        return Type.F32
    kind = Type.Q8_0 if name in EMBEDDINGS and wanted not in (Type.F32, Type.F16, Type.BF16) else wanted
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def _quantize(source: Path, file: Path, quantization: str) -> None:
    """llama.cpp's own tool for the quantisations that have no simple quantiser."""
    command = [str(shutil.which(QUANTIZE)), str(source), str(file), quantization.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"--quantization {quantization}: {QUANTIZE} failed: {one_line(said)}")
