"""vmjepa: pretrains VideoMamba encoders with V-JEPA, from video shards to frozen probes."""

__version__ = "0.1.0"
