"""The agents that `benchmarks.rl` trains: advantages by their definition, and that they learn."""

import pytest
import torch
from torch import nn

from benchmarks.rl.agents import Agent, Variance
from benchmarks.rl.rollouts import TASKS, Rollout, Runner, advantages
from tnconv.optim import StepSizeScaler


def made_up(steps: int = 12, copies: int = 3) -> Rollout:
    terminated, cut = torch.rand(steps, copies) < 0.15, torch.rand(steps, copies) < 0.15
    done = terminated | cut
    real = torch.cat([torch.ones(1, copies, dtype=torch.bool), ~done[:-1]])
    return Rollout(
        torch.randn(steps + 1, copies, 4),
        torch.randint(2, (steps, copies)),
        torch.full((steps, copies), 0.5).log(),
        torch.randn(steps, copies),
        terminated,
        done,
        real,
    )


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_advantages(trace: float) -> None:
    """Sums over the rest of an episode, whose last value counts where it was cut off."""
    torch.manual_seed(0)
    rollout, values = made_up(), torch.randn(13, 3)
    found, targets = advantages(rollout, values, 0.9, trace)
    for n in range(3):
        for t in range(12):
            expected, factor = torch.zeros(()), 1.0
            for later in range(t, 12):
                after = 0.0 if rollout.terminated[later, n] else 0.9 * values[later + 1, n]
                delta = rollout.rewards[later, n] + after - values[later, n]
                expected = expected + factor * delta
                factor *= 0.9 * trace
                if rollout.done[later, n]:
                    break
            torch.testing.assert_close(found[t, n], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets, found + values[:-1])


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
@pytest.mark.parametrize("scaled", [False, True])
def test_updates_prefer_what_was_better(algorithm, scaled: bool) -> None:
    """Action 1 is rewarded: it becomes more probable, and the critic expects more."""
    torch.manual_seed(0)

    def make(network: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
        inner = torch.optim.Adam(network.parameters(), 1e-2)
        return StepSizeScaler(inner, network, loss_fn, 1e-4) if scaled else inner

    agent = Agent(algorithm, TASKS["cartpole"], (4, 2), make)
    states = torch.randn(64, 4)
    before = agent.actor["softmax"].network(states).softmax(1)[:, 1].mean()
    for _ in range(20):
        rollout = made_up(40)
        actions, log_probabilities = agent.act(rollout.observations[:-1])
        new = {"actions": actions, "log_probabilities": log_probabilities.detach()}
        agent.update(rollout._replace(**new, rewards=actions.float()))
    after = agent.actor["softmax"].network(states).softmax(1)[:, 1].mean()
    assert after > before + 0.1
    assert agent.critic.network(states).mean() > 0.3


def test_gaussian_actors_have_two_networks() -> None:
    def make(network: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
        return StepSizeScaler(torch.optim.SGD(network.parameters(), 0.1), network, loss_fn, 1e-4)

    torch.manual_seed(0)
    agent = Agent("ppo", TASKS["pendulum"], (4, 1), make)
    rollout = made_up(40)
    with torch.no_grad():
        action, log_probability = agent.act(rollout.observations[:-1])
    assert action.shape == (40, 3, 1) and log_probability.shape == (40, 3)
    before = [
        p.detach().clone() for part in agent.actor.values() for p in part.network.parameters()
    ]
    agent.update(rollout._replace(actions=action, log_probabilities=log_probability))
    after = [p for part in agent.actor.values() for p in part.network.parameters()]
    assert all((one != other).any() for one, other in zip(before, after, strict=True))
    assert isinstance(agent.actor["gaussian variance"].network[-1], Variance)


@pytest.mark.parametrize("task", TASKS)
def test_episodes_are_counted(task: str) -> None:
    """By gymnasium, where it is there: every step belongs to an episode, or starts one."""
    pytest.importorskip("gymnasium")
    torch.manual_seed(0)
    runner = Runner(TASKS[task], 2, seed=0)

    def play(observations):
        if TASKS[task].discrete:
            return torch.randint(2, (2,)), torch.zeros(2)
        return torch.zeros(2, 1), torch.zeros(2)

    rollout = runner.rollout(play, 230)
    assert len(runner.returns) == int(rollout.done.sum()) > 0
    assert torch.equal(~rollout.real[1:], rollout.done[:-1])
    total = rollout.rewards[rollout.real].sum() / TASKS[task].reward
    counted = sum(runner.returns) + float(runner.running.sum())
    assert abs(float(total) - counted) < 1e-2 * max(1, abs(counted))
