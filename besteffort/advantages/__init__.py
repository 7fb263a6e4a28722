"""Policy iteration on measured advantages: the recipe `advantages` (docs/training.md).

The simulator is so fast that the worth of a decision need not be estimated by bootstrapping: at states
that the policy comes to, each model is tried under the same future arrivals, for longer than a request
lives. A Q-network is fitted to the differences, and routes in the next round.
"""

from besteffort.advantages.recipe import ADVANTAGE_RECIPES, AdvantageRecipe
from besteffort.advantages.sampling import Measured, Sampler, fleet_encoding_for
from besteffort.advantages.trainer import AdvantageTrainer, AdvantageTraining

__all__ = [
    "ADVANTAGE_RECIPES",
    "AdvantageRecipe",
    "AdvantageTrainer",
    "AdvantageTraining",
    "Measured",
    "Sampler",
    "fleet_encoding_for",
]
