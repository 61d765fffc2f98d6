"""Proof that the order of samples depends on nothing but config, seed and step: runs stopped at will, and compared."""
