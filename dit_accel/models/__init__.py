"""Which model is meant and which sizes it takes: what can be known before weights are loaded."""
