"""Attack on the data road: mangled shards and sidecars, each of which must end in samples, a quarantine or a message."""
