"""One file per fused op: its Triton kernels, launchers and torch registration. Importing one imports triton."""
