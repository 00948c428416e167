"""Multi-head attention with per-head normalised queries and keys.

Letters: B batch, L tokens, M context tokens, C context width, D width, N heads, K head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels import Ops

from .layers import EPS


class Attention(nn.Module):
    """Queries from the tokens, keys and values from a context; no bias, no mask, no dropout."""

    def __init__(self, width: int, context_dim: int, num_heads: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.num_heads = num_heads
        head_dim = width // num_heads
        # The indices inside the sequences are those of released checkpoints.
        self.to_q = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.RMSNorm(head_dim, eps=EPS)
        )
        self.to_k = nn.Sequential(
            nn.Linear(context_dim, width, bias=False), nn.RMSNorm(head_dim, eps=EPS)
        )
        self.to_v = nn.Sequential(nn.Linear(context_dim, width, bias=False))
        self.to_out = nn.Sequential(nn.Linear(width, width, bias=False))

    def forward(self, x_BLD: Tensor, context_BMC: Tensor, rope_2LR: Tensor | None) -> Tensor:
        """Return [B, L, D]; `rope_2LR` rotates queries and keys alike, None leaves them."""
        heads = (self.num_heads, -1)
        q_BLNK = self.to_q[0](x_BLD).unflatten(-1, heads)
        k_BMNK = self.to_k[0](context_BMC).unflatten(-1, heads)
        v_BMNK = self.to_v[0](context_BMC).unflatten(-1, heads)
        q_BLNK, k_BMNK = self.ops.qk_norm_rope(
            q_BLNK, k_BMNK, self.to_q[1].weight, self.to_k[1].weight, rope_2LR, EPS
        )
        return self.to_out(self.ops.attention(q_BLNK, k_BMNK, v_BMNK).flatten(2))
