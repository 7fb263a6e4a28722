"""The transitions that the learner samples from."""

import numpy as np
import torch
from torch import Tensor

from besteffort.environment import Transitions


class ReplayBuffer:
    """The latest transitions, sampled evenly."""

    def __init__(self, size: int, num_inputs: int) -> None:
        self._observations = np.zeros((size, num_inputs), dtype=np.float32)
        self._next_observations = np.zeros((size, num_inputs), dtype=np.float32)
        self._actions = np.zeros(size, dtype=np.int64)
        self._rewards = np.zeros(size, dtype=np.float32)
        self._num_added = 0

    def __len__(self) -> int:
        return min(self._num_added, len(self._actions))

    def add(self, transitions: Transitions) -> None:
        rows = (self._num_added + np.arange(len(transitions))) % len(self._actions)
        self._observations[rows] = transitions.observations
        self._actions[rows] = transitions.actions
        self._rewards[rows] = transitions.rewards
        self._next_observations[rows] = transitions.next_observations
        self._num_added += len(transitions)

    def sample(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observations, actions, rewards and next observations of `size` transitions."""
        rows = rng.integers(len(self), size=size)
        columns = (self._observations, self._actions, self._rewards, self._next_observations)
        observations, actions, rewards, following = (torch.from_numpy(c[rows]) for c in columns)
        return observations, actions, rewards, following
