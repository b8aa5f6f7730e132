"""Muon for the matrices of the blocks and AdamW for all other parameters, as one optimizer.

`torch.optim.Muon` is used as it is, on DTensors: momentum and weight decay are elementwise, and in the Newton-Schulz
iteration every product is one of DTensors, so that the whole matrix is orthogonalised wherever its shards lie. The
iteration runs in bfloat16 and sums in another order on another layout: updates then differ by up to 2% (relative, in the
Frobenius norm), which is as far as the iteration's own rounding is from exact arithmetic (1.2%).

Cost, for a matrix of m x n numbers, m <= n, over S shards:

- compute: five iterations of 4 m^2 n + 2 m^3 FLOPs, at most 30 m per parameter (a token's forward and backward: 6). The
  work is divided over the shards, but for the 2 m^3 of a matrix with more rows than columns; replicas each do all of it.
- communication inside the iteration, not overlapped: with at most as many rows as columns three gathers per iteration, in
  all 20 to 30 bytes received per parameter; with more rows than columns two sums of m x m numbers per iteration.
- memory: one float32 momentum per parameter, where AdamW has two moments; gathered matrices one at a time.
"""

from __future__ import annotations

from collections import defaultdict

from torch.optim import Muon, Optimizer

ADJUST_LR = "match_rms_adamw"
"""Updates of the size of AdamW's, 0.2 per number (Liu et al., arXiv 2502.16982, section 2.2): one rate serves both."""


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer: one list of groups, one state."""

    def __init__(self, muon: Muon, adamw: Optimizer):
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = (muon, adamw)
        muon.param_groups = self.param_groups[: len(muon.param_groups)]
        adamw.param_groups = self.param_groups[len(muon.param_groups) :]
        self.state: dict = defaultdict(dict)
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:
        assert closure is None
        for part in self._parts:
            part.step()
