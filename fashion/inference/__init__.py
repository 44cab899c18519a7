"""Uses of a trained network: evaluation on a split, prediction on a user's images, and export.

`from fashion.inference import Classifier, read_image` loads what these two need when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashion.inference.classifier import Classifier as Classifier
    from fashion.inference.classifier import read_image as read_image


def __getattr__(name: str) -> Any:
    """Return `Classifier` or `read_image`; their module loads torch, which importing this package must not."""
    if name not in ("Classifier", "read_image"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from fashion.inference import classifier

    return getattr(classifier, name)
