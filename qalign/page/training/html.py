"""Messages as HTML."""

from html import escape


def paragraph(text: str) -> str:
    """A message as HTML that a screen reader reads aloud when it changes; a line break stays one."""
    return f'<p role="status">{"<br>".join(map(escape, text.splitlines()))}</p>' if text else ""
