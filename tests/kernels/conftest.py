"""Fixtures of the tests of kernels."""

import pytest
from cuda_decoder_machine import DecoderMachine
from cuda_machine import Machine
from cuda_model import built_once


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The kernels of native/cuda on a model of a GPU."""
    return built_once(Machine, tmp_path_factory)


@pytest.fixture(scope="session")
def decoder_machine(tmp_path_factory: pytest.TempPathFactory) -> DecoderMachine:
    """The kernels between products, on the same model."""
    return built_once(DecoderMachine, tmp_path_factory)
