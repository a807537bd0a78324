"""Command-line tools for work outside training: sharding, the demo set, benchmarks."""
