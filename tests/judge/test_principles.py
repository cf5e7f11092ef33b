"""Principles: ours are whole, and what is wrong with somebody's own is said with its line."""

import pytest
import yaml

from qalign.errors import UserError
from qalign.judge.principles import FIELDS, read_principles


def test_ours_are_fourteen_with_every_field():
    ours = read_principles()
    assert len(ours) == len({principle.name for principle in ours}) == 14
    assert all(len(getattr(principle, field)) > 3 for principle in ours for field in FIELDS)


GOOD = dict.fromkeys(FIELDS, "a text")


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("principles:\n  - {name: a, critique: b, revise: c}", 2, ["principle 1 ('a')", "no 'choose'"]),
        ("principles:\n  - {name: a, critique: b, revise: c, choose: ''}", 2, ["choose is ''", "expected a text"]),
        ("principles:\n  - {name: a, critique: b, revise: 3, choose: d}", 2, ["revise is 3", "expected a text"]),
        ("principles:\n  - {name: a, critque: b, revise: c, choose: d}", 2, ["'critque'", "did you mean 'critique'"]),
        ("principles:\n  - just words", 2, ["expected the keys"]),
        ("principles: []", 1, ["expected a list"]),
        ("rules: 3", 1, ["'rules'", "principles"]),
        (yaml.safe_dump({"principles": [GOOD, {**GOOD}]}), 6, ["principle 2", "is that of principle 1"]),
        (yaml.safe_dump({"principles": [GOOD] * 101}), 1, ["101 principles", "at most 100"]),
        (f"principles:\n  - {{name: a, critique: {'b' * 1001}, revise: c, choose: d}}", 2, ["1,001 characters"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, file, line, words):
    path = tmp_path / "mine.yaml"
    path.write_text(file)
    with pytest.raises(UserError) as raised:
        read_principles(path)
    assert f"{path.name}:{line}: " in raised.value.lines[0]
    assert all(word in "\n".join(raised.value.lines) for word in words)
