"""Verifiable rewards: functions that check an answer instead of judging it. Imports no torch.

    reward: qalign.rl.verifiers:number

An argument is a column of the rows, as a list with an entry for each answer, or one value for all of them, which a
function of your own fixes: `brief = partial(verifiers.length, max_words=50)` in `my_rewards.py`, used as
`reward: my_rewards.py:brief`. A check gives 1.0 or 0.0. What a row lacks is a `ValueError`: the run stops and names the
row. Thoughts up to `</think>` don't count.
"""

import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

KEYS = ("answer", "solution", "ground_truth", "target", "final_answer")  # columns of the right answer, in this order
MOST_DIGITS = 300  # of a number, and in an exponent's reach: what is longer is no answer

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SAID = re.compile(r"(?:final\s+)?answer\s*(?:is|:|=)+\s*(.+)", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)"
_SIGNED = rf"(?:(?<![\w)\].])[-+])?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(  # "1 1/2", "3/4", "-1,234.5", "6.02e23" and "6.02 × 10^23"
    rf"(?<![\w.,/])(?P<whole>{_SIGNED})(?:\s+(?P<top>\d+)/(?P<bottom>\d+)|\s*/\s*(?P<under>{_SIGNED}))?"
    r"(?:\s*(?:×|\*|x|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>[-+]?\d+)\}?)?(?![\d/]|\.\d|,\d)"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_LATEX = [  # what may stand around a number
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{?\\circ\}?|\\[%$]|[%$€£°]|\\(?:left|right|displaystyle)(?![a-z])"), ""),
    (re.compile(r"\\[,;:! ]|\{,\}|[\u202f\u2009](?=\d{3})"), ","),  # thousands in LaTeX and in type
    (re.compile(r"\*\*|__|`|~"), " "),
]


def exact(completions: Sequence[str], **columns: Any) -> list[float]:
    """Whether the final answer (`final_answer`, else the whole answer) is the one in the row's column `answer`,
    `solution`, `ground_truth`, `target` or `final_answer`. Case, spaces and a last full stop don't matter."""
    return _checked(completions, lambda text, key: _plain(text) == _plain(key), _keys(columns, len(completions)))


def number(completions: Sequence[str], tolerance: Any = 0.0, **columns: Any) -> list[float]:
    """Whether the number of an answer is that of the row's column (as for `exact`), where a solution that ends with
    `#### 18`, as GSM8K has it, stands for 18. `tolerance` is relative to the right number; numbers are compared as
    fractions, so 0.5 is 1/2."""
    given = _keys(columns, len(completions))
    keys = [number_in(key) for key in given]
    for key, text in zip(keys, given, strict=True):
        if key is None:
            raise ValueError(f"the row's answer has no number: {str(text)[:80]!r}")

    def same(text: str, key: Fraction, near: float) -> bool:
        found = number_in(text)
        return found is not None and abs(found - key) <= abs(key) * Fraction(near)

    return _checked(completions, same, keys, _each(tolerance, len(completions)))


def regex(completions: Sequence[str], pattern: Any) -> list[float]:
    """Whether the regular expression `pattern` is found in an answer; `^` and `$` match at lines, `.` matches all."""
    flags = re.MULTILINE | re.DOTALL
    found: Callable[[str, str], bool] = lambda text, wanted: re.search(wanted, text, flags) is not None  # noqa: E731
    return _checked(completions, found, _each(pattern, len(completions)))


def json_schema(completions: Sequence[str], schema: Any) -> list[float]:
    """Whether an answer is JSON, bare or in one fenced block, that fits `schema` (a JSON Schema, as text or as an
    object)."""
    from jsonschema import validators  # here, as no other function needs it

    def fits(text: str, given: Any) -> bool:
        wanted = json.loads(given) if isinstance(given, str) else given
        kind = validators.validator_for(wanted)
        kind.check_schema(wanted)
        try:
            return kind(wanted).is_valid(json.loads(_unfenced(text), parse_constant=_refused))
        except (ValueError, RecursionError):
            return False

    return _checked(completions, fits, _each(schema, len(completions)))


