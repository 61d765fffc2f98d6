"""The static judge: compiled kernels, without a GPU, against hard bars."""
