"""The config and the quantizer by which transformers' `from_pretrained` opens halfbyte's checkpoints.

`registration` imports this while transformers is itself being imported: nothing at the top may need more of it than its
table of quantizers, and the rooms of halfbyte are imported when a model is loaded.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.formats.layouts import Layout
    from halfbyte.runtime.loading import NetworkBuilder

METHOD = "halfbyte"
_log = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class HalfbyteConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks transformers to run a checkpoint's quantized linears on halfbyte's kernels.

    Checkpoints of `quant_method: halfbyte` need none. With `quantization_config=HalfbyteConfig()`, `from_pretrained`
    opens every layout of `halfbyte.formats` so, AWQ and GPTQ among them, for which it would use other packages.

    Args:
        backend: the kernel of the linears (`halfbyte backends` lists them), or "auto".

    Attributes:
        section: the checkpoint's `quantization_config`; stays in the model's config as it was.
    """

    def __init__(self, backend: str = "auto"):
        self.quant_method = METHOD
        self.backend = backend
        self.section: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the section of a config.json."""
        config = cls(kwargs.pop("backend", "auto"))
        config.section = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section of the config.json it came from."""
        return {"quant_method": METHOD, **self.section}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: there are no defaults."""
        return self.to_dict()


@register_quantizer(METHOD)
class HalfbyteHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a `QuantLinear` wherever the checkpoint holds codes; transformers loads what is left.

    The weights are placed by the loader of `halfbyte.load`. They take the place of the skeleton's linears before
    transformers looks for their weights, and after it knows which device each part is on.
    """

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._builder: NetworkBuilder | None = None
        self._packed_bytes: Mapping[str, int] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Asked for twice: before the model is built, and once an automatic device map has been found."""
        if self._builder is not None and not isinstance(device_map, str):
            self._place(device_map)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """What an automatic device map is made from: bytes of the codes, not of the weights they stand for."""
        size = self._packed_bytes.get(param_name)
        return float(param.element_size()) if size is None else size / param.numel()

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from halfbyte.checkpoints.reader import Checkpoint
        from halfbyte.formats.layouts import read_layout
        from halfbyte.runtime.loading import NetworkBuilder, quantized_linears

        if not checkpoint_files:
            raise ConfigError("state_dict: quantized linears are read from files; give from_pretrained a folder alone")
        checkpoint = Checkpoint.open(Path(checkpoint_files[0]).parent)
        layout = read_layout(checkpoint.config)
        if layout is None:
            raise ConfigError(
                f"{checkpoint.folder}: is not quantized, which HalfbyteConfig expects; "
                f"halfbyte quantize {checkpoint.folder} -o OUT makes a checkpoint that is"
            )
        linears = quantized_linears(checkpoint, layout)
        self._builder = NetworkBuilder(model, checkpoint, layout, linears, self.quantization_config.backend, None)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            _packed_tensors(layout, linears),
        }
        if isinstance(device_map, str):
            self._packed_bytes = self._builder.packed_bytes(None)
        else:
            self._place(device_map)
        return model

    def _place(self, device_map: Any) -> None:
        """Lay the weights out on their devices."""
        from halfbyte.runtime.experts import ExpertStack
        from halfbyte.runtime.placement import Placement, read_placement

        builder, self._builder = self._builder, None
        assert builder is not None
        where = read_placement("cpu" if device_map is None else "auto", device_map, None)
        assert isinstance(where, Placement)
        if not where.on_cpu and any(device.type == "cpu" for device in where.devices.values()):
            raise UnsupportedError(
                "device_map: transformers would move the weights on the CPU to the GPU in every step; "
                f'halfbyte.load("{builder.checkpoint.folder}", device_map=…) computes on the CPU what is there'
            )
        network = builder.network
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):  # transformers has set the meta device and a dtype for all that is made meanwhile
                builder.place_quantized(where)
        finally:
            torch.set_default_dtype(usual)
        stacks = [owner for owner in network.modules() if any(isinstance(c, ExpertStack) for c in owner.children())]
        for owner in stacks:
            owner._is_hf_initialized = True  # else transformers draws random weights for them
        if stacks:
            network.set_experts_implementation("eager")  # the fused ones want all experts in one tensor of floats

    def is_serializable(self) -> bool:
        """Not from here: the codes are in a kernel's layout."""
        _log.warning("its codes are in a kernel's layout; save with halfbyte.load(FOLDER).save_pretrained(OUT)")
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the quantized linears are: a gradient flows through to them."""
        return True


def _packed_tensors(layout: Layout, linears: list[str]) -> str:
    """A pattern of what stands in the file for the linears' weights."""
    last = sorted({re.escape(name.rpartition(".")[2]) for name in linears})
    return rf"(^|\.)({'|'.join(last)})\.({'|'.join(map(re.escape, layout.keys))})$"


def _with_requests(merge: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """transformers refuses a config of another class than the checkpoint's method has; ours is such a request."""

    @functools.wraps(merge)
    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if not isinstance(asked, HalfbyteConfig):
            return merge(quantization_config, asked)
        section = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        return HalfbyteConfig.from_dict(section, backend=asked.backend)

    return merged


AutoHfQuantizer.merge_quantization_configs = staticmethod(_with_requests(AutoHfQuantizer.merge_quantization_configs))
