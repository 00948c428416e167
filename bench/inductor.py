"""What `torch.compile` would emit for the references on a CUDA GPU, generated without one.

    python -m bench.inductor [--op NAME ...]

prints JSON, one row per op and pass. Inductor lowers the traced reference for a pretended H100 and
counts the bytes of the buffers that each of its kernels reads and writes, once per kernel; nothing
is run or tuned. A backward pass computes anew what it needs of the forward pass, and a compiled one
would keep some of it.
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

from kernels import OPS

from .static_cases import MODELS, as_list, model_uses

TRACED = ("adaln_modulate", "residual_adaln_modulate", "gated_residual", "qk_norm_rope")
DEVICE = torch.device("cuda:0")


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of the chosen ops as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.inductor")
    parser.add_argument("--op", nargs="*", choices=TRACED, default=TRACED)
    print(json.dumps([row for op in parser.parse_args(arguments).op for row in rows_of(op)]))


def rows_of(op: str) -> Iterator[dict[str, Any]]:
    """Launches and bytes per element of both passes of every use of an op by the 7B model."""
    for use in model_uses(op, "7B", MODELS["7B"].tokens):
        if "M" in use.options:
            continue  # few keys: nothing that is counted per query says something
        with FakeTensorMode():
            inputs = use.inputs()
            outputs = OPS[op].reference(**inputs)
        outputs = as_list(outputs)
        names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        tensors = [inputs[name].detach() for name in names]
        elements = tensors[0].numel()
        leaves = [index for index, name in enumerate(names) if inputs[name].requires_grad]
        others = {n: v for n, v in inputs.items() if n not in names}
        forward = _forward(OPS[op].reference, names, others)
        backward = _backward(forward, len(names), leaves)
        for stage, function, operands in (
            ("forward", forward, tensors),
            ("backward", backward, [*tensors, *(output.detach() for output in outputs)]),
        ):
            launches, size = lowered(function, operands)
            yield {
                "op": op,
                "config": use.config,
                "pass": stage,
                "rival": f"torch.compile {torch.__version__}",
                "launches": launches,
                "unique per element": size / elements,
            }


def lowered(function: Callable[..., Any], operands: list[Tensor]) -> tuple[int, int]:
    """(launches, bytes) of what Inductor makes of a function of these tensors' shapes."""
    with ExitStack() as stack:
        stack.enter_context(_pretended_gpu())
        traced = make_fx(function, select_decomp_table(), tracing_mode="fake")(*operands)
        traced.graph.eliminate_dead_code()
        for node in traced.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": DEVICE}
        traced.recompile()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
                for x in operands
            ]
        with torch.no_grad():
            FakeTensorProp(traced, fake).propagate_dont_convert_inputs(*inputs)
        graph = GraphLowering(traced, is_inference=True)
        for context in (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(graph),
            V.set_fake_mode(fake),
        ):
            stack.enter_context(context)
        graph.run(*inputs)
        code = graph.codegen()[0]
        text = str(getattr(code, "value", code))
        size, _, _ = graph.count_bytes()
    return len(re.findall(r"^\s+triton_\w+\.run\(", text, re.MULTILINE)), int(size)


def _forward(
    function: Callable[..., Any], names: list[str], others: dict[str, Any]
) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        return as_list(function(**dict(zip(names, tensors, strict=True)), **others))

    return call


def _backward(forward: Callable[..., Any], count: int, leaves: list[int]) -> Callable[..., Any]:
    def call(*operands: Tensor) -> Any:
        tensors = [
            x.detach().requires_grad_(index in leaves) for index, x in enumerate(operands[:count])
        ]
        outputs = forward(*tensors)
        return torch.autograd.grad(outputs, [tensors[i] for i in leaves], operands[count:])

    return call


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """In the block, Inductor finds an H100."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
        warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=49152, max_threads_per_block=1024, gcnArchName="",
        L2_cache_size=50 << 20,
    )  # fmt: skip

    def static(value: Any) -> Any:
        return staticmethod(lambda *_: value)

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: DEVICE,
        get_device_interface=lambda: torch.cuda,
        get_current_stream=lambda _=0: 0,
        is_active=lambda: True,
    )
    triton.runtime.driver.set_active(driver)
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "get_device_properties", lambda _=None: properties),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "get_device_capability", lambda _=None: (9, 0)),
            (torch.version, "cuda", "12.9"),
            (CudaInterface, "get_device_properties", static(properties)),
            (CudaInterface.Worker, "get_device_properties", static(properties)),
            (CudaInterface, "current_device", static(0)),
            (CudaInterface.Worker, "current_device", static(0)),
            (CudaInterface, "get_compute_capability", static(90)),
            (CudaInterface, "is_available", static(True)),
            (CudaInterface, "is_triton_capable", static(True)),
            (CudaInterface, "raise_if_triton_unavailable", static(None)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


if __name__ == "__main__":
    main()
