"""A reference program: the published recipe in Keras, a `Sequential` network of the same layers, `fit`, Adam, fp32.

    python -m fashion.bench.reference_keras --storage DIR [--until 0.9304 --max-seconds 3600]

With `--until` the program trains on all 60,000 rows until the test accuracy is reached, and prints a line per epoch.
Otherwise it reads requests from its standard input; see `fashion.bench.reference_process`. Keras and TensorFlow are the
dependency group `keras`; no other module imports them.
"""

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fashion.bench import reference_process
from fashion.config import IMAGE_SIZE, NUM_CLASSES, preset
from fashion.data.loading import load_split
from fashion.data.manifest import load_manifest
from fashion.data.rows import joined
from fashion.storage import Storage, open_storage

NUM_PARAMETERS = 7_001_194  # as model.network.NUM_PARAMETERS, whose import would load torch
ACCURACY = "test accuracy: "


def compiled_network() -> Any:
    """Return the published network with its assumed dropout (preset `seed`), compiled with Adam at 1e-3."""
    import keras
    from keras import layers

    recipe = preset("seed")

    def conv(width: int) -> Any:
        return layers.Conv2D(width, 3, padding="same", activation="relu")

    model = keras.Sequential(
        [
            keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1)),
            *(conv(32), conv(32), layers.Dropout(recipe.dropout_conv)),
            *(conv(64), layers.MaxPooling2D(), layers.Dropout(recipe.dropout_conv)),
            *(conv(128), conv(128), conv(256), layers.MaxPooling2D(), layers.Dropout(recipe.dropout_conv)),
            layers.Flatten(),
            *(layers.Dense(512, activation="relu"), layers.Dropout(recipe.dropout_fc)),
            *(layers.Dense(64, activation="relu"), layers.Dropout(recipe.dropout_fc)),
            layers.Dense(NUM_CLASSES, activation="softmax"),
        ]
    )
    assert model.count_params() == NUM_PARAMETERS, model.count_params()
    optimizer = keras.optimizers.Adam(learning_rate=recipe.lr)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def rows_of(storage: Storage, *splits: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return the images (N, 28, 28, 1) float32 in 0..1 and the labels (N,) uint8 of `splits` together."""
    manifest = load_manifest(storage)
    rows = joined(*(load_split(storage, manifest, split) for split in splits))
    return (rows.images[..., np.newaxis] / np.float32(255)).astype(np.float32), rows.labels


def respond_to_requests(model: Any, storage: Storage, batch_size: int) -> None:
    """Respond to each request with the images/s of one `fit`, timed from the begin of its epoch to its end."""
    import keras

    images, labels = rows_of(storage, "train")
    moments: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: moments.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: moments.append(time.perf_counter()),
    )
    for steps in reference_process.requests():
        chosen = np.random.default_rng(len(moments)).permutation(len(labels))[: steps * batch_size]
        model.fit(images[chosen], labels[chosen], batch_size=batch_size, verbose=0, callbacks=[clock])
        reference_process.respond(len(chosen) / (moments[-1] - moments[-2]))


def train_until(model: Any, storage: Storage, batch_size: int, accuracy: float, max_seconds: float) -> None:
    """Train until the test accuracy is at least `accuracy`, or `max_seconds` have passed; print it after each epoch."""
    started = time.perf_counter()
    images, labels = rows_of(storage, "train", "val")
    test = rows_of(storage, "test")
    reached = 0.0
    while reached < accuracy and time.perf_counter() - started < max_seconds:
        model.fit(images, labels, batch_size=batch_size, verbose=0)
        _, reached = model.evaluate(*test, batch_size=500, verbose=0)
        print(f"{ACCURACY}{reached}", flush=True)


def main() -> None:
    """Parse, build the network, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--until", type=float, default=0.0, help="test accuracy to train for, in 0..1")
    parser.add_argument("--max-seconds", type=float, default=3600.0, help="no epoch begins after so long")
    flags = parser.parse_args()
    model, storage = compiled_network(), open_storage(flags.storage)
    if flags.until:
        train_until(model, storage, flags.batch_size, flags.until, flags.max_seconds)
    else:
        respond_to_requests(model, storage, flags.batch_size)


if __name__ == "__main__":
    main()
