"""Samples become segments, segments become packed rows, rows become `PackedBatch`."""
