"""What is free in the paper's training (Sec. 3.2 and App. A), and the values it has."""

from dataclasses import dataclass, replace

from besteffort.training.recipe import BaseRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """Everything that is free in the training."""

    num_iterations: int
    """gradient steps; the fleets take a step before each"""
    num_fine_tuning_iterations: int | None = None
    """instead, for a training that starts from a policy; None: just as many"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """of the MLP (Sec. 3.2)"""
    discount: float = 0.99
    """per decision (App. A)"""
    learning_rate: float = 1e-4
    """of Adam (App. A)"""
    final_learning_rate_share: float = 1.0
    """the learning rate falls linearly to this share of itself; 1: it is constant"""
    batch_size: int = 1024
    """transitions per gradient step (App. A)"""
    target_update_every: int = 500
    """iterations between copies of the online network to the target network (App. A)"""
    replay_buffer_size: int = 1_000_000
    """transitions; the oldest are overwritten"""
    num_first_transitions: int = 20_000
    """decisions in the replay_buffer before the first gradient step, at the first epsilon"""
    first_epsilon: float = 1.0
    """share of random decisions at the first iteration"""
    last_epsilon: float = 0.05
    """and from the end of its linear decay"""
    epsilon_decay_share: float = 0.1
    """of the iterations, over which epsilon decays"""
    reward_baseline: float = 0.0
    """taken off every reward: it moves all Q-values alike, and brings those of low loads to about 0"""
    num_fleets: int = 16
    """simulated side by side; each makes one decision per iteration"""
    num_requests: int = 1000
    """per workload, before it truncates"""
    mean_requests_per_rate: float = 100.0
    """before the arrival rate is drawn anew"""
    evaluate_every: int = 5000
    """iterations between evaluations"""
    num_threads: int = 1
    """of torch"""

    def for_fine_tuning(self) -> "Recipe":
        if self.num_fine_tuning_iterations is None:
            return self
        return replace(self, num_iterations=self.num_fine_tuning_iterations)

    def epsilon_at(self, iteration: int) -> float:
        """Share of random decisions: it falls linearly, then stays."""
        decayed = iteration / max(1.0, self.epsilon_decay_share * self.num_iterations)
        return self.first_epsilon + min(1.0, decayed) * (self.last_epsilon - self.first_epsilon)


RECIPES = {
    "paper": Recipe(num_iterations=1_200_000, num_fine_tuning_iterations=685_000),
    "dqn": Recipe(
        num_iterations=5000,
        discount=0.97,
        learning_rate=1e-3,
        final_learning_rate_share=0.05,
        batch_size=256,
        target_update_every=50,
        replay_buffer_size=200_000,
        epsilon_decay_share=0.3,
        reward_baseline=1.0,
        num_fleets=64,
        evaluate_every=500,
    ),
}
