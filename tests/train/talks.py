"""Dialogues for tests of SFT: what they are as ids, and their loss from plain full logits."""

import json
from pathlib import Path

import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qalign.config.recipe import Lora, Model
from qalign.data.formats import Dialogue, PlainText
from qalign.data.store.sequences import IGNORED, TokenDialogue
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_dialogues
from qalign.model.base import Base, Role, load
from tests.conftest import FIXTURES
from tests.data.test_tokenize import plain
from tests.helpers import plain_config, scramble

LORA = Lora(r=4, alpha=8)
# What is said in turn, user first; of unequal lengths, so that a mean over rows is none over tokens.
TALKS = [
    ["Hello there", "No"],
    ["Are you well?", "I am fine.", "And the dog?", "The dog is asleep under the table, and so is the cat."],
    ["Name three rivers.", "The Rhine, the Nile and the Amazon."],
    ["Why?", "Because."],
    ["Is it late?", "It is ten past four.", "Then I must go.", "Good day."],
    ["Write a line about rain.", "It rained on the roof, and on the road, and on the two of us, all night long."],
    ["What is 2 + 2?", "4"],
    ["Say nothing.", "Very well.", "Nothing!", "…"],
]
TEXT = "It rained.\n\nThen it stopped, and we went out."
# Each answer with its end of turn; of the text every token but the BOS, and the EOS.
SUPERVISED = (
    sum(len(plain("llama3", text)) + 1 for talk in TALKS for text in talk[1::2]) + len(plain("llama3", TEXT)) + 1
)


def turns(talk: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(talk)]


def config(folder, **values) -> trl.SFTConfig:
    plain_values = {"max_length": 96, "packing_strategy": "bfd", "eval_packing": False, "prediction_loss_only": True}
    return plain_config(trl.SFTConfig, folder, **plain_values | values)


def rows(tokenizer) -> list[TokenDialogue]:
    """Eight dialogues and a plain text as ids."""
    said = [Dialogue(tuple(turns(talk)), 0, f"talks:{n}") for n, talk in enumerate(TALKS, 1)]
    sequences, refused = encode_dialogues(ChatTemplate(tokenizer), [*said, PlainText(TEXT, "talks:9")], 96)
    assert not refused
    return sequences


def write_talks(folder: Path) -> str:
    """The dialogues and the text as a user has them."""
    path = folder / "talks.jsonl"
    lines = [{"messages": turns(talk)} for talk in TALKS] + [{"text": TEXT}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def scrambled(spec: Model) -> Base:
    """A base with an adapter that does something."""
    torch.manual_seed(0)
    base = load(spec)
    base.add_adapter(Role.POLICY, LORA)
    scramble(base)
    return base


@torch.no_grad()
def logps_alone(base: Base, row: TokenDialogue) -> torch.Tensor:
    """float64 `(supervised tokens,)`: the log-prob of each, from the full logits of the row by itself, unpadded."""
    base.model.eval()
    logps = base.model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double().log_softmax(dim=-1)
    targets = torch.tensor(row.ids[1:])
    return logps.gather(1, targets[:, None])[:, 0][torch.tensor(row.labels[1:]) != IGNORED]


def mean_loss(base: Base, sequences: list[TokenDialogue]) -> float:
    """The mean over all supervised tokens of some rows."""
    return -torch.cat([logps_alone(base, row) for row in sequences]).mean().item()


# --- tiny models of some families ------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 2006, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2002, "bos_token_id": 2000,
    "eos_token_id": 2005,
}  # fmt: skip
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {},
    "gemma2": {**ALTERNATING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": ALTERNATING,
    "phi3": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": {**ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


def write_kind(kind: str, folder: str) -> None:
    """Writes a random model of 2 layers of some family, as a plain model folder with Llama 3's kind of tokenizer."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | KINDS.get(kind, {})))
    for parameter in lm.parameters():
        if parameter.dim() > 1:  # large enough that every token matters
            torch.nn.init.normal_(parameter, std=0.1)
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3").save_pretrained(folder)
