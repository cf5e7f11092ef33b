"""Tokens coloured by how much more likely one model finds them than another, as HTML."""

from dataclasses import dataclass
from html import escape

FULL_NATS = 2.0  # the difference at which a colour is at its strongest: seven times as likely
MORE, LESS = "37, 99, 235", "217, 119, 6"  # blue and amber: told apart by nearly all eyes, on white and on black

STRONGEST = 0.6  # opacity: the letters on it stay legible


@dataclass(frozen=True)
class TokenSpan:
    """A piece of an answer.

    Attributes:
        text: of one token, or of several that spell one character together.
        nats: log π/π_ref of it; above 0 the aligned model finds it likelier.
        tokens: how many it is.
    """

    text: str
    nats: float
    tokens: int = 1


def shaded(tokenizer, ids: list[int], nats: list[float]) -> list[TokenSpan]:
    """The pieces of an answer. Tokens that end within a character (half an emoji) go with those that complete it."""
    found, start, before = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            continue
        found.append(TokenSpan(text[len(before) :], sum(nats[start:end]), end - start))
        start, before = end, text
    return found


def html(shades: list[TokenSpan], model: str, other: str) -> str:
    """Coloured text with a legend above and the sum below.

    Args:
        model: whose answer this is.
        other: what it is compared with.
    """
    swatches = "".join(_span(nats, _signed(nats)) for nats in (-FULL_NATS, -1, 0, 1, FULL_NATS))
    pieces = "".join(_span(shade.nats, shade.text) for shade in shades)
    total, tokens = sum(shade.nats for shade in shades), sum(shade.tokens for shade in shades)
    return (
        f'<div class="shades"><p class="legend">less likely {swatches} more likely to {escape(model)} than to '
        f"{escape(other)}, in nats a token (log π/π_ref)</p><p class='shaded'>{pieces}</p>"
        f"<p class='sum'>sum over {tokens} tokens: <b>{_signed(total)} nats</b></p></div>"
    )


def _span(nats: float, text: str) -> str:
    strength = min(1.0, abs(nats) / FULL_NATS) * STRONGEST
    colour = f"rgba({MORE if nats > 0 else LESS}, {strength:.2f})"
    return f'<span class="shade" style="background-color: {colour}" title="{_signed(nats)} nats">{escape(text)}</span>'


def _signed(nats: float) -> str:
    return f"{nats:+.2f}".replace("-", "−")
