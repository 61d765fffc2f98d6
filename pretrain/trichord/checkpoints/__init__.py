"""Step -> disk -> step, on any world size and ZeRO stage: slices of the fp32 state as safetensors, no pickle."""
