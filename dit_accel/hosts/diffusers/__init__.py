"""The diffusers host: attaching to its transformers, and telling the engine where a call stands."""
