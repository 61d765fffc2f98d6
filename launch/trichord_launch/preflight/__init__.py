"""Preflight: what would stop a run, found before it takes its place in the queue, with what to do about it."""
