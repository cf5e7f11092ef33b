"""Rewards for the demo, as an example of functions of your own: one number an answer.

A function is given what it names of: `prompts` (each a list of turns), `completions` (texts), `completion_ids`, `ended`
(whether each answer ended by itself) and the columns of the rows, all as lists with an entry an answer.
"""

import re


def short(completions: list[str], ended: list[bool]) -> list[float]:
    """1 for an answer of at most two sentences that ends, 0.5 less for each sentence more, -1 for one that was cut."""
    scores = [max(-1.0, 1 - 0.5 * max(0, sentences(text) - 2)) for text in completions]
    return [score if end else -1.0 for score, end in zip(scores, ended, strict=True)]


def sentences(text: str) -> int:
    """How many sentences a text has."""
    return len(re.findall(r"[^.!?\n]+[.!?\n]*", text.strip()))


def concise(completions: list[str]) -> list[float]:
    """1 for an answer of 15 words, 1/15 less for each word more or fewer, but at least -1."""
    return [max(-1.0, 1 - abs(len(text.split()) - 15) / 15) for text in completions]
