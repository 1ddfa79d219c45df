"""Reinforcement learning on classic control tasks (extra ``rl``): see `study`."""
