"""What profile and rewards say of a request as it is sent: how long it will take, what it is worth."""

from collections.abc import Sequence

import numpy as np

from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.rewards import Rewards

_MAX_BATCH_SIZE = 1024  # larger ones count as this


class Forecast:
    """Numbers in lists, of which one is looked up for each request. Either source may be missing."""

    def __init__(self, fleet: Fleet, latency: Latency | None, rewards: Rewards | None) -> None:
        self.relative_rewards: list[list[float]] | None = None
        """Shape `(T, M)`, as `Rewards.relative`"""
        if rewards is not None:
            self.relative_rewards = rewards.relative.tolist()
        self._alone_ms_per_token: list[list[list[float]]] | None = None
        """Shape `(T, M, batch size)`: of a request that is slowed down by nobody"""
        if latency is None:
            return
        num_output_tokens = np.array([round(sum(task.num_output_tokens) / 2) for task in fleet.tasks])
        prefill_ms = latency.prefill_ms(
            np.array([round(sum(task.num_prompt_tokens) / 2) for task in fleet.tasks])
        )
        prefill_ms_per_token = (prefill_ms / num_output_tokens).T  # (T, M)
        steps_per_token = 1.0 - 1.0 / num_output_tokens  # (T,)
        steps_ms = latency.step_table_ms(_MAX_BATCH_SIZE)  # (M, batch size)
        alone = prefill_ms_per_token[:, :, np.newaxis] + steps_per_token[:, np.newaxis, np.newaxis] * steps_ms
        self._alone_ms_per_token = alone.tolist()
        self._slowdown: list[list[float]] = latency.slowdown.tolist()

    def latency_ms_per_token(
        self, task: int, model: int, batch_size: int, on_device: Sequence[float]
    ) -> float | None:
        """Of a request of the task's mean lengths; None without a profile.

        As `Latency.predicted_ms_per_token`: if all batches stayed as they are. `batch_size` is that of
        the request's replica, itself included, and `on_device` what is in flight there, by model.
        """
        if self._alone_ms_per_token is None:
            return None
        busy = 0
        for other, count in enumerate(on_device):
            if count:
                busy |= 1 << other
        if batch_size > _MAX_BATCH_SIZE:
            batch_size = _MAX_BATCH_SIZE
        return self._slowdown[model][busy] * self._alone_ms_per_token[task][model][batch_size]

    def utility_given_up(self, task: int, model: int) -> float | None:
        """By not taking the fleet's largest model, relative to the task's best; None without rewards."""
        if self.relative_rewards is None:
            return None
        return self.relative_rewards[task][-1] - self.relative_rewards[task][model]
