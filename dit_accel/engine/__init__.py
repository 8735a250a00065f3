"""The engine: what runs at which attention site and when, free of any host."""
