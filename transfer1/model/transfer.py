"""The whole model: base network, control branch, log-variance head, conditioner, tokenizer.

Letters: B batch, C channels, T H W latent frames/rows/columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from kernels import Ops
from transfer1.config import Config, ConfigError, instantiate
from transfer1.diffusion.condition import Condition
from transfer1.interop import keys

from .control import ControlEncoder, Weights, normalize_weights, weights_per_hint
from .dit import DiT
from .layers import LogVariance

CONTROL_ONLY = keys.Rule(
    "hint and residual layers of the control branch",
    r"^(x_embedder2|input_hint_block|zero_blocks)\.",
)
BRANCH_OPTION = keys.Rule("part that only the control branch was configured with", r"")


class Transfer(nn.Module):
    """A base network steered by a control branch.

    The state dict has the names of released checkpoints: `net.*` is the control branch,
    `base_model.net.*` the base, and the log-variance head appears as `logvar.*` and as
    `base_model.logvar.*`, which are the same tensors.

    Args:
        base: base network.
        control: control branch; None trains or samples the base alone.
        conditioner: makes conditions of batches; holds no weights.
        tokenizer: encodes videos; its weights belong to no checkpoint of this model.
    """

    conditioner: Any
    tokenizer: Any

    def __init__(
        self, base: DiT, control: ControlEncoder | None, conditioner: Any, tokenizer: Any
    ) -> None:
        super().__init__()
        self.net = control
        self.logvar = LogVariance()
        self.base_model = nn.ModuleDict({"net": base, "logvar": self.logvar})
        # Past nn.Module's own bookkeeping, so that they stay out of state_dict() and parameters().
        object.__setattr__(self, "conditioner", conditioner)
        object.__setattr__(self, "tokenizer", tokenizer)

    @property
    def base(self) -> DiT:
        """The base network."""
        base = self.base_model["net"]
        assert isinstance(base, DiT)
        return base

    def forward(
        self,
        x_BCTHW: Tensor,
        noise_level_B: Tensor,
        condition: Condition,
        hints: Sequence[Tensor] | None = None,
        weights: Weights = None,
        keep_B: Tensor | None = None,
    ) -> Tensor:
        """Run the base network with the residuals of the control branch.

        Weights of several hints that ask for more than 1 together are scaled down
        (`normalize_weights`), in training as well as outside: the branch learns what it will see.

        Args:
            x_BCTHW: noisy latent, scaled by c_in.
            noise_level_B: c_noise.
            condition: what is known about the clip.
            hints: encoded hints; none runs the base alone.
            weights: how strongly each hint acts, see `ControlEncoder.forward`.
            keep_B: 0 for samples that get no control, else 1.

        Returns:
            [B, C, T, H, W].
        """
        residuals = None
        if hints:
            if self.net is None:
                raise ValueError("hints came in, but there is no control branch: set net_ctrl=NAME")
            weights = weights_per_hint(weights, len(hints))
            if len(hints) > 1:
                weights = normalize_weights(weights)
            residuals = self.net(x_BCTHW, noise_level_B, condition, hints, weights, keep_B)
        return self.base(x_BCTHW, noise_level_B, condition, residuals)

    def log_variance(self, noise_level_B: Tensor) -> Tensor:
        """The learned log-variance of the loss at a noise level, [B, 1]."""
        return self.logvar(noise_level_B)


def build_transfer(config: Config, ops: Ops | None = None) -> Transfer:
    """Build the model of a run, its parameters drawn from torch's current random state.

    The control branch starts as a copy of the base, as far as both have the same parts. With a
    control branch, base and log-variance head are frozen unless `model.finetune_base_model`.

    Args:
        config: the composed configuration.
        ops: the chosen kernels; None resolves `config.kernels`.

    Raises:
        ConfigError: no base network was chosen.
        FileNotFoundError, ValueError: base weights that are not there or do not fit.
    """
    options = config.model
    if options.net is None:
        raise ConfigError("model.net: no network was chosen; set net=NAME or experiment=NAME")
    ops = ops or instantiate(config.kernels, device=_device_type(config.trainer.device))
    base = instantiate(options.net, ops=ops)
    control = None if options.net_ctrl is None else instantiate(options.net_ctrl, ops=ops)
    conditioner = instantiate(options.conditioner)
    model = Transfer(base, control, conditioner, instantiate(options.tokenizer))

    if options.base_load_from is not None and options.base_load_from.load_path:
        load_base(model, options.base_load_from.load_path)
    if control is not None:
        copy_base(base, control)
        model.base_model.requires_grad_(options.finetune_base_model)
    return model


def load_base(model: Transfer, path: str) -> keys.KeyReport:
    """Load a released base, or the base inside a control checkpoint, and log what did not match.

    Raises:
        FileNotFoundError: no file there.
        ValueError: the weights do not fit the base network.
    """
    report = keys.KeyReport()
    state, report = keys.base_state(keys.read_weights(path, report), report)
    optional = (keys.FRESH_LOG_VARIANCE, keys.POSITION_INDEX)
    keys.load_strictly(model.base_model, state, optional, report)
    logger.info(f"base weights of {path}: {report}")
    return report


def copy_base(base: DiT, control: ControlEncoder) -> keys.KeyReport:
    """Start the control branch as the base: copy all parts that both have.

    Raises:
        ValueError: a part that both have has another shape.
    """
    own, report = control.state_dict(), keys.KeyReport()
    shared = {key: tensor for key, tensor in base.state_dict().items() if key in own}
    left_out = [key for key in base.state_dict() if key not in own]
    if left_out:
        report.ignored["part of the base alone"] = left_out
    keys.load_strictly(control, shared, (CONTROL_ONLY, BRANCH_OPTION), report)
    logger.info(f"control branch from the base: {report}")
    return report


def _device_type(name: str) -> str:
    """The device type that `kernels=auto` is resolved for, from `trainer.device`."""
    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (accelerator or torch.get_default_device()).type
