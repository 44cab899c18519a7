"""Train the network on Ray: one run, checkpoints, Parquet reports, and the test accuracy of the chosen epoch."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fashion import cli, config
from fashion.config import ScaleConfig, TrainConfig, UserError

PROG = "python -m jobs.train"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `jobs.train` takes."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI (s3://, gs://, ...) that every node sees; holds data, runs and reports."""
    source: str = os.environ.get("FASHION_MNIST_SOURCE", "auto")
    """Where data comes from if the storage holds none yet; see jobs.prepare."""
    run_id: str = ""
    """Name of the run; made from preset and time if empty."""
    resume: bool = False
    """Continue --run-id from its latest checkpoint, with the settings that it was started with."""
    mlflow: str = ""
    """Address of an MLflow tracking server that is told each epoch as well, as in http://127.0.0.1:5000."""
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        if self.run_id:
            config.check_run_id(self.run_id)


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the result."""
    flags = cli.parse(Flags, argv, prog=PROG, description=__doc__ or "", default=starting_point(argv))
    from fashion import summary, trainer
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    run_id = flags.run_id or trainer.new_run_id(flags.train.preset)
    try:
        done = trainer.train(
            storage,
            run_id,
            flags.train,
            flags.scale,
            source=flags.source,
            resume=flags.resume,
            mlflow=flags.mlflow,
            announce=lambda plan: summary.print_plan(run_id, storage.uri, plan),
        )
    except trainer.RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    summary.print_result(done.run_id, done.row, done.paths, was_finished=done.was_finished)


def starting_point(argv: Sequence[str]) -> Flags:
    """Return the defaults that the flags override: the preset's, or with `--resume` the stored run's."""
    early = cli.peek(argv, "--preset", "--run-id", "--storage", "--resume")
    if early["--resume"] is None:
        return Flags(train=config.preset(early["--preset"] or "default"))
    if not early["--run-id"]:
        raise UserError("--resume needs --run-id with the name of the run to continue")
    config.check_run_id(early["--run-id"])
    from fashion import report
    from fashion.storage import open_storage

    storage = open_storage(early["--storage"] or cli.DEFAULT_STORAGE)
    stored = report.stored_config(storage, early["--run-id"])
    return replace(Flags(), train=stored)


if __name__ == "__main__":
    cli.run(main)
