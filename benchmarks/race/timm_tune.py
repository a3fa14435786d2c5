"""The race: timm's own parts as its train.py puts them together (the script is not in the package), for as many epochs as fit.

python benchmarks/race/timm_tune.py IMAGES.csv ROOT WEIGHTS ANSWERS.csv

Settings: train.py's defaults but for those that its documents give for fine-tuning (AdamW, a warm-up, an average of the weights):
random crops, flips, colour jitter 0.4, label smoothing 0.1, cosine, all layers, batch statistics.
"""

from __future__ import annotations

import time

import timm
import torch
from race import Race, arguments
from safetensors.torch import load_file
from timm.data import create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

BATCH, LR = 32, 5e-4


def main() -> None:
    options = arguments(__doc__)
    race = Race(options)
    torch.manual_seed(options.seed)
    net = timm.create_model(options.backbone, num_classes=len(race.classes))
    state = {key: value for key, value in load_file(options.weights).items() if not key.startswith("classifier")}
    net.load_state_dict(state, strict=False)
    net = net.to(memory_format=torch.channels_last)
    augment = create_transform(options.size, is_training=True, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    number = {name: at for at, name in enumerate(race.classes)}
    average, optimizer = ModelEmaV3(net, decay=0.98), create_optimizer_v2(net, opt="adamw", lr=LR, weight_decay=0.05)
    criterion = LabelSmoothingCrossEntropy(0.1)
    scheduler, epochs, epoch = None, 0, 0
    while epoch < max(1, epochs):
        began = time.monotonic()
        net.train()
        order = torch.randperm(len(race.learn)).tolist()
        steps = len(order) // BATCH
        for step in range(steps):
            rows = [race.learn[at] for at in order[step * BATCH : (step + 1) * BATCH]]
            x = torch.stack([augment(race.picture(row)) for row in rows]).to(memory_format=torch.channels_last)
            loss = criterion(net(x), torch.tensor([number[row["label"]] for row in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(net)
            if scheduler is None:  # the first steps warm up, and tell how many epochs fit
                if step == 9:
                    seconds = (time.monotonic() - began) / 10 * steps
                    epochs = max(1, int((race.left - 60) / (1.05 * seconds)))
                    scheduler, _ = create_scheduler_v2(
                        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1 if epochs > 4 else 0, warmup_lr=1e-5,
                        updates_per_epoch=steps, step_on_epochs=False,
                    )  # fmt: skip
            else:
                scheduler.step_update(epoch * steps + step)
        epoch += 1
        print(f"epoch {epoch} of {epochs}: loss {loss.item():.3f}", flush=True)
    chosen = average.module.eval()
    answers = []
    with torch.inference_mode():
        for at in range(0, len(race.judge), BATCH):
            x = torch.stack([race.view(row) for row in race.judge[at : at + BATCH]])
            answers += [race.classes[k] for k in chosen(x).argmax(1).tolist()]
    race.write(answers)


if __name__ == "__main__":
    main()
