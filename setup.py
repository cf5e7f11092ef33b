"""Puts the recipes into the wheel, as `qalign/recipes`, and the README into its metadata; see pyproject.toml too."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REPOSITORY = "https://github.com/qalign/qalign"


class BuildWithRecipes(build_py):
    """`qalign init` reads the recipes from there. A checkout has them beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "qalign" / "recipes"
            shutil.copytree("recipes", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def readme() -> str:
    """The README with links and pictures that also work on a package index: they open the tag of this version."""
    found = re.search(r'^__version__ = "(.*)"', Path("qalign/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    tag = f"v{found[1]}"
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\])\((?!https?:)", rf"\1({REPOSITORY}/raw/{tag}/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\])\((?!https?:|#)", rf"\1({REPOSITORY}/blob/{tag}/", text)


setup(cmdclass={"build_py": BuildWithRecipes}, long_description=readme(), long_description_content_type="text/markdown")
