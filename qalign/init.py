"""Copies a shipped recipe into the working folder, to change it there.

python -m qalign.init [NAME] [--full]     # without NAME: lists the recipes
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qalign.cli import exit_code
from qalign.config.atomic import write_whole
from qalign.config.docs import with_every_key
from qalign.config.load import parse
from qalign.config.paths import named_paths
from qalign.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parent
RECIPES = next(folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir())


def list_recipes() -> None:
    """Prints every shipped recipe with the first line of its description."""
    for file in sorted(RECIPES.glob("*.yaml")):
        print(f"{file.stem:<14} {file.read_text(encoding='utf-8').splitlines()[1].removeprefix('# ')}")


def write_recipe(name: str, *, full: bool = False) -> None:
    """Writes a shipped recipe and the local files that it names into the working folder; `full`: with every key.

    Raises:
        UserError: there is no such recipe, or the file is already here.
    """
    source, target = RECIPES / f"{name}.yaml", Path(f"{name}.yaml")
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name not in names:
        raise UserError(f"there is no recipe '{name}'{did_you_mean(name, names)}; known: {', '.join(names)}")
    if target.exists():
        raise UserError(f"{target}: is already here; remove it, or run this in another folder")
    text = with_every_key(source) if full else source.read_text(encoding="utf-8")
    named = [path for _, _, path in named_paths(parse(source)[0])]
    named += ["rewards.py"] if "rewards.py" in text else []
    for path in dict.fromkeys(["recipe.schema.json", *named]):  # the schema is for editors
        if (RECIPES / path).is_file() and not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), (RECIPES / path).read_bytes())
            print(f"wrote {path}")
    write_whole(target, text.replace(f"recipes/{target}", str(target)))
    print(f"wrote {target}; change it, then train: python -m qalign {target}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qalign.init", description="Copy a recipe into this folder.")
    parser.add_argument("name", nargs="?", help="such as mistral7b; without it, the recipes are listed")
    parser.add_argument("--full", action="store_true", help="write every key with its default and its meaning")
    args = parser.parse_args(words)
    sys.exit(exit_code(lambda: write_recipe(args.name, full=args.full) if args.name else list_recipes()))


if __name__ == "__main__":
    main()
