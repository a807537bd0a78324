"""Packs videos into shards: python -m tools.shard run INPUT OUTPUT (see __main__.py)."""
