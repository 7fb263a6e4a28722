"""The experiments as one HTML page that needs nothing else, and as one Markdown page with its plots."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from besteffort.artifacts import files
from besteffort.artifacts.policy_file import TrainedPolicy
from besteffort.fleet import Fleet
from besteffort.paper.experiments import Effort, Experiments
from besteffort.paper.figures import Drawing, draw_all
from besteffort.paper.findings import as_plain
from besteffort.paper.tables import Part, Table, make_parts
from besteffort.rewards import Rewards

VERSION = 1
PLOTS = "paper"  # the folder beside the Markdown page


@dataclass(frozen=True)
class Context:
    """What the page says of its own making."""

    fleet: Fleet
    rewards: Rewards
    effort: Effort
    profile_source: str  # modelled | measured
    policies: Mapping[str, TrainedPolicy]  # by variant
    facts: Mapping[str, Any]

    @property
    def engine(self) -> str:
        return f"simulated on a {self.profile_source} profile"

    @property
    def training(self) -> str:
        """How the policies came about, as their files tell."""
        return "; ".join(f"{name}: {_training(policy.facts)}" for name, policy in self.policies.items())


def _training(facts: Mapping[str, Any]) -> str:
    told = [f"recipe {facts.get('recipe_name', 'unknown')}", f"seed {facts.get('seed', 'unknown')}"]
    if isinstance(facts.get("wall_s"), int | float):
        told.append(f"trained in {facts['wall_s']:.0f} s")
    return ", ".join(told)


def write_pages(
    folder: Path, docs_dir: Path | None, experiments: Experiments, context: Context
) -> list[Path]:
    """`folder/paper.html` and `paper.json`; `docs_dir/paper.md` with `docs_dir/paper/*.png` if one is given.

    Raises:
        UsageError: a folder or the disk does not take them.
    """
    drawings = draw_all(experiments)
    parts = make_parts(experiments, context.fleet, context.rewards)
    provenance = files.provenance(**context.facts)
    common = {"context": context, "parts": parts, "drawings": drawings}
    html = _environment(escape=True).get_template("paper.html.jinja")
    files.write_text(folder / "paper.html", html.render(provenance=provenance, **common))
    files.write_text(folder / "paper.json", _plain(experiments, parts, context, provenance))
    written = [folder / "paper.html", folder / "paper.json"]
    if docs_dir is not None:
        for drawing in drawings.values():
            _write_png(docs_dir / PLOTS / f"{drawing.name}.png", drawing)
        markdown = _environment(escape=False).get_template("paper.md.jinja")
        files.write_text(docs_dir / "paper.md", markdown.render(plots=PLOTS, **common))
        written.append(docs_dir / "paper.md")
    return written


def _write_png(path: Path, drawing: Drawing) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(drawing.png)

    files.write_atomically(path, write)


def _plain(
    experiments: Experiments, parts: list[Part], context: Context, provenance: Mapping[str, Any]
) -> str:
    tables = {table.title: [table.headers, *table.rows] for part in parts for table in part.tables}
    content = {
        "kind": "paper",
        "schema_version": VERSION,
        "engine": context.engine,
        "tables": tables,
        **as_plain(experiments),
        "provenance": provenance,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"


def _environment(*, escape: bool) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("besteffort.paper"), PackageLoader("besteffort.report")]),
        autoescape=escape,  # noqa: S701  # Markdown has no tags to escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown_table"] = markdown_table
    return environment


def markdown_table(table: Table) -> str:
    lines = [table.headers, ["---"] + ["---:"] * (len(table.headers) - 1), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
