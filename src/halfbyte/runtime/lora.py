"""LoRA adapters on a quantized base (Hu et al., "LoRA" 2021; on 4-bit weights, Dettmers et al., "QLoRA" 2023), by peft.

`QuantLinear` hands a gradient to its input, dX = dY · Ŵ, so all that is left is to tell peft what it may wrap.
"""

from __future__ import annotations

import warnings
from typing import Any

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.runtime.fused_linear import FusedSlice
from halfbyte.runtime.quant_linear import QuantLinear


def with_lora(network: Any, config: Any) -> Any:
    """The network with adapters in it, which alone are trained.

    Args:
        network: a transformers module with `QuantLinear`s, fused or not.
        config: a `peft.LoraConfig` whose `target_modules` names linears. Its adapters cannot be merged into the codes.

    Returns:
        A `peft.PeftModel`.

    Raises:
        UnsupportedError: peft is missing.
        ConfigError: not a `LoraConfig`, or it names no linear of the network.
    """
    try:
        import peft
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise UnsupportedError('LoRA needs peft; install it with: pip install "halfbyte[lora]"') from error
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"lora: expected a peft.LoraConfig, got {type(config).__name__}")

    class Adapter(Linear):  # type: ignore[misc]
        """peft's own, which reads `base_layer.weight` to merge; there is none."""

        def merge(self, *_: Any, **__: Any) -> None:
            raise UnsupportedError(
                "LoRA: an adapter cannot be merged into codes; keep it beside them, by save_pretrained"
            )

    config._register_custom_module({QuantLinear: Adapter, FusedSlice: Adapter})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # said of every class that is not peft's own
            return peft.get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).strip().splitlines()[0]}") from error
