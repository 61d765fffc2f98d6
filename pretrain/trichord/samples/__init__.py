"""Bytes become typed, decoded items: safely, and the same on every machine."""
