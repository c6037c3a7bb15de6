"""The project's linear layer: torch's numbers, by either of torch's libraries, wherever it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unidiffuser import linear
from unidiffuser.linear import Linear


class Operators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """As on a processor where oneDNN is the faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear, "ONEDNN", True)


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, Linear]:
    torch.manual_seed(0)
    plain, ours = nn.Linear(inputs, outputs, bias=bias), Linear(inputs, outputs, bias=bias)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def run(layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The result, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(gradient)
    return [result.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(24, 40), (40, 24), (33, 1)])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 4)])
def test_results_and_gradients_are_those_of_torch(shape, inputs, outputs, bias):
    plain, ours = pair(inputs, outputs, bias)
    x, gradient = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    for expected, found in zip(run(plain, x, gradient), run(ours, x, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [p.grad.stride() for p in ours.parameters()] == [p.stride() for p in ours.parameters()]


def test_inputs_in_any_order_of_memory():
    plain, ours = pair(24, 40, True)
    x, gradient = torch.randn(24, 6, 3).permute(2, 1, 0), torch.randn(40, 6, 3).permute(2, 1, 0)
    for expected, found in zip(run(plain, x, gradient), run(ours, x, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none():
    _, ours = pair(24, 40, True)
    ours.weight.requires_grad_(False)
    x = torch.randn(5, 24)
    ours(x).sum().backward()
    assert x.grad is None and ours.weight.grad is None
    torch.testing.assert_close(ours.bias.grad, torch.full((40,), 5.0))


def test_compiled_in_one_piece():
    plain, ours = pair(24, 40, True)
    x, gradient = torch.randn(5, 24), torch.randn(5, 40)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for expected, found in zip(run(plain, x, gradient), run(compiled, x, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_onednn_takes_single_precision_on_a_cpu_and_nothing_else():
    _, ours = pair(24, 40, True)
    x = torch.randn(5, 24)

    def operators(layer: nn.Module, x: Tensor) -> set[str]:
        with Operators() as watch:
            assert layer(x).shape == (*x.shape[:-1], 40)
        return watch.names

    assert operators(ours, x) >= {"unidiffuser.linear"}
    with torch.autocast("cpu", torch.bfloat16):
        assert "unidiffuser.linear" not in operators(ours, x)
        assert ours(x).dtype == torch.bfloat16
    assert "unidiffuser.linear" not in operators(Linear(24, 40).double(), x.double())
    assert "unidiffuser.linear" not in operators(Linear(24, 40).bfloat16(), x.bfloat16())
    assert "unidiffuser.linear" not in operators(Linear(24, 40, device="meta"), x.to("meta"))


@pytest.mark.parametrize(
    "maker, vectors, expected",
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_is_taken_where_mkl_leaves_half_the_vector_unused(maker, vectors, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    cpuinfo = tmp_path / "cpuinfo"
    if maker:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    assert linear.mkl_is_narrow(cpuinfo) is expected
