"""Train a classifier on JPEGs in WebDataset shards, straight from S3; stop it at any time and start it again.

    AWS_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... python examples/train_images.py

or `torchrun --nproc-per-node 8 examples/train_images.py`: the processes train one network, each on its own share of the
samples, and go on where they were stopped, also with another number of them. All processes of a node share one cache,
so each byte is fetched once a node. S3 is configured as for any other tool: by the AWS_* variables or a profile. What
to change for your own data is at the top. A sample is one member `KEY.jpg` and one `KEY.cls` (the label, as digits) in
a shard.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastload

# Settings -------------------------------------------------------------------------------------------------------------

shards = os.environ.get("SHARDS", "s3://bucket/imagenet/train-{000000..001023}.tar")
cache_dir = os.environ.get("FASTLOAD_CACHE", "/nvme/fastload")  # a folder on a local disk, best NVMe
class_count = int(os.environ.get("CLASSES", "1000"))
checkpoint_path = Path(os.environ.get("CHECKPOINT", "train_images.pt"))  # where all nodes see it
epochs = int(os.environ.get("EPOCHS", "3"))

image_size = 128
batch_size = 128  # of each process
learning_rate = 1e-3
seed = 0
save_every_s = 300.0

# Processes ------------------------------------------------------------------------------------------------------------

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
if "RANK" in os.environ:  # torchrun has started this
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
is_first = not dist.is_initialized() or dist.get_rank() == 0

# Data -----------------------------------------------------------------------------------------------------------------

cache = fastload.Cache(cache_dir)  # ram_bytes= and disk_bytes= limit what the node gives it
dataset = fastload.StreamingDataset(
    shards,
    cache=cache,
    shuffle=True,
    seed=seed,
    decode={"jpg": fastload.decode.image(size=image_size), "cls": fastload.decode.integer()},
    as_tuple=True,
)
loader: fastload.DataLoader[tuple[torch.Tensor, torch.Tensor]] = fastload.DataLoader(
    dataset, batch_size=batch_size, num_workers=4, pin_memory=device.type == "cuda"
)

# Network --------------------------------------------------------------------------------------------------------------


def stage(channels_in: int, channels_out: int) -> nn.Sequential:
    """A convolution that halves the picture."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


torch.manual_seed(seed)
network = nn.Sequential(
    stage(3, 32), stage(32, 64), stage(64, 128), stage(128, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)
network.append(nn.Linear(256, class_count))
network.to(device)
optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)

# Go on where the last run stopped: the loader's state is the exact next sample, in whichever epoch -------------------

first_epoch = 0
if checkpoint_path.exists():
    checkpoint = torch.load(checkpoint_path, map_location=device, weights_only=True)
    network.load_state_dict(checkpoint["network"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    loader.load_state_dict(checkpoint["loader"])
    first_epoch = checkpoint["loader"]["epoch"]
    if is_first:
        print(f"{checkpoint_path}: goes on in epoch {first_epoch} of {epochs}", flush=True)

trained = DistributedDataParallel(network) if dist.is_initialized() else network  # begins with rank 0's weights


def save() -> None:
    """Write a checkpoint, in full or not at all. The loader's state is the same on every rank."""
    part = checkpoint_path.with_suffix(".part")
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": loader.state_dict(),
    }
    torch.save(state, part)
    part.replace(checkpoint_path)


# Training -------------------------------------------------------------------------------------------------------------

saved_at = time.monotonic()
for epoch in range(first_epoch, epochs):
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = nn.functional.cross_entropy(trained(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        optimizer.step()
        if is_first and step % 50 == 0:
            print(f"epoch {epoch} step {step} loss {loss.item():.3f}", flush=True)
        if is_first and time.monotonic() - saved_at > save_every_s:
            save()
            saved_at = time.monotonic()
    if is_first:
        save()
        stats = loader.stats()  # of this process
        print(
            f"epoch {epoch}: {stats['samples'] / stats['elapsed_s']:.0f} samples/s; "
            f"RAM {stats['ram_share']:.0%}, disk {stats['disk_share']:.0%}, S3 {stats['remote_share']:.0%}; "
            f"waited {stats['wait_batch_s']:.1f} s for data",
            flush=True,
        )

loader.close()
cache.close()
if dist.is_initialized():
    dist.destroy_process_group()
