"""A training run beside its loop: its parts, what a checkpoint holds, writing it, and the log."""
