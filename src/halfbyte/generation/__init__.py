"""Text from a model: `Model.generate` and the decoding loop."""
