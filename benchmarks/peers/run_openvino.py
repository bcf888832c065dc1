"""OpenVINO as a contestant of benchmarks/cpu_decode.py, through its Python runtime.

    python benchmarks/peers/run_openvino.py FOLDER
    python benchmarks/peers/run_openvino.py MODEL --export OUT --group-size 64

Runs in an environment of its own. The export is optimum-intel's, the weights are NNCF's asymmetric 4 bits, the settings
are OpenVINO's defaults for the CPU. A step computes the logits of the last token alone, as OpenVINO GenAI does; scoring
takes the model as it was exported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from serving import serve


class OpenVino:
    """One exported folder; every sequence has the same length."""

    def __init__(self, folder: str):
        self._core = ov.Core()
        self._file = f"{folder}/openvino_model.xml"
        self._compiled: dict[int, Any] = {}
        self._request: Any = None
        self._scorer: Any = None
        self._sequences, self._length, self._marked = 1, 0, 0
        self._states: dict[str, Any] = {}
        self.set_threads(1)

    def describe(self) -> dict[str, Any]:
        model = self._core.read_model(self._file)
        compiled = next(iter(self._compiled.values()))
        cache = compiled.get_property("KV_CACHE_PRECISION")
        numbers = sum(state.state.shape[1] * state.state.shape[3] for state in self._request.query_state())
        return {
            "weight_bytes": matrix_bytes(model),
            "cache_bytes": numbers * cache.size,
            "versions": {name: version(name) for name in ("openvino", "nncf", "optimum-intel", "transformers")},
            "settings": {
                "cache": cache.get_type_name(),
                "inference": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
            },
        }

    def set_threads(self, count: int) -> None:
        if count not in self._compiled:
            model = last_token_only(self._core.read_model(self._file))
            self._compiled[count] = self._core.compile_model(model, "CPU", self._settings(count))
        self._request = self._compiled[count].create_infer_request()
        self._threads = count
        self.rewind()

    def start(self, sequences: int, capacity: int) -> None:
        del capacity
        self._sequences, self._marked, self._states = sequences, 0, {}
        self.rewind()

    def step(self, tokens: Sequence[Sequence[int]]) -> None:
        _infer(self._request, np.array(tokens, dtype=np.int64), self._length)
        self._length += len(tokens[0])

    def mark(self) -> None:
        self._marked = self._length
        if self._marked:
            self._states = {state.name: np.array(state.state.data) for state in self._request.query_state()}

    def rewind(self) -> None:
        self._request.reset_state()
        self._length = self._marked
        if self._marked:
            for state in self._request.query_state():
                state.state = ov.Tensor(self._states[state.name])

    def logits(self, ids: Sequence[int]) -> Any:
        if self._scorer is None:
            settings = self._settings(self._threads)
            self._scorer = self._core.compile_model(self._file, "CPU", settings).create_infer_request()
        self._scorer.reset_state()
        _infer(self._scorer, np.array([ids], dtype=np.int64), 0)
        return self._scorer.get_tensor("logits").data[0]

    @staticmethod
    def _settings(threads: int) -> dict[str, Any]:
        return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}


def _infer(request: Any, ids: Any, before: int) -> None:
    sequences, count = ids.shape
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones((sequences, before + count), dtype=np.int64),
        "position_ids": np.tile(np.arange(before, before + count), (sequences, 1)),
        "beam_idx": np.arange(sequences, dtype=np.int32),
    }
    names = {name for port in request.model_inputs for name in port.names}
    request.infer({name: value for name, value in inputs.items() if name in names}, share_inputs=True)


def last_token_only(model: Any) -> Any:
    """Slice what enters the output head."""
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = opset.slice(head.input_value(0), np.int64([-1]), np.int64([2**31 - 1]), np.int64([1]), np.int64([1]))
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


def matrix_bytes(model: Any) -> int:
    """Codes, scales and zero points of all weights that enter a product, tied ones once."""
    sizes: dict[str, int] = {}
    for node in model.get_ops():
        waiting = [node.input_value(1).get_node()] if node.get_type_name() == "MatMul" else []
        while waiting:
            source = waiting.pop()
            if source.get_type_name() == "Constant":
                sizes[source.get_friendly_name()] = source.get_byte_size()
            elif source.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
                waiting += [value.get_node() for value in source.input_values()]
    return sum(sizes.values())


def export(model: str, output: str, group_size: int) -> None:
    """optimum-intel's export, 4 bits with a zero point for every linear; NNCF keeps embedding and head in 8."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = OVWeightQuantizationConfig(bits=4, sym=False, group_size=group_size, ratio=1.0)
    OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, local_files_only=True, quantization_config=settings
    ).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--export", metavar="OUT")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    if options.export:
        export(options.model, options.export, options.group_size)
    else:
        serve(lambda: OpenVino(options.model))


if __name__ == "__main__":
    main()
