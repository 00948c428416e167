"""Communication and compute of a training step on many GPUs, predicted from formulas.

    python -m bench.scaling > docs/scaling.md

Nothing here was measured: every number follows from the sizes of the network, the published speeds
of the hardware and the assumptions that the text lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# NVIDIA H100 SXM data sheet and DGX H100 system guide: dense bfloat16, NVLink 900 GB/s in both
# directions together, one 400 Gb/s adapter per GPU.
PEAK_FLOPS = 989e12
NVLINK = 450e9  # bytes per second and direction
NETWORK = 50e9
NODE = 8

# The 7B base with a control branch of 3 blocks on a clip of 121 frames of 704 x 1280 pixels:
# 16 x 44 x 80 tokens. Operations: PyTorch's counter, forward and backward on the meta device
# without recomputation; attention, an op of its own, by the formula below.
TOKENS = 16 * 44 * 80
WIDTH = 4096
BLOCKS, CONTROL_BLOCKS = 28, 3
MATRICES = 1.71e15
WEIGHTS, TRAINED = 8.13e9, 0.893e9  # parameters; only the control branch is trained
BF16 = 2  # bytes

COMPUTE_EFFICIENCY = 0.4  # of PEAK_FLOPS, assumed
LINK_EFFICIENCY = 0.8  # of the published speeds, assumed
RECOMPUTATION = 1.3  # one clip per GPU fits 80 GB only with block checkpointing; assumed
LATENCY = 10e-6  # seconds per step of a ring between nodes, assumed
GPUS = (8, 64, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Plan:
    """How `gpus` share the work: each replica of `per_clip` GPUs works on one clip."""

    name: str
    per_clip: int
    sharded: bool  # weights, gathered in forward and again in backward
    tensor: bool  # how the GPUs of a clip share it: matrices and tokens, or frames


PLANS = (
    Plan("data parallel, whole model per GPU", 1, sharded=False, tensor=False),
    Plan("fsdp in the node, replicas between", 1, sharded=True, tensor=False),
    Plan("context parallel 8 + fsdp in the node", NODE, sharded=True, tensor=False),
    Plan("tensor + sequence parallel 8 in the node", NODE, sharded=False, tensor=True),
)


def attention_flops() -> float:
    """Forward 4 L^2 D per block, backward twice and a half that: scores are made again."""
    return 3.5 * 4 * TOKENS**2 * WIDTH * (BLOCKS + CONTROL_BLOCKS)


def compute_seconds(per_clip: int) -> float:
    """One clip on `per_clip` GPUs."""
    factor = RECOMPUTATION if per_clip == 1 else 1.0
    flops = factor * (MATRICES + attention_flops())
    return flops / (per_clip * PEAK_FLOPS * COMPUTE_EFFICIENCY)


def inside_seconds(plan: Plan) -> float:
    """What the GPUs of a node send each other in one step, over NVLink."""
    share = (NODE - 1) / NODE
    sent = 0.0
    if plan.sharded:
        sent += 2 * WEIGHTS * BF16 * share + TRAINED * BF16 * share
    activation = TOKENS * WIDTH * BF16
    blocks = BLOCKS + CONTROL_BLOCKS
    if plan.per_clip > 1 and plan.tensor:
        # Gather before and scatter after each of three sublayers, forward and backward.
        sent += blocks * 3 * 2 * 2 * activation * share
    elif plan.per_clip > 1:
        # All-to-all of q, k, v and the output of self-attention, an eighth each, both ways.
        sent += blocks * 4 * 2 * activation / NODE * share
    return sent / (NVLINK * LINK_EFFICIENCY)


def between_seconds(plan: Plan, gpus: int) -> float:
    """The all-reduce of gradients between nodes, in two levels: a ring per local rank."""
    nodes = gpus // NODE
    if nodes <= 1:
        return 0.0
    sent = 2 * (nodes - 1) / nodes * TRAINED * BF16 / NODE
    return sent / (NETWORK * LINK_EFFICIENCY) + 2 * (nodes - 1) * LATENCY


def rows() -> Iterator[tuple[str, ...]]:
    """The table: a plan on a number of GPUs."""
    for plan in PLANS:
        for gpus in GPUS:
            compute, inside = compute_seconds(plan.per_clip), inside_seconds(plan)
            between = between_seconds(plan, gpus)
            share = compute / (compute + inside + between)
            clips = gpus // plan.per_clip
            yield (
                plan.name,
                f"{gpus:,}",
                f"{clips:,}",
                f"{compute:.2f}",
                f"{1e3 * inside:.0f}",
                f"{1e3 * between:.1f}",
                f"{share:.1%}",
            )


HEAD = (
    "layout",
    "GPUs",
    "clips per step",
    "compute, s",
    "inside nodes, ms",
    "between nodes, ms",
    "share of compute, nothing overlapped",
)

INTRODUCTION = f"""# Scaling, on paper

