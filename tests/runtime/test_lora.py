"""Adapters train on the 4-bit base: the gradients are those of a dense model with the same weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.runtime import compute_dtype
from halfbyte.runtime.compute_dtype import HalfWeightLinear
from halfbyte.runtime.quant_linear import QuantLinear

TARGETS = ("q_proj", "v_proj", "up_proj")
IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(3))


class Adapter(nn.Module):
    """LoRA written out: y = base(x) + 2 · B · A · x."""

    def __init__(self, base: Any, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) / base.in_features**0.5)
        self.b = nn.Parameter(0.01 * torch.randn(base.out_features, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + 2 * (x @ self.a.T) @ self.b.T
        return y


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "has_bf16_arithmetic", lambda: False)


def load(folder: Path, **settings: Any) -> Any:
    return halfbyte.load(folder, backend="transformers", **settings).network


def add_adapters(network: Any) -> dict[str, nn.Parameter]:
    """An adapter on every target, the same ones for every network; its parameters by name."""
    paths = [path for path, _ in network.named_modules() if path.endswith(TARGETS)]
    for seed, path in enumerate(paths):
        network.set_submodule(path, Adapter(network.get_submodule(path), seed))
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def dense(folder: Path) -> Any:
    """The same model on `nn.Linear`s with the dequantized weights, in fp32."""
    network = load(folder)
    for path, module in list(network.named_modules()):
        if isinstance(module, QuantLinear):
            weight = module.prepared.dequantize()
        elif isinstance(module, HalfWeightLinear):
            weight = module.weight.float()
        else:
            continue
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        network.set_submodule(path, linear)
    assert not any(isinstance(module, QuantLinear) for module in network.modules())
    return network


def loss_of(network: Any) -> torch.Tensor:
    loss: torch.Tensor = network(input_ids=IDS, labels=IDS).loss
    return loss


@pytest.mark.parametrize("fuse", [False, True])
def test_gradients_of_adapters_are_those_on_dense_weights(quantized_llama: Path, fuse: bool) -> None:
    networks = load(quantized_llama, fuse_layers=fuse), dense(quantized_llama)
    found, expected = (add_adapters(network) for network in networks)
    assert found.keys() == expected.keys()
    assert len(found) == 12
    losses = [loss_of(network) for network in networks]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
    for loss in losses:
        loss.backward()
    for name, parameter in found.items():
        assert parameter.grad is not None
        assert expected[name].grad is not None
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert float(error) < 1e-4, name


@pytest.mark.parametrize("fuse", [False, True])
def test_training_lowers_the_loss_as_on_dense_weights(quantized_llama: Path, fuse: bool) -> None:
    finals = []
    for network in (load(quantized_llama, fuse_layers=fuse), dense(quantized_llama)):
        base = [module.prepared.dequantize() for module in network.modules() if isinstance(module, QuantLinear)]
        optimizer = torch.optim.Adam(add_adapters(network).values(), lr=1e-2)
        first = loss_of(network).item()
        for _ in range(15):
            optimizer.zero_grad()
            loss_of(network).backward()
            optimizer.step()
        finals.append(loss_of(network).item())
        assert finals[-1] < 0.9 * first
        after = [module.prepared.dequantize() for module in network.modules() if isinstance(module, QuantLinear)]
        assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))
    assert abs(finals[0] - finals[1]) < 1e-2 * finals[1]


def test_a_gradient_reaches_the_embeddings_through_everything(quantized_llama: Path) -> None:
    gradients = []
    for network in (load(quantized_llama, fuse_layers=True), dense(quantized_llama)):
        x = network.get_input_embeddings()(IDS).detach().clone().requires_grad_()
        network(inputs_embeds=x, labels=IDS).loss.backward()
        gradients.append(x.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


def test_without_peft_one_line_says_what_to_install(quantized_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = halfbyte.load(quantized_llama, backend="transformers")
    with pytest.raises(UnsupportedError, match=r'LoRA needs peft; install it with: pip install "halfbyte\[lora\]"$'):
        model.with_lora(None)


@pytest.mark.interop
@pytest.mark.parametrize("fuse", [False, True])
def test_peft_trains_and_saves_adapters(quantized_llama: Path, tmp_path: Path, fuse: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=list(TARGETS), r=4, lora_alpha=8, task_type="CAUSAL_LM")
    model = halfbyte.load(quantized_llama, backend="transformers", fuse_layers=fuse)
    adapted = model.with_lora(copy.deepcopy(config))
    # the same on dense weights, with the same start
    reference = peft.get_peft_model(dense(quantized_llama), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {key: value.shape for key, value in peft.get_peft_model_state_dict(adapted).items()}
    start = {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    finals = []
    for network in (adapted, reference):
        peft.set_peft_model_state_dict(network, start)
        trained = [p for p in network.parameters() if p.requires_grad]
        assert len(trained) == 12
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        first = loss_of(network).item()
        for _ in range(20):
            optimizer.zero_grad()
            loss_of(network).backward()
            optimizer.step()
        finals.append(loss_of(network).item())
        assert finals[-1] < 0.9 * first
    assert abs(finals[0] - finals[1]) < 1e-2 * finals[1]
    adapted.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(dense(quantized_llama), tmp_path)  # by name, so it fits a dense model, too
    with torch.no_grad():
        torch.testing.assert_close(loss_of(back).item(), finals[0], rtol=1e-4, atol=0.0)
    with pytest.raises(UnsupportedError, match="cannot be merged into codes"):
        adapted.merge_and_unload()


@pytest.mark.interop
def test_peft_is_told_about_bad_configs(quantized_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = halfbyte.load(quantized_llama, backend="transformers")
    with pytest.raises(ConfigError, match="lora: expected a peft.LoraConfig, got NoneType"):
        model.with_lora(None)
    with pytest.raises(ConfigError, match="lora: .*c_attn.* not found"):
        model.with_lora(peft.LoraConfig(target_modules=["c_attn"]))
