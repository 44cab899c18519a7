"""The parts of the study: sets of arms that differ in one thing. Imports the standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison. The first arm is the baseline of the others."""

    preset: str
    """Recipe that all arms start from."""
    settings: Mapping[str, Mapping[str, Any]]
    """For each arm, by name, the settings that differ from the preset."""
    epochs: int = 0
    """Epochs of every run; 0 takes those of the preset."""


PARTS: dict[str, Part] = {
    # The article's recipe, for enough epochs to see val loss rise, which the article reports from epoch 10 on.
    "seed": Part(preset="seed", settings={"seed": {}}, epochs=12),
    # The article's four proposals against overfitting: dropout, learning rate, depth, padding. The first two start from
    # its own recipe, which is the one that overfits.
    "dropout": Part(
        preset="seed",
        epochs=12,
        settings={
            "published": {},
            "less": {"dropout_conv": 0.1, "dropout_fc": 0.25},
            "more": {"dropout_conv": 0.35, "dropout_fc": 0.65},
        },
    ),
    "lr": Part(
        preset="seed",
        epochs=12,
        settings={"published": {}, "third": {"lr": 3e-4}, "tenth": {"lr": 1e-4}, "falling": {"schedule": "one-cycle"}},
    ),
    "depth": Part(
        preset="default", settings={"vgg": {}, "deep": {"depth": "deep"}, "deep-bn": {"depth": "deep-bn"}}, epochs=8
    ),
    "padding": Part(
        preset="default",
        epochs=8,
        settings={
            "zeros": {},
            "replicate": {"padding": "replicate"},
            "reflect": {"padding": "reflect"},
            "partial": {"padding": "partial"},
            "learned": {"padding": "learned"},
        },
    ),
    # Measures that the article does not name.
    "augmentation": Part(
        preset="default",
        epochs=8,
        settings={
            "none": {"flip": "none"},
            "flip": {"flip": "random"},
            "alternating": {"flip": "alternating"},
            "flip-shift": {"flip": "random", "shift": 1},
            "flip-erase": {"flip": "random", "erase": 0.25},
        },
    ),
    "smoothing": Part(
        preset="default",
        epochs=8,
        settings={"none": {"label_smoothing": 0.0}, "5": {"label_smoothing": 0.05}, "10": {"label_smoothing": 0.1}},
    ),
    "ema": Part(preset="default", settings={"none": {}, "999": {"ema_decay": 0.999}}, epochs=8),
    "tta": Part(preset="default", settings={"none": {}, "flip": {"tta": "flip"}}, epochs=8),
    # The recipes that resulted from the study.
    "best": Part(preset="best", settings={"best": {}}),
    "best-deep": Part(preset="best-deep", settings={"best-deep": {}}),
}
