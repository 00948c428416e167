"""Memory of a training step, by running it on the meta device: shapes without values.

Every tensor that the step makes is counted from its creation to its release, so that the peak holds
what autograd keeps, gradients, and temporaries alike, whatever the options are. Letters: B batch,
L tokens, M context tokens, N heads, K head size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import Ops, select
from kernels.adaln_attention.attention_gradients import register_attention_gradients
from transfer1.config import Config, instantiate
from transfer1.diffusion.condition import Condition
from transfer1.model.block import TransformerBlock
from transfer1.model.transfer import Transfer, build_transfer

from .device import choose_dtype

TEXT_TOKENS = 512  # where the data set does not say
# Bytes per parameter and backend that an update holds at its peak: the reference goes over all
# parameters at once, with six float32 lists alive (gradients, squares, denominators, updates,
# decay, sum).
STEP_BYTES = {"reference": 24}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process that holds the whole model.

    Attributes:
        parameters: weights and buffers in the precision of the run.
        trained: of them, those that are trained.
        gradients, moments, masters, averages: of the trained parameters.
        activations: what forward leaves for backward, the loss included.
        forward: most that forward needs at once beyond what lasts and the clip.
        backward: most that forward and backward need at once beyond what lasts, gradients included.
        pixels: numbers in the clips of one micro-step; clip and control come as bytes, and the
            clip stays as float32 until its loss is known.
        step: most that the optimizer and averages need at once beyond what lasts, gradients
            included.
        largest_block: weights of the largest block, which sharded training gathers.
    """

    parameters: int
    trained: int
    gradients: int
    moments: int
    masters: int
    averages: int
    activations: int
    forward: int
    backward: int
    pixels: int
    step: int
    largest_block: int

    @property
    def lasting(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.moments + self.masters + self.averages + 2 * self.pixels

    @property
    def peak(self) -> int:
        """Most that a step holds at once."""
        return self.lasting + self.working

    @property
    def working(self) -> int:
        """Most that a step holds at once beyond what lasts."""
        return max(self.forward + 4 * self.pixels, self.backward, self.step)


class Tracker(TorchDispatchMode):
    """Counts bytes of the storages that are made inside and still alive.

    Attributes:
        live: now.
        peak: most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and count what it made."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@torch.library.custom_op("transfer1::planned_attention", mutates_args=())
def planned_attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that keeps what fused kernels keep: the output and one number per query."""
    raise NotImplementedError("runs on the meta device alone")


@planned_attention.register_fake
def _(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BLNK.contiguous()), q_BLNK.new_empty(
        q_BLNK.shape[:3], dtype=torch.float32
    )


def _gradients(_: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x) for x in inputs[:3])
    return q, k, v


register_attention_gradients(planned_attention, _gradients)


def planning_ops() -> Ops:
    """The references, but for attention: a table of all scores would be counted."""
    return select("reference").replaced(attention=lambda *inputs: planned_attention(*inputs)[0])


def model_without_memory(config: Config, ops: Ops) -> Transfer:
    """The networks of a run on the meta device, adapters and frozen parts as the run has them."""
    bare: Any = OmegaConf.merge(config)
    OmegaConf.set_readonly(bare, False)
    bare.model.tokenizer = None
    bare.model.base_load_from = None
    dtype = choose_dtype(config.model.precision)
    with torch.device("meta"):
        model = build_transfer(bare, ops)
        if config.model.lora is not None:
            instantiate(config.model.lora, model=model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


def measure(config: Config) -> Memory:
    """Run one step of an experiment on the meta device.

    Without the tokenizer, which runs before and whose temporaries are gone by then.

    Raises:
        ConfigError: see `build_transfer`.
    """
    model = model_without_memory(config, planning_ops())
    with torch.device("meta"):
        ema = instantiate(config.model.ema, model=model, rank=0)
        inputs = make_inputs(config, model)
    with Tracker() as tracker:
        output = model(*inputs)
        activations, forward = tracker.live, tracker.peak
        output.float().square().mean().backward()
    updated = [p for p in model.parameters() if p.grad is not None]
    count = sum(parameter.numel() for parameter in updated)
    kept = bytes_per_master(config)
    backend = instantiate(config.kernels, device=_device_type(config)).table["adamw_step"]
    gradients = _size(p.grad for p in updated)
    return Memory(
        parameters=_size(model.parameters()) + _size(model.buffers()),
        trained=_size(p for p in model.parameters() if p.requires_grad),
        gradients=gradients,
        moments=8 * count,
        masters=kept * count,
        averages=0 if ema is None else _size(ema.shadows.values()),
        activations=activations,
        forward=forward,
        backward=tracker.peak,
        pixels=pixel_count(config),
        step=gradients + STEP_BYTES.get(backend, 0) * count,
        largest_block=max(
            (_size(m.parameters()) for m in model.modules() if isinstance(m, TransformerBlock)),
            default=0,
        ),
    )


def bytes_per_master(config: Config) -> int:
    """What the optimizer keeps of one parameter beside its two moments."""
    options = config.optimizer
    if choose_dtype(config.model.precision) is torch.float32 or not options.get("master_weights"):
        return 0
    return 2 if options.get("master_remainder") else 4


def _device_type(config: Config) -> str:
    return "cpu" if config.trainer.device == "cpu" else "cuda"


def make_inputs(config: Config, model: Transfer) -> tuple[Any, ...]:
    """Arguments of `Transfer.forward` as a batch of the run gives them, without values."""
    options = config.model
    channels, frames, rows, columns = options.latent_shape
    batch, tokens = batch_size(config), TEXT_TOKENS
    dtype = choose_dtype(options.precision)
    if config.dataloader_train is not None:
        dataset = config.dataloader_train.get("dataset") or {}
        tokens = dataset.get("num_text_tokens") or TEXT_TOKENS
    width = options.net.get("crossattn_emb_channels", 1024)
    x = torch.empty(batch, channels, frames, rows, columns, dtype=dtype)
    condition = Condition(
        context=torch.empty(batch, tokens, width, dtype=dtype),
        fps=torch.empty(batch),
        padding_mask=torch.empty(batch, 1, 8 * rows, 8 * columns, dtype=dtype),
        frame_mask=torch.empty(batch, 1, frames, rows, columns, dtype=dtype),
    )
    if not options.net.get("concat_frame_mask", False):
        condition = Condition(condition.context, condition.fps, padding_mask=condition.padding_mask)
    hints = None
    if model.net is not None:
        hints = [torch.empty(batch, channels, frames, rows, columns, dtype=dtype)]
    return x, torch.empty(batch), condition, hints


def pixel_count(config: Config) -> int:
    """Numbers in the clips of one micro-step; a latent is an eighth of them along each axis."""
    _, frames, rows, columns = config.model.latent_shape
    return batch_size(config) * 3 * (8 * (frames - 1) + 1) * (8 * rows) * (8 * columns)


def batch_size(config: Config) -> int:
    """Clips per process and micro-step."""
    loader = config.dataloader_train
    return int(loader.get("batch_size") or 1) if loader is not None else 1


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
