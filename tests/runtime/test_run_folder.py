from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import ConfigError
from lora_core.runtime.run_folder import (
    MetricsFile,
    check_output,
    check_run_folder,
    clear_run_folder,
    remove_leftovers,
    whole_folder,
    write_json,
)


def test_an_earlier_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = check_run_folder(tmp_path / "a/b", overwrite=False)
    assert not folder.exists()
    clear_run_folder(folder)
    (folder / "config.yaml").write_text("x")
    with pytest.raises(ConfigError, match="contains an earlier run; fix: output_dir="):
        check_run_folder(folder, overwrite=False)
    assert check_run_folder(folder, overwrite=True) == folder
    assert (folder / "config.yaml").is_file()
    clear_run_folder(folder)
    assert list(folder.iterdir()) == []


def test_an_emptying_that_is_stopped_at_any_place_leaves_a_folder_that_can_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after(removals: int) -> None:
        left = iter(range(removals))
        for method in ("unlink", "rmdir"):
            remove = getattr(os, method)

            def remove_or_stop(*args: Any, remove: Any = remove, **kwargs: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                remove(*args, **kwargs)

            patch.setattr(os, method, remove_or_stop)

    # So many that the file system will not happen to list config.yaml last.
    names = ["adapter/file", "checkpoints/file", "config.yaml", *(f"{number}.json" for number in range(20))]
    for removals in range(len(names) + 2):  # and two folders
        folder = tmp_path / str(removals)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        with monkeypatch.context() as patch:
            stop_after(removals)
            with pytest.raises(KeyboardInterrupt):
                clear_run_folder(folder)
        assert check_run_folder(folder, overwrite=True) == folder
        clear_run_folder(folder)
        assert list(folder.iterdir()) == []


def test_folders_that_a_run_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="no run of lora_core"):
        check_run_folder(tmp_path, overwrite=True)
    for path in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "run"):
        with pytest.raises(ConfigError, match=r"thesis\.txt is a file; fix: output_dir="):
            check_run_folder(path, overwrite=True)


def test_an_output_replaces_only_what_such_a_command_wrote(tmp_path: Path) -> None:
    for name in ("merged/config.json", "gguf/Modelfile", "thesis/text.txt", "outputs/run/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    check_output(tmp_path / "new" / "deep", overwrite=False)
    for name in ("merged", "gguf"):
        check_output(tmp_path / name, overwrite=True)
        with pytest.raises(ConfigError, match="is not empty; fix: another folder, or --overwrite"):
            check_output(tmp_path / name, overwrite=False)
        with pytest.raises(ConfigError, match="which is read for it; fix: another folder"):
            check_output(tmp_path / name, True, tmp_path / name)
    for name in ("thesis", "outputs", "outputs/run"):
        with pytest.raises(ConfigError, match="no merged model and no export; fix: another folder"):
            check_output(tmp_path / name, overwrite=True)
    for name in ("thesis/text.txt", "thesis/text.txt/merged"):
        with pytest.raises(ConfigError, match=r"text\.txt is a file; fix: another name"):
            check_output(tmp_path / name, overwrite=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"

    def fill(content: str, fail: bool) -> None:
        with whole_folder(target) as folder:
            (folder / "file").write_text(content)
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill("half", fail=True)
    assert list(tmp_path.iterdir()) == []
    fill("first", fail=False)
    fill("second", fail=False)
    with pytest.raises(OSError, match="disk full"):
        fill("third", fail=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "file").read_text() == "second"


def test_numbers_that_json_does_not_have_are_never_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", is_main=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.write("train", loss=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "summary.json", {"loss": float("inf")})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.close()


def test_what_cut_off_writes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    unique = "0123456789abcdef" * 2
    (tmp_path / f".step-000001.{unique}").mkdir()
    (tmp_path / f".step-000001.{unique}/adapter.safetensors").write_text("half")
    (tmp_path / f".config.yaml.{unique}").write_text("half")
    for kept in (".gitignore", f"step-000001.{unique}", ".step-000002"):
        (tmp_path / kept).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", ".step-000002", f"step-000001.{unique}"]
