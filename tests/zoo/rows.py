"""Networks of rows of features, on torch.nn alone, in our own words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vae(nn.Module):
    """PyTorch's variational autoencoder: two heads, and noise between the halves in training."""

    def __init__(self, features: int = 784, hidden: int = 400, code: int = 20) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc21, self.fc22 = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.fc3, self.fc4 = nn.Linear(code, hidden), nn.Linear(hidden, features)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def reparameterize(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        if not self.training:
            return mean
        deviation = torch.exp(0.5 * log_variance)
        return mean + torch.randn_like(deviation) * deviation

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x.view(x.size(0), -1))
        return self.decode(self.reparameterize(mean, log_variance)), mean, log_variance


class DenoisingAutoencoder(nn.Module):
    """Rows with noise in training, through a narrow middle and back."""

    def __init__(self, features: int = 128, hidden: int = 64, code: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(), nn.Linear(hidden, code), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.LeakyReLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.decoder(self.encoder(x))


class MlpWithBatchNorm(nn.Sequential):
    """A tabular classifier, a Sequential of its own class."""

    def __init__(self, features: int = 30, hidden: int = 64, classes: int = 2) -> None:
        super().__init__(
            *(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1)),
            nn.Linear(hidden, classes),
        )


class Policy(nn.Module):
    """Of policy gradients (Schulman et al. 2017): one body, and two heads for actions and the value."""

    def __init__(self, seen: int = 8, actions: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(seen, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, actions), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return torch.log_softmax(self.actor(x), -1), self.critic(x).squeeze(-1)
