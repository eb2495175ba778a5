"""Reference model, data, rewards and the training loop; ``python -m vstar_ops.train``."""
