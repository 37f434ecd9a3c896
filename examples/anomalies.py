"""Finds malignant tumours (scikit-learn's breast cancer data) as what an autoencoder of benign ones cannot restore.

python examples/anomalies.py [--short] [--threads 1] [--output anomalies.png]
"""

import argparse

import numpy as np
import torch
from common import GREY, OURS, STOCK, Rows, arguments, draw_losses, figure, predict_both, save, train_both
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn


def autoencoder(features: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(features, 20), nn.ELU(), nn.Linear(20, 8), nn.ELU()),
        *(nn.Linear(8, 20), nn.ELU(), nn.Linear(20, features)),
    )


def main() -> None:
    given = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), "anomalies.png")
    data = load_breast_cancer()
    is_malignant = data.target == 0
    benign = np.flatnonzero(~is_malignant)
    train = torch.randperm(len(benign))[:200].numpy()
    seen = np.zeros(len(is_malignant), dtype=bool)
    seen[benign[train]] = True
    mean, deviation = data.data[seen].mean(0), data.data[seen].std(0)
    scaled = ((data.data - mean) / deviation).astype(np.float32)
    rows, rest = torch.from_numpy(scaled[seen]), torch.from_numpy(scaled[~seen])

    epochs = [Rows(rows, rows, 40)] * (60 if given.short else 400)
    stock, ours = train_both(autoencoder(rows.shape[1]), nn.MSELoss(), epochs, lr=3e-3)
    errors = (predict_both(ours.model, rest) - rest).square().mean(1).numpy()
    pca = PCA(8).fit(scaled[seen])
    linear = ((pca.inverse_transform(pca.transform(scaled[~seen])) - scaled[~seen]) ** 2).mean(1)

    truth = is_malignant[~seen]
    areas = {"autoencoder": roc_auc_score(truth, errors), "PCA": roc_auc_score(truth, linear)}
    print(f"area under the ROC curve: {', '.join(f'{name} {area:.3f}' for name, area in areas.items())}")
    assert areas["autoencoder"] > 0.85

    drawing, (left, right) = figure(2)
    draw_losses(left, stock, ours)
    for (name, area), scores, color in zip(areas.items(), (errors, linear), (OURS, STOCK), strict=True):
        false, true, _ = roc_curve(truth, scores)
        right.plot(false, true, color=color, label=f"{name}, area {area:.3f}")
    right.plot([0, 1], [0, 1], ":", color=GREY, linewidth=0.8)
    right.set(xlabel="benign called malignant", ylabel="malignant found", title="8 numbers a tumour")
    right.legend(frameon=False, labelcolor=GREY, loc="lower right")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
