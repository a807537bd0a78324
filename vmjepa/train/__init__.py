"""Pretraining: the loop, the DeepSpeed engine, schedules, checkpoints and metrics."""
