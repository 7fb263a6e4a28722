"""All on which the result of a training depends, and by which it is known again."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from besteffort import __version__
from besteffort.advantages import ADVANTAGE_RECIPES, AdvantageRecipe
from besteffort.artifacts.files import sha256
from besteffort.direct import DIRECT_RECIPES, DirectRecipe
from besteffort.dqn import RECIPES, Recipe
from besteffort.errors import UsageError
from besteffort.training.workloads import TASK_MIXES

AnyRecipe = DirectRecipe | AdvantageRecipe | Recipe


@dataclass(frozen=True)
class Setup:
    """What `train` was asked for."""

    fleet_dir: Path
    recipe: str = "default"
    seed: int = 0
    init: Path | None = None
    profile: Path | None = None
    rewards: Path | None = None
    deadline_margin: float = 0.0
    task_mix: str = "fleet"  # one of `TASK_MIXES`
    traces: Sequence[Path] = ()

    @property
    def profile_path(self) -> Path:
        return self.profile or self.fleet_dir / "profile.parquet"

    @property
    def rewards_path(self) -> Path:
        return self.rewards or self.fleet_dir / "rewards.parquet"

    @property
    def thresholds_path(self) -> Path:
        """Where `tune` puts them, if it was run on this profile."""
        return self.profile_path.with_name("thresholds.parquet")

    @property
    def chosen(self) -> AnyRecipe:
        """The recipe, made shorter if there is a policy to start from.

        Raises:
            UsageError: there is none of this name.
        """
        recipes: dict[str, AnyRecipe] = {**DIRECT_RECIPES, **ADVANTAGE_RECIPES, **RECIPES}
        if self.recipe not in recipes:
            raise UsageError(f"{self.recipe!r} is no recipe: choose one of {', '.join(recipes)}")
        recipe = recipes[self.recipe]
        return recipe.for_fine_tuning() if self.init else recipe

    def identity(self, *, tuned: bool = False) -> dict[str, Any]:
        """What a checkpoint and a policy say of it; where all of this is the same, so is the result.

        `tuned`: it goes by tuned thresholds as well.
        """
        files = {
            "fleet": self.fleet_dir / "fleet.toml",
            "profile": self.profile_path,
            "rewards": self.rewards_path,
        }
        if self.init:
            files["init"] = self.init
        if tuned:
            files["thresholds"] = self.thresholds_path
        hashes = {what: sha256(path) for what, path in files.items()}
        return {
            "besteffort": __version__,
            "recipe_name": self.recipe,
            "recipe": asdict(self.chosen),
            "seed": self.seed,
            "deadline_margin": self.deadline_margin,
            "task_mix": self.task_mix,
            "sha256": hashes | {f"trace {path.stem}": sha256(path) for path in self.traces},
        }

    def check(self) -> None:
        """What can be told before any file is read.

        Raises:
            UsageError: an option is out of range.
        """
        _ = self.chosen
        if not 0.0 <= self.deadline_margin < 1.0:
            raise UsageError(
                f"--deadline-margin {self.deadline_margin}: give a share of the deadline, from 0 to below 1"
            )
        if self.task_mix not in TASK_MIXES:
            raise UsageError(f"--task-mix {self.task_mix}: choose one of {', '.join(TASK_MIXES)}")
        stems = [path.stem for path in self.traces]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice:
            raise UsageError(f"--trace: two traces are called {twice[0]!r}: leave one out, or rename it")
