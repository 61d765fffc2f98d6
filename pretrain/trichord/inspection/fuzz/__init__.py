"""Attack on the data road: mangled shards and sidecars must end in samples, a quarantine or a message."""
