"""A scripted labeller for the demo of constitutional AI, as an example of one of your own.

A labeller is given lists with an entry for each judgement: `prompts` (each a list of turns), `firsts` and `seconds`
(the two answers) and `principles` (names). It returns the probability that the first answer is better.
"""

import math
import re


def plain(prompts: list[list[dict]], firsts: list[str], seconds: list[str], principles: list[str]) -> list[float]:
    """Prefers the answer with fewer sentences, and flattery counts as two more; `brevity` is the surest of it."""
    found = []
    for first, second, principle in zip(firsts, seconds, principles, strict=True):
        gap = cost(second) - cost(first)
        found.append(1 / (1 + math.exp(-gap * (1.0 if principle == "brevity" else 0.3))))
    return found


def cost(text: str) -> int:
    """Sentences of a text, and two for each word of flattery in it."""
    flattery = re.findall(r"\b(?:wonderful|great|beautiful|amazing|lovely|fortunate|love)\b", text.lower())
    return len(re.findall(r"[^.!?\n]+[.!?\n]*", text.strip())) + 2 * len(flattery)
