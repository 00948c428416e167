"""The fields of a run and their types; what may be overridden is what stands here.

Values of the groups live in `configs/`. Fields made by `node()` hold what a group stored.
"""

from __future__ import annotations

from typing import Any

import attrs
from omegaconf import MISSING

NODE = "node"  # key in the metadata of fields that hold a mapping or null, never a scalar


def node() -> Any:
    """A field for a LazyCall, or a mapping of them; null until a group fills it in."""
    return attrs.field(default=None, metadata={NODE: True})


@attrs.define(slots=False)
class JobConfig:
    """Where a run keeps its files: `<OUTPUT_ROOT or checkpoints>/<project>/<group>/<name>`."""

    project: str = "cosmos_transfer1"
    group: str = "debug"
    name: str = "delete_${now:%Y-%m-%d}_${now:%H-%M-%S}"
    path: str = "${.project}/${.group}/${.name}"
    path_local: str = "${oc.env:OUTPUT_ROOT,checkpoints}/${.path}"


@attrs.define(slots=False)
class HintKeyConfig:
    """Which control the model sees."""

    hint_key: str = MISSING  # key of the control in a batch, e.g. control_input_edge
    grayscale: bool = False  # replace its three channels by their mean


@attrs.define(slots=False)
class BaseLoadConfig:
    """Weights of the base network."""

    load_path: str = ""  # file, "" for none; * stands for the ranks of a tensor-parallel file


@attrs.define(slots=False)
class FSDPConfig:
    """How parameters are sharded (FSDP2); counts with trainer.distributed_parallelism=fsdp."""

    policy: str = "block"  # what is one unit: a transformer block
    checkpoint: bool = False  # the networks have activation_checkpoint
    min_num_params: int = 1024  # taken for configurations of the original: of its policy "size"
    sharding_group_size: int = 8  # processes that hold one model; of strategy hybrid
    sharding_strategy: str = "full"  # over all processes, or hybrid: copies of sharded models
    reduce_dtype: str = "float32"  # in which gradients are summed
    cpu_offload: bool = False  # shards and optimizer state stay on the host


@attrs.define(slots=False)
class CameraWeightConfig:
    """Weight of samples whose camera moves."""

    enabled: bool = False
    weight: float = 5.0


@attrs.define(slots=False)
class AestheticConfig:
    """Weight samples by `aesthetic_weight` of the batch."""

    enabled: bool = False


@attrs.define(slots=False)
class ModelConfig:
    """The networks, what they are told, and the loss."""

    tokenizer: Any = node()
    conditioner: Any = node()
    net: Any = node()  # the base network
    net_ctrl: Any = node()  # the control encoder; null trains the base alone
    hint_key: HintKeyConfig | None = None
    base_load_from: BaseLoadConfig | None = attrs.field(factory=BaseLoadConfig)
    finetune_base_model: bool = False  # train the base too
    lora: Any = node()  # adapters in place of the weights; null trains the weights
    ema: Any = node()
    sde: Any = node()  # distribution of noise levels
    sigma_data: float = 0.5  # standard deviation of latents; they are scaled by it
    precision: str = "bfloat16"
    input_data_key: str = "video"
    input_image_key: str = "images_1024"
    latent_shape: list[int] = attrs.field(factory=lambda: [16, 24, 44, 80])  # C, T, H, W
    adjust_video_noise: bool = False  # multiply sigma of clips by sqrt(T)
    loss_add_logvar: bool = True  # weight the loss by a learned uncertainty
    loss_reduce: str = "sum"  # mean, or sum over elements and mean over the batch
    loss_scale: float = 1.0
    loss_mask_enabled: bool = False
    loss_masking: dict[str, float] = attrs.field(factory=dict)  # mask in the batch -> weight
    camera_sample_weight: CameraWeightConfig = attrs.field(factory=CameraWeightConfig)
    aesthetic_finetuning: AestheticConfig = attrs.field(factory=AestheticConfig)
    hint_mask: list[bool] = attrs.field(factory=lambda: [True])  # conditions used outside training
    hint_dropout_rate: float = 0.0  # chance of each of several conditions to be blacked out
    pixel_corruptor: Any = node()  # applied to the control video in training
    n_views: int = 1
    fsdp_enabled: bool = False
    fsdp: FSDPConfig = attrs.field(factory=FSDPConfig)


@attrs.define(slots=False)
class DDPConfig:
    """Options of DistributedDataParallel."""

    find_unused_parameters: bool = False
    static_graph: bool = True
    broadcast_buffers: bool = True


@attrs.define(slots=False)
class CuDNNConfig:
    """Flags of `torch.backends.cudnn`."""

    deterministic: bool = False
    benchmark: bool = True


@attrs.define(slots=False)
class TrainerConfig:
    """The training loop. Every count of iterations is a count of optimizer updates."""

    type: str = "transfer1.training.trainer.Trainer"  # dotted path of the class that train.py runs
    device: str = "auto"  # auto | cuda | cpu; auto: cuda:LOCAL_RANK where there is one
    callbacks: Any = node()  # name -> LazyCall of a Callback, in the order in which they run
    distributed_parallelism: str = "ddp"  # copies of the model, or fsdp: shards of it
    ddp: DDPConfig = attrs.field(factory=DDPConfig)
    cudnn: CuDNNConfig = attrs.field(factory=CuDNNConfig)
    seed: int = 0
    timestamp_seed: bool = True  # draw the seed from the clock at the first start
    max_iter: int = 400000
    grad_accum_iter: int = 1  # micro-steps per optimizer update
    logging_iter: int = 10
    run_validation: bool = False
    validation_iter: int = 100
    max_val_iter: int | None = None  # batches per validation; null: all
    timeout_period: int = 999999999  # seconds without a finished iteration before the run aborts
    memory_format: str = "torch.preserve_format"
    non_finite: str = "skip"  # what a non-finite gradient does: skip the update, or zero it
    max_skipped: int = 100  # abort after this many skipped updates in a row
    nvtx: bool = False  # mark what the run does for Nsight Systems; needs the package nvtx
    profile: list[int] = attrs.field(factory=list)  # updates, from 1, to trace into <job>/profile


@attrs.define(slots=False)
class ModelParallelConfig:
    """How many processes share one model."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False


@attrs.define(slots=False)
class CheckpointConfig:
    """What is saved and what a run starts from."""

    type: Any = node()  # LazyCall of a checkpointer, from group ckpt_klass
    save_iter: int = 999999999
    load_path: str = ""  # file to start from when the job folder has no checkpoint
    load_training_state: bool = False  # take optimizer, schedule and iteration from load_path too
    only_load_scheduler_state: bool = False  # take only the schedule from load_path
    strict_resume: bool = True  # refuse checkpoints whose names or shapes differ
    keys_not_to_resume: list[str] = attrs.field(factory=list)  # of model, optim, scheduler, trainer
    load_ema_to_reg: bool = False  # start from the averaged weights


@attrs.define(slots=False)
class Config:
    """One run. `compose` fills it from the groups and makes it read-only."""

    model: Any = node()
    optimizer: Any = node()
    scheduler: Any = node()
    dataloader_train: Any = node()
    dataloader_val: Any = node()
    job: JobConfig = attrs.field(factory=JobConfig)
    trainer: TrainerConfig = attrs.field(factory=TrainerConfig)
    model_parallel: ModelParallelConfig = attrs.field(factory=ModelParallelConfig)
    checkpoint: CheckpointConfig = attrs.field(factory=CheckpointConfig)
    kernels: Any = node()
    model_obj: Any = node()
    defaults: list[Any] = attrs.field(factory=lambda: ["_self_"])
