"""The race: fastai's `fine_tune` with its defaults, for as many epochs as fit.

python benchmarks/race/fastai_tune.py IMAGES.csv ROOT WEIGHTS ANSWERS.csv
"""

from __future__ import annotations

import time

import pandas
import torch
from fastai.vision.all import (
    ImageDataLoaders,
    Normalize,
    RandomResizedCrop,
    aug_transforms,
    vision_learner,
)
from race import Race, arguments
from safetensors.torch import load_file


def main() -> None:
    options = arguments(__doc__)
    race = Race(options)
    torch.manual_seed(options.seed)
    table = pandas.DataFrame(race.learn)
    loaders = ImageDataLoaders.from_df(
        table, path=options.root, fn_col="path", label_col="label", valid_pct=0.02, seed=options.seed, bs=32, num_workers=0,
        item_tfms=RandomResizedCrop(options.size, min_scale=0.35),
        batch_tfms=[*aug_transforms(), Normalize.from_stats([0.5] * 3, [0.5] * 3, cuda=False)],
    )  # fmt: skip
    learner = vision_learner(loaders, options.backbone, pretrained=False, normalize=False)
    state = {k: v for k, v in load_file(options.weights).items() if not k.startswith("classifier.")}
    missing = learner.model[0].model.load_state_dict(state, strict=False)
    assert not missing.missing_keys, missing
    learner.freeze()
    began = time.monotonic()
    learner.fit_one_cycle(1, 2e-3)  # the epoch that fine_tune trains the head for; it tells what one costs
    epochs = max(1, int((race.left - 60) / (1.6 * (time.monotonic() - began))))
    learner.unfreeze()
    learner.fit_one_cycle(epochs, slice(1e-3 / 100, 1e-3), pct_start=0.3, div=5.0)  # as fine_tune does it
    answers = loaders.test_dl(pandas.DataFrame(race.judge), bs=32)
    predicted, _ = learner.get_preds(dl=answers)
    race.write([loaders.vocab[k] for k in predicted.argmax(1).tolist()])


if __name__ == "__main__":
    main()
