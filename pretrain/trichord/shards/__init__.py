"""From URLs of tar shards to raw samples: sources, indices, the order of samples, quarantine, and writing shards."""
