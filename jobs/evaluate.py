"""Evaluate a run's chosen checkpoint on a split: predictions, metrics per class, and the confusion matrix."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fashion import cli, config
from fashion.config import ScaleConfig


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `jobs.evaluate`."""

    run_id: str
    """Name of the run."""
    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that holds the run."""
    split: Literal["train", "val", "test"] = "test"
    """Rows to classify."""
    export: str = ""
    """New folder for the network as a program that runs without this project, with its weights and a model card."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate the checkpoint, print its results; export it if asked to."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.evaluate", description=__doc__ or "")
    config.check_run_id(flags.run_id)
    from fashion.cluster import connection
    from fashion.cluster.nodes import NodesNotUp, wait_for_room
    from fashion.cluster.plan import make_plan
    from fashion.data.manifest import load_manifest
    from fashion.inference import classifier, evaluation, export
    from fashion.reports import console, runs, schemas, tables
    from fashion.storage import open_storage

    destination = export.check_destination(flags.export) if flags.export else None
    storage = open_storage(flags.storage)
    manifest = load_manifest(storage)
    row = runs.load_run(storage, flags.run_id)
    tables.open_reports(storage)
    train_config = classifier.check_run(storage, flags.run_id, row)
    connection.connect()
    try:
        plan = wait_for_room(lambda: make_plan(train_config, flags.scale, manifest), flags.scale.wait_for_nodes_s)
    except NodesNotUp as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    scores = evaluation.evaluate_run(storage, flags.run_id, row, split=flags.split, plan=plan)
    classes = [each for each in tables.read_table(storage, "classes", flags.run_id) if each["split"] == flags.split]
    console.print_classes(classes)
    print(f"{flags.split}: {scores.num_rows} rows, accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}")
    print(f"reports: {storage.show(schemas.REPORTS_FOLDER)}")
    if destination is not None:
        export.export(storage, flags.run_id, row, {flags.split: scores}, destination)
        print(f"exported: {destination}")


if __name__ == "__main__":
    cli.run(main)
