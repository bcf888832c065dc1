"""What quantization did to a model, as data: errors, rounding, channels, weights, bytes."""

from halfbyte.analysis.channels import ChannelSalience, channel_salience
from halfbyte.analysis.layers import LayerError, layer_errors
from halfbyte.analysis.memory import MemoryMap, memory_map
from halfbyte.analysis.result import Analysis
from halfbyte.analysis.rounding import RoundingStatistics, rounding_statistics
from halfbyte.analysis.weights import WeightDistribution, together, weight_distribution

__all__ = [
    "Analysis",
    "ChannelSalience",
    "LayerError",
    "MemoryMap",
    "RoundingStatistics",
    "WeightDistribution",
    "channel_salience",
    "layer_errors",
    "memory_map",
    "rounding_statistics",
    "together",
    "weight_distribution",
]
