"""Dialogues for tests of SFT: what they are as ids, and their loss from plain full logits."""

import json
from pathlib import Path

import torch
import trl

from qalign.config.recipe import Lora, Model
from qalign.data.formats import Dialogue, PlainText
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import IGNORED, TokenDialogue, encode_dialogues
from qalign.model.base import Base, Role, load
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
