"""Folders that appear whole or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from qalign.config.atomic import new_folder


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750)])
def test_the_files_of_a_new_folder_have_the_users_permissions(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as aside:
            (aside / "config.json").write_text("{}")
            save_file({"a": torch.zeros(1)}, aside / "model.safetensors")  # safetensors makes it its owner's alone
            assert not (tmp_path / "model").exists()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == mode
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == mode & 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "model") as aside:
            (aside / "config.json").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not list(tmp_path.iterdir())
