"""Any data set in, the prompts in it out; what is refused is named by place and reason.

The shape of each row is detected: a prompt alone, or any row that the other stages learn from, whose answer is left
out.
"""

from dataclasses import dataclass
from typing import Any

from qalign.config.stages import Source
from qalign.data.formats import (
    Message,
    answers,
    as_turns,
    check_order,
    check_text,
    collect,
    columns,
    named_keys,
    prompt_turns,
    split_prompt,
    system_turns,
)
from qalign.data.readers import BadRow


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for an answer."""

    turns: tuple[Message, ...]
    """`{"role", "content"}` each: system first if at all, a user's turn last."""
    where: str
    """File and line (or row) it came from."""
    columns: dict[str, Any]
    """The row as it came, for functions that score answers to it."""


def prompts(sources: tuple[Source, ...], split: str, limit: int | None, seed: int):
    """(`list[Prompt]`, `list[Refused]`) of every source, read as `collect` says."""
    return collect(sources, split, limit, seed, canonical_prompt)


def canonical_prompt(raw: Any, where: str) -> Prompt:
    """One row of any known shape as a `Prompt`.

    Raises:
        BadRow: the shape is unknown, or it has no user's turn to answer.
    """
    row = columns(raw)
    if not isinstance(row.get("system", ""), str):
        raise BadRow(f"system: expected a text, found {type(row['system']).__name__}")
    turns = _turns(row)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["role"] == "user" for turn in turns):
        raise BadRow(
            f"no user's turn to answer: this row has {named_keys(row)}; expected prompt, messages, conversations, "
            "instruction, turns, or an HH transcript"
        )
    check_order(turns, "the prompt", "user")
    check_text([turn["content"] for turn in turns])
    return Prompt(tuple(turns), where, row)


def _turns(row: dict) -> list[Message]:
    chosen, rejected = answers(row)
    answer = rejected if chosen is None else chosen
    if answer is not None:  # with itself it shares all but the last turn
        prompt, last, _ = split_prompt(prompt_turns(row), answer, answer)
        return prompt + last if last[-1:] and last[-1]["role"] == "user" else prompt  # the last question has no answer
    if "instruction" in row and "output" in row:
        # Some editions have a 'prompt' beside: the row once more in a template, its output included.
        return prompt_turns({key: value for key, value in row.items() if key != "prompt"})
    if not row.keys() & {"prompt", "conversations", "messages", "instruction"}:
        if "turns" in row:  # MT-bench: the second question is about the answer to the first
            turns = row["turns"]
            if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
                raise BadRow("turns: expected a list of the user's texts")
            return [*system_turns(row), {"role": "user", "content": turns[0]}]
        text = row.get("text")
        if isinstance(text, str) and text.startswith("\n\nHuman:"):
            return [*system_turns(row), *as_turns(text, "text")]
    return prompt_turns(row)
