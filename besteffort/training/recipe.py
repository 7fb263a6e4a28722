"""What every recipe says, whatever the algorithm."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class BaseRecipe(ABC):
    """Everything that is free in a training, and how long the policy is compared in the end."""

    gate_num_seeds: int = 3
    """of each workload on which the policy is held against others in the end"""
    gate_num_requests: int = 10_000
    """of an unpredictable one of these"""

    @abstractmethod
    def for_fine_tuning(self) -> Self:
        """The same for a training that starts from a policy instead of a fresh network."""
