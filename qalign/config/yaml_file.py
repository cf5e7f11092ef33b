"""YAML in, with limits, and out again. Where each key stands in the file is kept, for errors.

A recipe may come from somebody else, so no file hangs, fills the memory or runs code: size, number of values and depth
are bounded before anything is built, and only text, numbers, booleans, lists and mappings are read. An alias (`*name`)
is written out, so that each place has a copy of its own.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from qalign.config.paths import Keys, Place, as_keys, check_fetched
from qalign.errors import UserError, short

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**18, 10_000, 30
Lines = dict[Place, list[int]]  # the line numbers of every key and list item; several of a key that is set twice

_TAG = "tag:yaml.org,2002:"
_TEXT = {_TAG + name for name in ("str", "merge", "value")} | {"!"}  # `<<` and `=` as values are text
_SCALARS = {f"{_TAG}null": "null", f"{_TAG}bool": "boolean", f"{_TAG}int": "whole number", f"{_TAG}float": "number"}
_TAGS: dict[type[yaml.Node], set[str]] = {
    yaml.ScalarNode: {*_SCALARS, *_TEXT},
    yaml.SequenceNode: {f"{_TAG}seq"},
    yaml.MappingNode: {f"{_TAG}map"},
}


class BadYaml(Exception):
    """A text that can't be read: the line, counted from 1, and the reason."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Reads `5e-6` as a number, as YAML 1.2 does, and a date as text; everything else as YAML 1.1. Stops where there is
    more than a recipe can have."""

    def __init__(self, text: str):
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = cast(yaml.Event, self.peek_event()).start_mark.line + 1  # pyright: ignore[reportUnknownMemberType]
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.depth > MAX_DEPTH:
            raise BadYaml(line, f"nested more than {MAX_DEPTH} deep")
        if self.nodes > MAX_VALUES:
            raise BadYaml(line, f"has more than {MAX_VALUES:,} values, too many for a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text such as '1e5' is quoted."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]: PyYAML has no types
        f"{_TAG}float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse(file: Path) -> tuple[Keys, Lines]:
    """(the keys of a YAML file, where each of them stands). Raises a `UserError` if it can't be read."""
    check_fetched([file])
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{file}: is larger than {MAX_BYTES // 1024} KiB; a recipe is a few kilobytes of YAML")
        raw, lines = read_yaml(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except BadYaml as error:
        raise UserError(f"{file}:{error.line}: not valid YAML: {error}") from None
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f"{file}:1: a recipe is a set of keys (model:, output:, dpo: …), not {type(raw).__name__}")
    return as_keys(raw), lines


def read_yaml(text: str) -> tuple[Any, Lines]:
    """A YAML text as plain values, and where each key stands. Raises `BadYaml`."""
    lines: Lines = {}
    try:
        root = cast(yaml.Node | None, yaml.compose(text, _Loader))  # pyright: ignore[reportUnknownMemberType]: untyped
        return (None if root is None else _Builder(lines).value(root)), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadYaml(line, f"the character U+{ord(text[error.position]):04X} can't stand in it") from None
    except yaml.MarkedYAMLError as error:
        raise BadYaml(error.problem_mark.line + 1 if error.problem_mark else 1, str(error.problem)) from None
    except BadYaml:
        raise
    except Exception as error:  # of PyYAML's own, such as chr() of an escape that is no character
        raise BadYaml(1, f"{error}") from None


def dump_yaml(value: Any) -> str:
    """Values as YAML that `read_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """One value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=9999)
    return text.removesuffix("...\n").strip()


class _Builder:
    """Plain values from YAML nodes, written out: an alias is built anew wherever it stands."""

    def __init__(self, lines: Lines):
        self.lines, self.built, self.scalars = lines, 0, yaml.SafeLoader("")

    def value(self, node: yaml.Node, place: Place = (), above: tuple[yaml.Node, ...] = ()) -> Any:
        """The value of a node, at this place of the recipe and below these nodes."""
        self._count(node, above)
        if node.tag not in _TAGS[type(node)]:
            tag = short(node.tag.replace(_TAG, "!!"))
            raise BadYaml(_line(node), f"the tag {tag} has no meaning in a recipe; remove it")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault((*place, index), []).append(_line(item))
            return [self.value(item, (*place, index), above) for index, item in enumerate(node.value)]
        keys: Keys = {}
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                name = self._key(key)
                self.lines.setdefault((*place, name), []).append(_line(key))
                keys[name] = self.value(value, (*place, name), above)
        for key, value in self._merged(node, above):  # what the mapping sets itself holds, then what is merged first
            if (name := self._key(key)) not in keys:
                self.lines[(*place, name)] = [_line(key)]
                keys[name] = self.value(value, (*place, name), above)
        return keys

    def _merged(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """(key, value) of what `<<: *name` and `<<: [*name, …]` bring into a mapping."""
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self._count(source, above)
                if not isinstance(source, yaml.MappingNode):
                    raise BadYaml(_line(key), "`<<` takes the keys of an alias (<<: *name), and this has no keys")
                yield from ((k, v) for k, v in source.value if k.tag != f"{_TAG}merge")
                yield from self._merged(source, (*above, source))

    def _count(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
        self.built += 1
        if self.built > MAX_VALUES:
            outermost = (*above, node)[:2][-1]  # the key that brings it all in
            raise BadYaml(_line(outermost), f"has more than {MAX_VALUES:,} values with its aliases (*name) written out")
        if node in above:
            raise BadYaml(_line(node), "an alias (*name) refers to itself")

    def _key(self, node: yaml.Node) -> str:
        """A key as it is written: `on` and `5` are words here."""
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _TAGS[yaml.ScalarNode]:
            raise BadYaml(_line(node), "a key is a word, without a tag")
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _TEXT:
            return node.value
        try:
            return cast(Any, self.scalars.construct_object(node))  # pyright: ignore[reportUnknownMemberType]: untyped
        except Exception:  # what `!!int abc`, `0b_` or 5,000 digits raise differs with the type
            raise BadYaml(_line(node), f"{short(node.value)} is no {_SCALARS[node.tag]}") from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
