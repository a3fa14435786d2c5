"""Trains a classifier with torch, timm and torchvision alone, and exports it by torch's older exporter: a file as other programs
leave it, for `fgvc improve`. Its labels lie beside it, how it is fed does not.

python benchmarks/improve/deployed.py leaves/ start.safetensors deployed/model.onnx [--epochs 12] [--size 160] [--seed 0]

The recipe is a usual one: random crops, flips and colours, SGD with a cosine, label smoothing, batch statistics; the last epoch.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

MEAN = STD = (0.5, 0.5, 0.5)
LR = 0.03


def trained(options: argparse.Namespace, images: ImageFolder) -> torch.nn.Module:
    """The net after the last epoch, in eval mode."""
    net = timm.create_model(options.backbone, num_classes=len(images.classes))
    state = {key: value for key, value in load_file(options.weights).items() if not key.startswith("classifier")}
    net.load_state_dict(state, strict=False)
    net = net.to(memory_format=torch.channels_last).train()
    loader = torch.utils.data.DataLoader(images, 32, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(net, opt="sgd", lr=LR, momentum=0.9, weight_decay=1e-4, filter_bias_and_bn=True)
    criterion, warm, step = LabelSmoothingCrossEntropy(0.1), len(loader), 0
    total = options.epochs * len(loader)
    for epoch in range(options.epochs):
        for x, y in loader:
            rising, falling = (step + 1) / warm, (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2
            for group in optimizer.param_groups:
                group["lr"] = LR * (rising if step < warm else falling)
            loss = criterion(net(x.to(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}", flush=True)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="A classifier's file as other programs leave it.")
    parser.add_argument("data", type=Path, help="a folder with train/, and test/, of class folders")
    parser.add_argument("weights", type=Path, help=".safetensors of the backbone")
    parser.add_argument("out", type=Path, help="the .onnx file")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    size, normalise = options.size, [T.ToTensor(), T.Normalize(MEAN, STD)]
    random = [
        T.RandomResizedCrop(size, (0.35, 1.0), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
    ]
    fixed = [T.Resize(int(size / 0.875), interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(size)]
    train = ImageFolder(options.data / "train", T.Compose([*random, T.ColorJitter(0.2, 0.2, 0.2), *normalise]))
    test = ImageFolder(options.data / "test", T.Compose([*fixed, *normalise]))
    net = trained(options, train)
    with torch.inference_mode():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in torch.utils.data.DataLoader(test, 64))
    print(f"test: {100 * right / len(test):.2f} % of {len(test)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter says that it is old
        torch.onnx.export(
            net.to(memory_format=torch.contiguous_format), (torch.zeros(1, 3, size, size),), str(options.out), dynamo=False,
            input_names=["images"], output_names=["scores"], dynamic_axes={"images": {0: "n"}, "scores": {0: "n"}},
        )  # fmt: skip
    options.out.with_name("labels.txt").write_text("".join(f"{name}\n" for name in train.classes), encoding="utf-8")


if __name__ == "__main__":
    main()
