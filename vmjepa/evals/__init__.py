"""Frozen evaluations: probes on the target encoder's tokens."""
