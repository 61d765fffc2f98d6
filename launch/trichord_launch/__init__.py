"""The launcher. Runs on a login node without torch."""
