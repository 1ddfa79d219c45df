"""From tensor networks to steps: symbolic arrays, views, products, paths, covers, schedules."""
