"""A2C and PPO, each network with a loss and an optimizer of its own.

An actor's distribution is a softmax for discrete actions, or a Gaussian whose mean and variance are
two networks; a critic has the squared error. A step of A2C takes a whole rollout once, PPO goes
through it several times in mini-batches. Networks and losses follow Elsayed et al. 2024.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.rl.rollouts import Rollout, Runner, Task, advantages
from tnconv.losses.policies import A2CLoss, Actions, PPOLoss

Algorithm = Literal["a2c", "ppo"]
MakeOptimizer = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
"""From a network and its loss."""


@dataclass(frozen=True)
class Settings:
    """Steps of a rollout, how it is gone through, and λ of the advantages."""

    steps: int
    epochs: int
    minibatches: int
    trace: float = 0.95


SETTINGS = {"a2c": Settings(16, 1, 1), "ppo": Settings(128, 4, 4)}


class Variance(nn.Module):
    """A positive output."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x) + 1e-2


def network(inputs: int, outputs: int, scale: float, *last: nn.Module) -> nn.Sequential:
    """Two hidden layers of 64, with a small last layer for policies that start out even."""
    head = nn.Linear(64, outputs)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.zero_()
    layers = nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
    return nn.Sequential(*layers, head, *last)


class Part:
    """A network that learns by a loss."""

    def __init__(self, network: nn.Module, loss_fn: nn.Module, make: MakeOptimizer) -> None:
        self.network, self.loss_fn = network, loss_fn
        self.optimizer = make(network, loss_fn)

    def learn(self, observations: Tensor, targets: object) -> None:
        self.optimizer.zero_grad()
        self.loss_fn(self.network(observations), targets).backward()
        self.optimizer.step()


class Agent:
    """Actor and critic of a task; ``act`` plays, ``update`` learns from a rollout."""

    def __init__(
        self, algorithm: Algorithm, task: Task, sizes: tuple[int, int], make: MakeOptimizer
    ) -> None:
        self.algorithm, self.task, self.settings = algorithm, task, SETTINGS[algorithm]
        inputs, outputs = sizes
        loss_of = A2CLoss if algorithm == "a2c" else PPOLoss
        kinds = ("softmax",) if task.discrete else ("gaussian mean", "gaussian variance")
        self.actor = {
            kind: Part(
                network(inputs, outputs, 0.01, *[Variance()] * (kind == "gaussian variance")),
                loss_of(kind),  # type: ignore[arg-type]
                make,
            )
            for kind in kinds
        }
        self.critic = Part(network(inputs, 1, 1.0), nn.MSELoss(), make)

    def act(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions."""
        outputs = [part.network(observations) for part in self.actor.values()]
        distribution: torch.distributions.Distribution
        if self.task.discrete:
            distribution = torch.distributions.Categorical(logits=outputs[0])
            action = distribution.sample()
            return action, distribution.log_prob(action)
        distribution = torch.distributions.Normal(outputs[0], outputs[1].sqrt())
        action = distribution.sample()
        return action, distribution.log_prob(action).sum(-1)

    def update(self, rollout: Rollout) -> None:
        """Learn from the steps that belong to an episode."""
        with torch.no_grad():
            values = self.critic.network(rollout.observations).squeeze(-1)
        found, targets = advantages(rollout, values, self.task.discount, self.settings.trace)
        real = rollout.real
        observations, actions = rollout.observations[:-1][real], rollout.actions[real]
        old, advantage, targets = rollout.log_probabilities[real], found[real], targets[real]
        for at in self._parts_of(len(observations)):
            a = advantage[at]
            given = Actions(actions[at], (a - a.mean()) / (a.std() + 1e-8), old[at])
            self._learn(observations[at], given)
            self.critic.learn(observations[at], targets[at, None])

    def _learn(self, observations: Tensor, given: Actions) -> None:
        """One step of every network of the actor, from where all of them were."""
        with torch.no_grad():
            outputs = {kind: p.network(observations) for kind, p in self.actor.items()}
        for kind, part in self.actor.items():
            others = [output for name, output in outputs.items() if name != kind]
            part.learn(observations, given._replace(other=others[0] if others else None))

    def _parts_of(self, samples: int) -> Iterator[Tensor]:
        for _ in range(self.settings.epochs):
            yield from torch.randperm(samples).chunk(self.settings.minibatches)


def train(
    algorithm: Algorithm, task: Task, make: MakeOptimizer, seed: int, copies: int = 8
) -> list[float]:
    """The returns of all episodes, in order."""
    torch.manual_seed(seed)
    runner = Runner(task, copies, seed)
    agent = Agent(algorithm, task, runner.sizes, make)
    steps = agent.settings.steps
    for _ in range(task.steps // (copies * steps)):
        rollout = runner.rollout(agent.act, steps)
        agent.update(rollout)
        if not all(p.isfinite().all() for p in agent.critic.network.parameters()):
            break
    return runner.returns
