"""Encoders: the towers that turn pixels, waveforms and text into feature tokens.

A tower runs once per micro-batch over all its items, placeholders included, so that every rank calls every module
equally often whatever its samples hold.
"""
