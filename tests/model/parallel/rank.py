"""One rank of a test's process group: computes the logits of some ids, rank 0 saves them."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.attention.attend import PackedAttend
from model.attention.interface import PackedLayout
from model.attention.reference import ReferenceAttention
from model.checkpoint import load_network


def main(folder: str, scratch: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=size)
    network = load_network(Path(folder), rank=rank, num_ranks=size)
    ids = torch.load(f"{scratch}/ids.pt")
    layout = PackedLayout(starts=torch.tensor([0, len(ids)], dtype=torch.int32), max_len=len(ids))
    with torch.inference_mode():
        hidden = network(ids, torch.arange(len(ids)), PackedAttend(layout, ReferenceAttention()))
        logits = network.logits(hidden)
    if rank == 0:
        torch.save(logits, f"{scratch}/logits.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
