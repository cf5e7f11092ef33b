"""Copies a shipped recipe into the working folder, to change it there.

python -m qalign.init [NAME] [--full]     # without NAME: lists the recipes
"""

import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from pydantic.fields import FieldInfo

from qalign.cli import Parser, program, run_parsed
from qalign.config.atomic import check_writable, write_whole
from qalign.config.known_keys import sections_in
from qalign.config.paths import Keys, as_keys, named_paths
from qalign.config.recipe import Recipe
from qalign.config.yaml_file import flow, parse
from qalign.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parent
RECIPES = next(folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir())


def list_recipes() -> None:
    """Prints every shipped recipe with the first line of its description."""
    for file in sorted(RECIPES.glob("*.yaml")):
        print(f"{file.stem:<14} {file.read_text(encoding='utf-8').splitlines()[1].removeprefix('# ')}")


def write_recipe(name: str, *, full: bool = False) -> None:
    """Writes a shipped recipe and the local files that it names into the working folder; `full`: with every key. A
    `UserError` if there is no such recipe, or the file is already here."""
    source, target = RECIPES / f"{name}.yaml", Path(f"{name}.yaml")
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name not in names:
        raise UserError(f"there is no recipe '{name}'{did_you_mean(name, names)}; known: {', '.join(names)}")
    if target.exists():
        raise UserError(f"{target}: is already here; remove it, or run this in another folder")
    check_writable(target)
    text = with_every_key(source) if full else source.read_text(encoding="utf-8")
    named = [path for _, _, path in named_paths(parse(source)[0])]
    named += [file.name for file in RECIPES.glob("*.py") if file.name in text]
    for path in dict.fromkeys(["recipe.schema.json", *named]):  # the schema is for editors
        if (RECIPES / path).is_file() and not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), (RECIPES / path).read_bytes())
            print(f"wrote {path}")
    text = text.replace(f"recipes/{target}", str(target)).replace("docs/recipe.md", f"qalign init {name} --full")
    write_whole(target, text)
    print(f"wrote {target}; change it, then train: {program()} {target}")


def with_every_key(file: Path) -> str:
    """A recipe file's text with every key and its docstring as a comment; the values that the file sets stay. A stage
    that the file doesn't have is a comment as a whole."""
    raw, text = parse(file)[0], file.read_text(encoding="utf-8")
    lines = [*takewhile(lambda line: line.startswith("#"), text.splitlines())]
    for key, field in Recipe.model_fields.items():
        section = next(sections_in(field.annotation), None)
        if section is None:
            lines += ["", *_commented(key, field, raw)]
            continue
        off = "# " if field.default is None and key not in raw else ""
        lines += ["", *_comment(section.__doc__), f"{off}{key}:"]
        for inner, inner_field in section.model_fields.items():
            lines += [f"{off}  {line}" for line in _commented(inner, inner_field, as_keys(raw.get(key)))]
    return "\n".join(lines) + "\n"


def _commented(key: str, field: FieldInfo, values: Keys) -> list[str]:
    default = "..." if field.is_required() else field.default
    return [*_comment(field.description), f"{key}: {flow(values.get(key, default))}"]


def _comment(docstring: str | None) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join((docstring or "").split()), 110, break_on_hyphens=False)]


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("init"), description="Copy a recipe into this folder.")
    parser.add_argument("name", nargs="?", help="such as mistral7b; without it, the recipes are listed")
    parser.add_argument("--full", action="store_true", help="write every key with its default and its meaning")
    run_parsed(parser, lambda args: write_recipe(args.name, full=args.full) if args.name else list_recipes(), words)


if __name__ == "__main__":
    main()
