"""A file that git left as a pointer of Git LFS is named, with the command that fetches it, wherever one is read."""

import pytest

from qalign.config.load import load
from qalign.config.recipe import Model
from qalign.config.stages import Source
from qalign.data.formats import preferences
from qalign.errors import UserError
from qalign.model.adapters.files import read_files
from qalign.model.origin import check

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 9\n"


def rows(path):
    preferences((Source(path=str(path)),), "train", None, 0)


READERS = {
    "rows.jsonl": lambda folder: rows(folder / "rows.jsonl"),
    "rows.json.gz": lambda folder: rows(folder / "rows.json.gz"),
    "rows.csv": lambda folder: rows(folder / "rows.csv"),
    "rows.parquet": lambda folder: rows(folder / "rows.parquet"),
    "data/train.parquet": rows,
    "recipe.yaml": lambda folder: load(str(folder / "recipe.yaml")),
    "model.safetensors": lambda folder: check(Model(base=str(folder))),
    "tokenizer.json": lambda folder: check(Model(base=str(folder))),
    "model.gguf": lambda folder: check(Model(base=str(folder / "model.gguf"))),
    "adapter_model.safetensors": lambda folder: read_files(str(folder)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (tmp_path / name).write_text(POINTER)

    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path)
    (line,) = caught.value.lines
    assert f"{tmp_path / name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`" in line
