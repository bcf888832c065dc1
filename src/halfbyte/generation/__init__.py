"""Text from a model: `Model.generate`, `Chat` and the decoding loop."""
