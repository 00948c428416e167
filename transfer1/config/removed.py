"""What the original accepted and this package does not, and what to use instead.

Tests read these tables too: they drop or translate exactly what is listed here.
"""

from __future__ import annotations

# Arguments of the original's classes -> what replaces them.
REMOVED_ARGUMENTS: dict[str, str] = {
    "block_x_format": "none is needed: there is one layout, [batch, tokens, channels]",
    "use_memory_save": "use activation_checkpoint=selective",
    "use_checkpoint": "use activation_checkpoint=block",
    "layer_mask": "use num_control_blocks: blocks 0 to num_control_blocks - 1 are built",
    "window_block_indexes": "none: attention is always over the whole clip",
    "window_sizes": "none: attention is always over the whole clip",
    "spatial_attn_win_size": "none: attention is always over the whole clip",
    "temporal_attn_win_size": "none: attention is always over the whole clip",
    "use_cross_attn_mask": "none: text is never masked",
    "random_drop_control_blocks": "use num_control_blocks; which blocks run is not drawn at random",
    "num_layers_to_use": "use num_control_blocks",
    "optim_type": "choose the optimizer with optimizer=NAME",
    "sharding": "none: optimizer state is split with the parameters",
    "verbosity_interval": "none: the learning rate is among the metrics",
    "fsdp_checkpointer": "choose the checkpointer with ckpt_klass=NAME",
}

# Keys of the original's configuration -> what replaces them.
REMOVED_KEYS: dict[str, str] = {
    "model.use_torch_compile": "use kernels=compile",
    "model.num_control_blocks": "use model.net_ctrl.num_control_blocks",
    "model.random_drop_control_blocks": "use model.net_ctrl.num_control_blocks",
    "model.context_parallel_size": "use model_parallel.context_parallel_size",
    "model.use_dummy_temporal_dim": "none: images are clips of one frame",
    "model.num_latents_to_drop": "none: all latent frames are trained on",
    "trainer.grad_scaler_args": "none: bfloat16 and float32 need no loss scaling",
    "checkpoint.dcp_async_mode_enabled": "none: checkpoints are always written in the background",
    "checkpoint.verbose": "none: what was loaded is always logged",
    "checkpoint.jit": "none: models are not exported by the training loop",
    "checkpoint.broadcast_via_filesystem": "none: every rank reads the file itself",
}

MULTI_VIEW = "multi_view"

# Targets of options that are known by name only -> why they are refused.
REMOVED_TARGETS: dict[str, str] = {
    MULTI_VIEW: "multi-view models (several cameras at once, sv2mv) are not built here; choose a "
    "single-view option of the group, or an experiment without sv2mv in its name",
}
