"""The race: scikit-learn's logistic regression on the embeddings of a frozen timm net.

python benchmarks/race/logistic.py IMAGES.csv ROOT WEIGHTS ANSWERS.csv [--backbone tf_efficientnet_lite0] [--size 160]
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from race import Race, arguments
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main() -> None:
    options = arguments(__doc__)
    race = Race(options)
    net = timm.create_model(options.backbone, num_classes=0)
    net.load_state_dict({k: v for k, v in load_file(options.weights).items() if not k.startswith("classifier.")})
    net.eval()

    def embed(rows: list[dict[str, str]]) -> np.ndarray:
        batches = [rows[at : at + 32] for at in range(0, len(rows), 32)]
        with torch.inference_mode():
            return np.concatenate([net(torch.stack([race.view(row) for row in batch])).numpy() for batch in batches])

    learn = race.learn
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 9), cv=5, max_iter=500))
    model.fit(embed(learn), [row["label"] for row in learn])
    race.write(model.predict(embed(race.judge)))


if __name__ == "__main__":
    main()
