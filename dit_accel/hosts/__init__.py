"""Hosts: who runs a model and calls the engine. Everything that knows one of them is here."""
