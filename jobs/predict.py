"""Predict the class of your own images, PNG or JPEG files or a Parquet column of them, with a trained network."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from fashion import cli
from fashion.config import ScaleConfig


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `jobs.predict`."""

    images: str
    """A file, a folder and all below it, or a glob in quotes, as path or URI: PNG and JPEG files, or Parquet files."""
    out: str
    """Folder or URI for the predictions, a row per image in Parquet files; what is there already is not done again."""
    run_id: str = ""
    """Name of the run whose network predicts; or use --model."""
    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that holds the run."""
    model: str = ""
    """Folder with a network that `jobs.evaluate --export` has written, in place of --run-id."""
    photo: bool = False
    """The images are photographs of garments on a light ground, of any size. Otherwise they are 28 x 28 pixels, bright
    clothing on black."""
    column: str = ""
    """Column of the Parquet files that holds the images; by default `image`, or the only one that can."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def main(argv: Sequence[str]) -> None:
    """Parse, predict what is not predicted yet, print the least certain."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.predict", description=__doc__ or "")
    from fashion.cluster.nodes import NodesNotUp
    from fashion.data.images import predictions as image_predictions
    from fashion.data.images.listing import list_images
    from fashion.inference import prediction
    from fashion.inference.classifier import find_model
    from fashion.reports import console
    from fashion.storage import open_storage

    files = find_model(flags.storage, flags.run_id, flags.model)
    out = open_storage(flags.out, "--out")
    listing = list_images(flags.images, flags.column)
    image_predictions.check_apart(listing, out)
    manifest = prediction.make_manifest(listing, files, flags.images, flags.run_id or flags.model, photo=flags.photo)
    missing = image_predictions.find_missing(out, manifest)
    print("\n".join(prediction.plan_lines(listing, manifest, missing, out)), flush=True)
    if missing:
        try:
            prediction.predict_missing(listing, files, out, missing, manifest=manifest, scale=flags.scale)
        except NodesNotUp as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
    summary = image_predictions.summarise(out, manifest.num_parts)
    image_predictions.check_complete(out, manifest, summary)
    console.print_image_predictions(
        summary.num_images, summary.num_unreadable, summary.unreadable, summary.least_certain
    )
    print(f"predictions: {out.uri}")


if __name__ == "__main__":
    cli.run(main)
