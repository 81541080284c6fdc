"""Process groups, counted collectives, and what the device is good at. Knows nothing of models or optimizers."""
