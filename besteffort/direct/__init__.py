"""Direct policy search: how `train` learns by default (docs/training.md).

The policy is a Q-network of a few units, each of which says how full a model may be for a task at an arrival
rate; CMA-ES finds their values on whole workloads in the simulator.
"""

from besteffort.direct.curves import ThresholdCurves
from besteffort.direct.network import direct_encoding_for, network_of_curves
from besteffort.direct.recipe import DIRECT_RECIPES, DirectRecipe
from besteffort.direct.start import curves_of_policy
from besteffort.direct.trainer import DirectTrainer, DirectTraining

__all__ = [
    "DIRECT_RECIPES",
    "DirectRecipe",
    "DirectTrainer",
    "DirectTraining",
    "ThresholdCurves",
    "curves_of_policy",
    "direct_encoding_for",
    "network_of_curves",
]