Written by `python -m bench.scaling`. **Every number on this page is predicted** from formulas;
nothing was run on these machines.

Assumed: nodes of {NODE} H100 SXM; {PEAK_FLOPS / 1e12:.0f} TFLOP/s dense bfloat16 of which
{COMPUTE_EFFICIENCY:.0%} are reached; NVLink {NVLINK / 1e9:.0f} GB/s per direction and
{NETWORK / 1e9:.0f} GB/s of network per GPU (the manufacturer's data sheets), of which
{LINK_EFFICIENCY:.0%} are reached; {1e6 * LATENCY:.0f} us per step of a ring between nodes.

One clip has {TOKENS:,} tokens; the network {WEIGHTS / 1e9:.1f} billion parameters, of which
{TRAINED / 1e9:.2f} billion (the control branch) are trained. A clip costs
{(MATRICES + attention_flops()) / 1e15:.1f} PFLOP (predicted), attention
{attention_flops() / (MATRICES + attention_flops()):.0%} of it. Layouts of one clip per GPU
recompute blocks, which makes it {RECOMPUTATION} times as much (assumed): without, they do not
fit 80 GB.
"""


def conclusions() -> str:
    """What the table means."""
    efficiency = [
        compute_seconds(NODE) / (compute_seconds(NODE) + between_seconds(PLANS[2], gpus))
        for gpus in GPUS
    ]
    return f"""
## Which layout when

- Gradients of {TRAINED / 1e9:.2f} billion parameters are sent for seconds of compute: the network
  between nodes takes under a hundredth of a step in every row (predicted).
- Choose by memory first (`python -m transfer1.plan`), then take the first row that fits: the whole
  model per GPU with block checkpointing; sharded in the node; frames over the node; matrices over
  the node, which sends the most.
- Frames (context parallelism) with sharded weights send
  {inside_seconds(PLANS[3]) / inside_seconds(PLANS[2]):.1f} times less than matrices with sequence
  parallelism (predicted), and spare recomputation.

## Where it stops

- The global batch grows with the GPUs: 4,096 clips per step at one clip per GPU, 512 at eight GPUs
  per clip. Beyond the batch that still helps learning, more GPUs only help by sharing a clip.
- Sharing a clip stops at the node: over the network of {NETWORK / 1e9:.0f} GB/s the same bytes take
  {NVLINK / NETWORK:.0f} times as long (predicted). Frames of a latent number 16, so context
  parallelism over frames stops at 16.
- The ring's latency grows with the nodes. At {GPUS[-1]:,} GPUs and eight per clip it leaves
  {efficiency[-1]:.1%} of the time to compute (predicted), {efficiency[1]:.1%} at {GPUS[1]}.
- Left out: stragglers, data loading, checkpoint writes, failures, and the overlap of communication
  with compute, which would hide most of what the table shows.
"""


def document() -> str:
    """The page."""
    lines = [
        INTRODUCTION,
        "## One step (predicted)\n",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
        *("| " + " | ".join(row) + " |" for row in rows()),
    ]
    return "\n".join(lines) + "\n" + conclusions()


if __name__ == "__main__":
    print(document(), end="")
