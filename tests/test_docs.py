"""What the documents promise is there, and what is there is in the documents."""

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from besteffort.artifacts import decisions_file, outcomes_file, profile_file, rewards_file, thresholds_file
from besteffort.cli import app
from besteffort.fleet import Architecture, EngineFlags, Fleet, Model, Task
from besteffort.policies import BUILT_IN
from besteffort.trace import SCHEMA as TRACE_SCHEMA
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
FILES = (ROOT / "docs" / "files.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def _tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--", *patterns]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


def test_the_readme_names_every_command() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in commands:
        assert f"besteffort {name}" in README or f"make {name}" in README, name


def test_the_readme_names_every_built_in_policy() -> None:
    for name in BUILT_IN:
        assert f"`{name}`" in README, name


def test_the_tree_has_every_file_of_the_package_with_one_phrase_and_no_other() -> None:
    tree = README[README.index("<!-- tree -->") : README.index("## Development")]
    told = re.findall(r"^ *((?:\w|/)+\.py) {2,}\S", tree, flags=re.MULTILINE)
    wanted = [name.removeprefix("besteffort/") for name in _tracked("besteffort/*.py")]
    assert sorted(told) == sorted(name for name in wanted if not name.endswith("__init__.py"))


def test_every_word_of_the_makefile_is_told() -> None:
    words = re.findall(r"^([a-z-]+):.*##", MAKEFILE, flags=re.MULTILINE)
    for word in words:
        assert f"`{word}`" in README or f"make {word}" in README, word


def test_ci_calls_words_of_the_makefile_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make lint", "make test"]


@pytest.mark.parametrize("table", [Architecture, EngineFlags, Fleet, Model, Task])
def test_every_key_of_a_fleet_is_told(table: type) -> None:
    skipped = {"models", "tasks", "engine"} if table is Fleet else set()
    keys = set(table.model_fields) - skipped  # type: ignore[attr-defined]
    if table is Architecture:
        keys = {"architecture"}
    for key in keys:
        assert f"`{key}`" in FILES, key


def test_every_column_of_a_file_is_told() -> None:
    modules = (decisions_file, profile_file, rewards_file, thresholds_file, outcomes_file)
    for schema in (TRACE_SCHEMA, *(module.SCHEMA for module in modules)):
        for name in schema.names:
            assert f"`{name}`" in FILES, name


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_root_holds_what_the_design_card_names_and_little_else() -> None:
    top = {Path(name).parts[0] for name in _tracked(".")}
    needed = {"pyproject.toml", "besteffort", "artifacts", "tests", "Makefile", "README.md", "LICENSE", ".ci"}
    assert needed <= top
