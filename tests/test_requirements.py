"""What qalign needs: declared, pinned, locked with hashes, and no version with a known hole."""

import ast
import re
import sys
import tomllib
from itertools import chain

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

IMPORT_NAMES = {
    "lm_eval": "lm-eval",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "huggingface_hub": "huggingface-hub",
}
FIXED_IN = {  # the first version without the hole: CVE-2024-56326 and CVE-2025-27516; CVE-2024-34062
    "jinja2": "3.1.6",
    "tqdm": "4.66.3",
}


def needed() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return {canonicalize_name(found.name): found for found in map(Requirement, listed)}


def test_no_version_with_a_known_hole_is_accepted():
    for name, version in FIXED_IN.items():
        (lowest,) = (bound.version for bound in needed()[name].specifier if bound.operator == ">=")
        assert Version(lowest) >= Version(version)


def test_what_is_imported_is_declared():
    imported = set()
    for file in (ROOT / "qalign").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
                imported |= {a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    names = {canonicalize_name(IMPORT_NAMES.get(name, name)) for name in imported - set(sys.stdlib_module_names)}

    assert names <= {*needed(), "qalign", "vllm"}  # vLLM is an option that the recipe's documentation names


def test_every_pinned_version_is_locked_with_hashes():
    files = {name: (ROOT / f"requirements{name}").read_text() for name in (".lock", "-cuda.lock", ".txt", "-gpu.txt")}
    locks = files[".lock"] + files["-cuda.lock"]
    locked = re.findall(r"^([\w.-]+)==(\S+).*\n((?: +--hash=\S+.*\n)+)", locks, re.M)
    versions = {canonicalize_name(name): version for name, version, _ in locked}
    for line in (files[".txt"] + files["-gpu.txt"]).splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.partition(" ;")[0].split("==")
            assert versions[canonicalize_name(name)] == version
            assert needed().get(canonicalize_name(name), Requirement(name)).specifier.contains(version)
