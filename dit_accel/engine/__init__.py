"""The engine: what one attention call does, whoever makes it. It knows no host."""
