"""Playing several copies of a gymnasium task, and advantages of what was done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Policy = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From observations to actions and the logarithms of their probabilities."""


@dataclass(frozen=True)
class Task:
    """A gymnasium task; rewards are multiplied by ``reward`` before they are learned from."""

    name: str
    discrete: bool
    discount: float
    reward: float
    steps: int
    learns: float  # the mean return from which on we say that a run has learned


TASKS = {
    "cartpole": Task("CartPole-v1", True, 0.99, 1.0, 20_480, 100.0),
    "pendulum": Task("Pendulum-v1", False, 0.9, 0.1, 20_480, -1000.0),
}


class Rollout(NamedTuple):
    """Steps ``t`` of copies ``n``; ``values`` has one more, of the last observations."""

    observations: Tensor  # (t + 1, n, features)
    actions: Tensor  # (t, n, ...)
    log_probabilities: Tensor  # (t, n)
    rewards: Tensor  # (t, n)
    terminated: Tensor  # (t, n)
    done: Tensor  # (t, n): terminated, or cut off
    real: Tensor  # (t, n): False for steps that only start the next episode


class Runner:
    """Copies of a task that go on from rollout to rollout; ``returns`` of finished episodes."""

    def __init__(self, task: Task, copies: int, seed: int) -> None:
        import gymnasium

        how: dict[str, Any] = {"vectorization_mode": "vector_entry_point"} if task.discrete else {}
        self.task, self.copies = task, copies
        self.environment = gymnasium.make_vec(task.name, num_envs=copies, **how)
        observation, _ = self.environment.reset(seed=seed)
        self.observation = torch.as_tensor(observation, dtype=torch.float32)
        self.fresh = torch.zeros(copies, dtype=torch.bool)  # the next step starts an episode
        self.running = torch.zeros(copies)
        self.returns: list[float] = []

    @property
    def sizes(self) -> tuple[int, int]:
        """How many features an observation has, and how many actions or dimensions there are."""
        space = self.environment.single_action_space
        actions = int(space.n) if self.task.discrete else space.shape[0]
        return self.observation.shape[1], actions

    @torch.no_grad()
    def rollout(self, policy: Policy, steps: int) -> Rollout:
        """Play some steps."""
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            before, real = self.observation, ~self.fresh
            action, log_probability = policy(before)
            after, reward, terminated, truncated, _ = self.environment.step(self._sent(action))
            self.observation = torch.as_tensor(after, dtype=torch.float32)
            rewards = torch.as_tensor(reward, dtype=torch.float32)
            ends = torch.as_tensor(terminated) & real
            done = (ends | torch.as_tensor(truncated)) & real
            self._count(rewards, done, real)
            rewards = self.task.reward * rewards
            kept.append((before, action, log_probability, rewards, ends, done, real))
            self.fresh = done
        columns = [torch.stack(each) for each in zip(*kept, strict=True)]
        observations = torch.cat([columns[0], self.observation[None]])
        return Rollout(observations, *columns[1:])

    def _sent(self, action: Tensor) -> Any:
        if self.task.discrete:
            return action.numpy()
        space = self.environment.single_action_space
        return action.numpy().clip(space.low, space.high)

    def _count(self, rewards: Tensor, done: Tensor, real: Tensor) -> None:
        self.running += rewards * real
        self.returns += self.running[done].tolist()
        self.running[done] = 0


def advantages(
    rollout: Rollout, values: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """``A_t = Σ_k (γ λ)ᵏ δ_{t+k}`` within an episode, and targets ``A_t + V_t`` of the critic.

    ``δ_t = r_t + γ V_{t+1} - V_t``, with ``V_{t+1} = 0`` where the episode has terminated, but not
    where it was cut off. Source: Schulman et al. 2016.
    """
    alive, goes_on = ~rollout.terminated, ~rollout.done
    delta = rollout.rewards + discount * values[1:] * alive - values[:-1]
    found, later = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        later = delta[t] + discount * trace * later * goes_on[t]
        found[t] = later
    return found, found + values[:-1]
