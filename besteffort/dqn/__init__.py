"""DQN with Double Q-learning (paper, Sec. 3.2 and App. A), and what `docs/dqn.md` lists beside it."""

from besteffort.dqn.learner import Learner, double_q_targets
from besteffort.dqn.recipe import RECIPES, Recipe
from besteffort.dqn.replay_buffer import ReplayBuffer
from besteffort.dqn.trainer import Trainer, evaluation_workloads

__all__ = [
    "RECIPES",
    "Learner",
    "Recipe",
    "ReplayBuffer",
    "Trainer",
    "double_q_targets",
    "evaluation_workloads",
]
