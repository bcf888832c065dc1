"""Running a model: quantized linears and loading."""
