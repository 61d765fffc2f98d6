"""One optimizer step: DeepSpeed's engine, the exact global normalisation, and the watch over both."""
