"""Plain loops of DQN and PPO, in double precision, in which both trainings choose the same actions."""

import torch
from beside_stock import both, compare
from torch import Tensor, nn


class Pole:
    """A pole on a cart, which is pushed to the left or to the right, and ends when the pole leans too far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.push = torch.tensor([-1.0, 1.0], dtype=dtype)

    def reset(self) -> Tensor:
        self.state = 0.1 * (torch.rand(4) - 0.5).to(self.dtype)
        return self.state

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place, speed, angle, turning = self.state
        force = self.push[action]
        turned = turning + 0.5 * angle.sin() - 0.7 * force
        self.state = torch.stack([place + 0.05 * speed, speed + 0.5 * force, angle + 0.05 * turning, turned])
        ended = self.state[2].abs() > 0.2
        return self.state, torch.ones((), dtype=self.dtype), ended


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.scores, self.value = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.scores(hidden), self.value(hidden)


def test_dqn() -> None:
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    compare(network, Pole, *both("DQN"), "mlp", 85, torch.float64)


def test_ppo() -> None:
    compare(ActorCritic(), Pole, *both("PPO"), "mlp", 36, torch.float64)