def length(completions: Sequence[str], min_words: Any = None, max_words: Any = None) -> list[float]:
    """1.0 for an answer of at least `min_words` and at most `max_words` words; of a shorter one the share of
    `min_words` that it has, of a longer one `max_words` as a share of its words."""
    bounds = [_each(bound, len(completions)) for bound in (min_words, max_words)]
    scores = []
    for text, least, most in zip(completions, *bounds, strict=True):
        if least is None and most is None:
            raise ValueError("length needs min_words or max_words")
        words = len(_after_thoughts(text).split())
        too_short = words / least if least and words < least else 1.0
        scores.append(most / words if most is not None and words > most else too_short)
    return scores


def final_answer(text: str) -> str | None:
    r"""What an answer marks as its result: the last `\boxed{…}`, else what follows the last `####`, else the rest of
    the last line with "answer is" or "answer:". None if it marks nothing."""
    if boxes := [*_BOXED.finditer(text)]:
        start = boxes[-1].end()
        depth, end = 1, start
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        return "" if depth else text[start : end - 1].strip()  # it was cut in the box
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    said = _SAID.findall(text)
    return said[-1].strip() if said else None


def number_in(text: Any) -> Fraction | None:
    r"""The number that a text gives as its result: of what `final_answer` finds there the first number, unless a box
    holds several; else the last number of the text. None if there is none.

    It reads `1,234.5`, `.5`, `-3`, `3/4`, `1 1/2`, `6.02e23`, `6.02 \times 10^{23}`, `\frac{3}{4}`, `$18.00`, `50%` (as
    50), and numbers with units. `3,5` is no number, as it may be a decimal or two numbers.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return Fraction(str(text)) if abs(text) < float("inf") else None
    text = _after_thoughts(str(text))
    marked = final_answer(text)
    if marked is None:
        found = _numbers(text)
        return found[-1] if found else None
    found = _numbers(marked.rpartition("=")[2] if _BOXED.search(text) else marked)
    is_one = len(found) == 1 or (found and not _BOXED.search(text))
    return found[0] if is_one else None


def _numbers(text: str) -> list[Fraction]:
    """The numbers of a text in their order."""
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    text = text.replace("−", "-").replace("–", "-")
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text)
    text = re.sub(r"(?<![\w)\]])-\s+(?=\d+/\d)", "-", text)  # of "-\frac{1}{2}"
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    parts = match.groupdict()
    power = int(parts["power"] or 0) if len(parts["power"] or "") < 9 else MOST_DIGITS + 1
    exponents = [abs(power), *(int(e[-9:]) for e in re.findall(r"[eE][-+]?(\d+)", match[0]))]
    if len(match[0]) > MOST_DIGITS or max(exponents) > MOST_DIGITS:
        return None
    whole = Fraction(parts["whole"].replace(",", ""))
    try:
        if parts["top"]:
            part = Fraction(int(parts["top"]), int(parts["bottom"]))
            whole += -part if parts["whole"].startswith("-") else part
        elif parts["under"]:
            whole /= Fraction(parts["under"].replace(",", ""))
    except ZeroDivisionError:
        return None
    return whole * Fraction(10) ** power


def _keys(columns: dict[str, Any], count: int) -> list[Any]:
    """The right answer of each row."""
    given = next((columns[name] for name in KEYS if columns.get(name) is not None), None)
    keys = [None] * count if given is None else _each(given, count)
    if any(key is None for key in keys):
        raise ValueError(f"the row has no right answer: none of the columns {', '.join(KEYS)}")
    return keys


def _checked(completions: Sequence[str], check: Callable[..., bool], *arguments: Sequence[Any]) -> list[float]:
    texts = map(_after_thoughts, completions)
    return [float(check(text, *given)) for text, *given in zip(texts, *arguments, strict=True)]


def _each(value: Any, count: int) -> list[Any]:
    """A value for each answer: the entries of a list with one for each, or the same for all."""
    return value if isinstance(value, list) and len(value) == count else [value] * count


def _after_thoughts(text: str) -> str:
    """The answer without its thoughts; empty where they never end."""
    before, end, after = text.rpartition("</think>")
    return after if end else ("" if "<think>" in text else before + after)


def _plain(text: Any) -> str:
    text = str(text)
    found = final_answer(text)
    return " ".join((text if found is None else found).split()).rstrip(".").casefold()


def _unfenced(text: str) -> str:
    """The content of the one fenced block that a text consists of, or the text itself."""
    block = re.fullmatch(r"\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return block[1] if block else text


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
