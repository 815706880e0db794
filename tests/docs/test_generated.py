"""Files that are written from the code are up to date; what README.md and SECURITY.md refer to is there."""

from __future__ import annotations

import re
import runpy

from tests.conftest import ROOT


def test_generated_files_are_up_to_date() -> None:
    write = runpy.run_path(str(ROOT / "docs/write.py"))
    for name, text in write["files"](write["written_table"]()).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}; fix: python docs/write.py"


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)} - {""}
    assert {target for target in targets if not (ROOT / target).exists()} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_tests_that_security_promises_are_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    assert {name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in source} == set()
