"""Fixtures of the tests of kernels."""

import shutil

import pytest
from cuda_decoder_machine import DecoderMachine
from cuda_machine import Machine


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The kernels of native/cuda on a model of a GPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the model")
    return Machine.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def decoder_machine(tmp_path_factory: pytest.TempPathFactory) -> DecoderMachine:
    """The kernels between products, on the same model."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the model")
    return DecoderMachine.build(tmp_path_factory.mktemp("cuda-decoder"))
