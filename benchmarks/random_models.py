"""Bases of a real model's shape with random weights in NF4, made where they are used: nothing is downloaded.

python benchmarks/random_models.py SHAPE FOLDER     # in 16 bits, as a folder that a recipe can name
"""

import random
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, Qwen2Config
from transformers.quantizers import AutoHfQuantizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from qalign.config.recipe import Model
from qalign.data.store.sequences import TokenPair
from qalign.data.templates import prepare_template
from qalign.model.base import Base
from qalign.model.loading import compute_dtype, device, guard_4bit
from qalign.model.origin import Origin

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
SHAPES = {
    "mistral7b": "Mistral-7B-v0.3",
    "llama31_8b": "Llama-3.1-8B",
    "qwen3_4b": "Qwen3-4B-Instruct-2507",
}
TINY = LlamaConfig(
    vocab_size=2006,  # the fixture tokenizer's
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_QWEN = {"vocab_size": 152_064, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
MADE = {  # shapes without a file: the second two are Qwen2.5's
    "tiny": TINY,
    "qwen14b": Qwen2Config(**_QWEN, intermediate_size=13_824, num_hidden_layers=48),
    "qwen32b": Qwen2Config(**_QWEN, intermediate_size=27_648, num_hidden_layers=64),
}


def config_of(shape: str):
    if shape in MADE:
        return MADE[shape]
    return AutoConfig.from_pretrained(FIXTURES / "configs" / SHAPES[shape], trust_remote_code=False)


def random_lm(config, dtype: torch.dtype, std: float = 0.02, where: torch.device | None = None):
    """A model of that shape in NF4 with double quantisation, made as transformers' own loader makes one: a skeleton
    without weights, its linear layers replaced, then one weight at a time, so that the 16-bit model never exists. It is
    quantised on the GPU if there is one, and held there or `where` else."""
    where = where or device()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantizer = AutoHfQuantizer.from_config(settings, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False)
    quantizer.preprocess_model(model=lm, device_map={"": device()})
    torch.manual_seed(0)
    for module in lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype, device=device())
            values = values.normal_(std=std) if values.dim() > 1 else values.fill_(name == "weight")  # norms are 1
            if isinstance(module, Linear4bit) and name == "weight":
                as_4bit = {key: getattr(parameter, key) for key in ("compress_statistics", "quant_type")}
                weight = Params4bit(values, requires_grad=False, module=module, **as_4bit).to(device()).to(where)
            else:
                weight = torch.nn.Parameter(values.to(where), requires_grad=False)
            setattr(module, name, weight)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(where))
    lm.tie_weights()
    quantizer.postprocess_model(lm)
    lm.hf_quantizer = quantizer  # saving asks for it
    guard_4bit(lm)
    return lm.eval()


def fixture_tokenizer():
    """TRL wants one for its pad token; its ids are part of every shape's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3", trust_remote_code=False)
    return prepare_template(tokenizer).tokenizer


def as_base(lm, tokenizer) -> Base:
    """qalign's base around a model that was not loaded from anywhere."""
    folder = tempfile.mkdtemp()
    lm.config.save_pretrained(folder)  # the key of cached references reads it
    return Base(lm, prepare_template(tokenizer), Origin(folder, None, None, folder), Model(base=folder))


def random_pair(lengths, vocabulary: int, name: str) -> TokenPair:
    generator = random.Random(name)
    return TokenPair(*([generator.randrange(10, vocabulary) for _ in range(n)] for n in lengths), name)


def main() -> None:
    shape, folder = sys.argv[1:]
    with device():
        lm = AutoModelForCausalLM.from_config(
            config_of(shape), dtype=compute_dtype(Model(base="random")), trust_remote_code=False
        )
    lm.save_pretrained(folder)
    fixture_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
