"""Shared fixtures: a tiny random model for fast tests, SmolLM2 for true ones."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, on a machine with a GPU too
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and what tests start, inherit the folder
    # The user's own cache is no place for tiny bases. Matplotlib's list of fonts takes seconds to make, so it stays.
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(users / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qalign-tests-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import json

import pytest
import yaml

from qalign.reports import plots

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
SHARED_DATA = ROOT.parent / "shared" / "data"
RENDER = plots.render
RENDERED = ("pictures", "slow", "true_model", "browser")  # tests with these markers see the pictures that users see
PNG = bytes.fromhex(  # of one pixel, in colour as those of Matplotlib
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000b49444154789c63f80f040009fb03fdfb5e"
    "6b2b0000000049454e44ae426082"
)


def unrendered(figure, file: Path) -> None:
    """In place of `plots.render`: a report is drawn at every evaluation, and rendering took half of a tiny run."""
    file.write_bytes(PNG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    plots.render = RENDER if any(item.get_closest_marker(name) for name in RENDERED) else unrendered
    freeze_imports(item)


def freeze_imports(item) -> None:
    """Before each file: what has been imported leaves the garbage collector, which every training run calls and which
    would otherwise look through all modules of all libraries each time (half of the time of a tiny run)."""
    if item.module is not getattr(freeze_imports, "module", None):
        freeze_imports.module = item.module
        gc.collect()
        gc.freeze()


@pytest.fixture
def shared_data() -> Path:
    """Real public data beside the project; the project passes its tests without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent: no real data to test on")
    return SHARED_DATA


def tiny_model(folder: Path) -> str:
    """Writes a random Llama of 2 layers with Zephyr's kind of tokenizer, as a plain model folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # large enough that answers differ in likelihood
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """The folder of `tiny_model`."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source tree, in a folder of its own."""
    source, folder = tmp_path_factory.mktemp("source") / "qalign", tmp_path_factory.mktemp("wheel")
    left_out = (".venv", ".git", "runs", "build", "site", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    words = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "pip", *words], env=environment, check=True)
    (made,) = folder.glob("qalign-*.whl")
    return made


@pytest.fixture
def tiny_base(tiny_folder):
    """A fresh NF4 base of the tiny model in float32, no adapter yet."""
    from qalign.config.recipe import Model
    from qalign.model.base import load

    return load(Model(base=tiny_folder, compute_dtype="float32", max_length=256))


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (objects, or raw text lines) to a file in `tmp_path` and returns its path."""

    def write(name: str, rows: list) -> str:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def recipe_file(tmp_path, tiny_folder):
    """Writes a recipe for the tiny model; keyword arguments go into its dpo section."""

    def write(name: str = "recipe.yaml", output: str = "runs", model: dict | None = None, **keys) -> str:
        stage = {
            "data": str(ROOT / "recipes" / "data" / "house_style_train.jsonl"), "limit": 24, "batch_size": 4,
            "micro_batch_size": 2, "learning_rate": 1e-3,
        }  # fmt: skip
        recipe = {
            "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 512, **(model or {})},
            "lora": {"r": 4, "alpha": 8},
            "output": str(tmp_path / output),
            "dpo": stage | keys,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write
