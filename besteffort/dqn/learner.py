"""Double Q-learning: the networks, the optimizer, and one gradient step."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from besteffort.dqn.recipe import Recipe
from besteffort.training.torch_network import export_network, import_network, load_module


def double_q_targets(
    online: nn.Module, target: nn.Module, rewards: Tensor, next_observations: Tensor, discount: float
) -> Tensor:
    """`r + discount * Q_target(s', argmax_a Q_online(s', a))`, shape `(B,)` (Van Hasselt et al., 2016).

    There is no terminal state: workloads only truncate.
    """
    with torch.no_grad():
        actions = online(next_observations).argmax(dim=1, keepdim=True)
        values: Tensor = target(next_observations).gather(1, actions)
    return rewards + discount * values.squeeze(1)


class Learner:
    """The networks and the optimizer."""

    def __init__(self, network: nn.Sequential, recipe: Recipe) -> None:
        self.recipe = recipe
        self.online = network
        self.target = import_network(export_network(network))
        self.optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)

    def learn(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], iteration: int) -> None:
        """One gradient step, and the target network's update when it is due."""
        observations, actions, rewards, following = batch
        share = iteration / self.recipe.num_iterations
        decay = 1 - share * (1 - self.recipe.final_learning_rate_share)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * decay
        centred = rewards - self.recipe.reward_baseline
        wanted = double_q_targets(self.online, self.target, centred, following, self.recipe.discount)
        predicted = self.online(observations).gather(1, actions[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(predicted, wanted)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if (iteration + 1) % self.recipe.target_update_every == 0:
            self.target.load_state_dict(self.online.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, by name."""
        named = {f"online.{name}": value for name, value in self.online.state_dict().items()}
        named |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            named |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        load_module(self.online, "online", tensors)
        load_module(self.target, "target", tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
