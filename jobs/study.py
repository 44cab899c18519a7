"""Run the ablation study: measures against overfitting beside a recipe without them, over the same seeds; resumable."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from fashion import cli, config
from fashion.ablation.parts import PARTS
from fashion.config import FaultConfig, ScaleConfig, require


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `jobs.study`."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI that every node sees; holds data, runs and reports."""
    source: str = cli.DEFAULT_SOURCE
    """Where data comes from if the storage holds none yet; see jobs.prepare."""
    study_id: str = "study"
    """Name of the study; the same name again continues with the runs that are missing."""
    parts: str = ",".join(PARTS)
    """Parts of the study to run, with commas between them."""
    seeds: int = 5
    """Runs per arm, with seeds 0, 1, ..., >= 1; differences are between runs of the same seed."""
    epochs: int = 0
    """Epochs of every run; 0 takes those of each part."""
    max_train_rows: int = 0
    """Training rows of every run; 0 takes all."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        config.check_run_id(self.study_id, "--study-id")
        require(self.seeds >= 1, f"--seeds {self.seeds} must be at least 1")
        require(self.epochs >= 0, f"--epochs {self.epochs} must be 0 (those of each part) or more")
        require(self.max_train_rows >= 0, f"--max-train-rows {self.max_train_rows} must be 0 (all) or more")
        unknown = [name for name in self.parts.split(",") if name not in PARTS]
        require(not unknown, f"--parts {','.join(unknown)} does not exist; known are {', '.join(PARTS)}")


def main(argv: Sequence[str]) -> None:
    """Parse, train the missing runs, print the rows of each part."""
    flags = cli.parse(Flags, argv, prog="python -m jobs.study", description=__doc__ or "")
    from fashion.ablation.study import Study, run_study
    from fashion.distributed import trainer
    from fashion.reports import console
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    study = Study(
        study_id=flags.study_id,
        parts={name: PARTS[name] for name in flags.parts.split(",")},
        seeds=flags.seeds,
        epochs=flags.epochs,
        max_train_rows=flags.max_train_rows,
    )
    try:
        for name, rows in run_study(
            storage,
            study,
            flags.scale,
            faults=flags.faults,
            source=flags.source,
            announce=lambda run_id, plan: console.print_plan("run", run_id, storage.uri, plan.lines()),
        ):
            console.print_study(name, rows)
    except trainer.RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        print("the study goes on by the same command", file=sys.stderr)
        sys.exit(1)
    print(f"reports: {storage.show('reports', 'study')}")


if __name__ == "__main__":
    cli.run(main)
