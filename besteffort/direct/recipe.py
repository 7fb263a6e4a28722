"""What is free in the direct policy search, and the values it has by default."""

from dataclasses import dataclass, replace

from besteffort.training.recipe import BaseRecipe


@dataclass(frozen=True, kw_only=True)
class DirectRecipe(BaseRecipe):
    """Everything that is free in the search."""

    num_passes: int = 3
    """over all knots and the calm fleet's thresholds, each piece searched while the others stay, each pass on
    other workloads"""
    num_fine_tuning_passes: int = 2
    """instead, for a training that starts from a policy"""
    num_generations_alone: int = 40
    """of CMA-ES for one knot at steady rates near it, before all of them are searched together"""
    num_generations: int = 12
    """of CMA-ES for each piece in a pass"""
    first_step: float = 0.5
    """how far the search of a piece looks around in the first pass, in doublings of 1 + batch size"""
    last_step: float = 0.2
    """in the last pass"""
    calm_num_requests: int = 1000
    """of a steady workload below `BUSY_FROM_PER_S`"""
    busy_num_requests: int = 5000
    """of one from there on: a backlog takes long to show"""
    num_short: int = 40
    """workloads at each calm rate that begin with an idle fleet and end soon, as the paper's do (App. B)"""
    short_num_requests: int = 120
    """of each of these"""
    num_unpredictable: int = 12
    """workloads of either kind"""
    unpredictable_num_requests: int = 6000
    """of each of these"""
    evaluation_num_requests: int = 4000
    """of each workload on which a pass's policy is judged"""
    with_calm: bool = True
    """thresholds of its own for a calm fleet"""
    with_highest: bool = True
    """a highest batch size for each model, whatever the rate"""
    with_check: bool = True
    """what a search finds is kept only if it is better on other workloads too"""
    num_times_checked: int = 5
    """as many of those: one search gains less than what so many workloads as it has differ by"""
    with_mean: bool = True
    """the policy is the mean of what the passes from the second on have come to"""
    num_threads: int = 2
    """that simulate; the result does not depend on it"""

    def for_fine_tuning(self) -> "DirectRecipe":
        return replace(self, num_passes=self.num_fine_tuning_passes)


DIRECT_RECIPES = {
    "default": DirectRecipe(),
}
