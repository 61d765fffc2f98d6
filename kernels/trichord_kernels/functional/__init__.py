"""The public ops: one file each, with the checks, the words and the choice of implementation."""
