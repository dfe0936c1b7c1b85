"""A training run beside its loop: what a checkpoint holds, writing it, and the log."""
