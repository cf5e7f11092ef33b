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


MOST_COMMON = """
a about after again all also an and any are as at back be because been before but by can come could day do does don't
down even find first for from get give go good had has have he her here him his how i if in into is it it's its just
know let like little long look make many may me more most much must my need never new no not now of off on one only or
other our out over own people put right same say see she should so some still such take than that the their them then
there these they thing think this those time to too two up us use very want was water way we well were what when where
which while who why will with work would year yes you you're your
"""  # the words that English is mostly made of
COMMON = frozenset(MOST_COMMON.split())


def plain(completions: list[str]) -> list[float]:
    """The share of an answer's words that are common English words; an answer of fewer than 5 words counts as 5."""
    scores = []
    for text in completions:
        words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower().replace("’", "'"))
        scores.append(sum(word in COMMON for word in words) / max(5, len(words)))
    return scores
