"""From what calibration learned and what is wanted to a plan: strategies, modes, compensation, budgets, speed-ups."""
