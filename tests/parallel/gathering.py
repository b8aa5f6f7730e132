"""A process that compares gathers and their gradients with lists of parts put together; started by test_collectives.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.collectives import gather


def main() -> None:
    dist.init_process_group("gloo")
    rank, size, name = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    for shape in [(3, 4, 5), (1, 4, 5), (1, 1, 5)]:  # with a leading 1 the parts are in order without a copy
        torch._dynamo.reset()  # each shape and dimension is compiled by itself, of which there are more than Dynamo allows
        for dim in range(3):
            parts = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(size)]
            whole = torch.cat(parts, dim)
            # What each rank's backward begins with is another, and a part's gradient is their sum.
            grads = [torch.randn(whole.shape, generator=torch.Generator().manual_seed(9 + i)) for i in range(size)]
            expected = sum(grads).chunk(size, dim)[rank]
            for how in (gather, compiled):
                part = parts[rank].clone().requires_grad_()
                found = how(part, dim, name)
                found.backward(grads[rank])
                assert torch.equal(found, whole), (shape, dim)
                torch.testing.assert_close(part.grad, expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
