"""The decoder, its training step, its rollouts, its checkpoints, and what is asked of it."""
