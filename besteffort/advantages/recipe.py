"""What is free in the recipe `advantages`, and the values it has."""

from dataclasses import dataclass, replace

from besteffort.training.recipe import BaseRecipe


@dataclass(frozen=True, kw_only=True)
class AdvantageRecipe(BaseRecipe):
    """Everything that is free in the training. A life is the longest time in which a request is in time."""

    num_rounds: int
    """of policy iteration"""
    num_fine_tuning_rounds: int = 4
    """instead, for a training that starts from a policy: at most as many"""
    num_workloads: int = 260
    """drawn anew in each round"""
    num_branchings: int = 24
    """in each workload, even in time; there every model is tried"""
    horizon_lives: float = 1.2
    """so long after a branching arrivals count, as far as they are in time"""
    fade_lives: float = 0.3
    """the last part of the horizon, in which they count less and less"""
    open_loop: bool = True
    """what arrives after a branching goes where it went without it; else the policy decides anew"""
    num_rounds_kept: int = 5
    """a network is fitted to the measurements of the latest rounds"""
    steady_share: float = 0.5
    """of the workloads; the others switch at random between random rates"""
    calm_share: float = 0.6
    """of the rates are even on a logarithmic scale, which is mostly calm; the others on a linear one"""
    explored_share: float = 0.3
    """of the workloads have random decisions in them"""
    epsilon: float = 0.1
    """share of random decisions in these"""
    hidden_sizes: tuple[int, int] = (64, 64)
    """of the MLP"""
    num_searches: int = 6
    """after the rounds, for offsets to the best network's values; a checkpoint is written after each"""
    num_generations: int = 12
    """of CMA-ES in each"""
    search_step: float = 0.3
    """how far the first one looks around, in units of the network's values; the others look less far"""
    search_num_requests: int = 3000
    """of each steady workload of the search; an unpredictable one has three times as many"""
    num_steps: int = 1200
    """of gradient descent in each round"""
    batch_size: int = 512
    """branchings in each step"""
    learning_rate: float = 2e-3
    """of Adam; it falls linearly to a tenth in each round"""
    largest_advantage: float = 6.0
    """in units of what is usual in such a state; what is beyond counts like this"""
    evaluation_num_requests: int = 4000
    """of each workload on which a round's network is judged"""
    num_threads: int = 2
    """that simulate; the result does not depend on it"""

    def for_fine_tuning(self) -> "AdvantageRecipe":
        return replace(self, num_rounds=min(self.num_rounds, self.num_fine_tuning_rounds))


ADVANTAGE_RECIPES = {
    "advantages": AdvantageRecipe(num_rounds=7),
    "demo": AdvantageRecipe(
        num_rounds=6,
        num_workloads=120,
        num_steps=800,
        num_rounds_kept=4,
        evaluation_num_requests=1500,
        num_searches=2,
        num_generations=8,
        search_num_requests=800,
        gate_num_seeds=2,
        gate_num_requests=1000,
    ),
}
