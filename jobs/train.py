"""Train the network on Ray: one run, checkpoints, Parquet reports, and the test accuracy of the chosen epoch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from fashion import cli, config
from fashion.config import FaultConfig, ScaleConfig, TrainConfig, UserError

PROG = "python -m jobs.train"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `jobs.train`."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI (s3://, gs://, ...) that every node sees; holds data, runs and reports."""
    source: str = cli.DEFAULT_SOURCE
    """Where data comes from if the storage holds none yet; see jobs.prepare."""
    run_id: str = ""
    """Name of the run; made from preset and time if empty."""
    resume: bool = False
    """Continue --run-id from its latest checkpoint, with the settings that it was started with."""
    start_or_resume: bool = False
    """Continue --run-id if it was started, else start it: the same command for every try."""
    mlflow: str = ""
    """Address of an MLflow tracking server that gets each epoch as well, as in http://127.0.0.1:5000."""
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        if self.run_id:
            config.check_run_id(self.run_id)


def main(argv: Sequence[str]) -> None:
    """Parse the flags, train, print the result; exits with code 1 if the run fails."""
    default, resume = starting_point(argv)
    flags = cli.parse(Flags, argv, prog=PROG, description=__doc__ or "", default=default)
    from fashion.distributed import trainer
    from fashion.reports import console
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    run_id = flags.run_id or trainer.new_run_id(flags.train.preset)
    spec = trainer.RunSpec(
        run_id,
        flags.train,
        flags.scale,
        faults=flags.faults,
        source=flags.source,
        resume=resume,
        mlflow=flags.mlflow,
    )
    try:
        result = trainer.train(
            storage, spec, announce=lambda plan: console.print_plan("run", run_id, storage.uri, plan.lines())
        )
    except trainer.RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    console.print_result(result.run_id, result.row, result.paths, was_finished=result.was_finished)


def starting_point(argv: Sequence[str]) -> tuple[Flags, bool]:
    """Return the flags' default values, and whether to resume.

    The defaults are the settings of the run that resumes, or those of the preset. Raises `UserError` if the run to
    resume is not named or does not exist.
    """
    early = cli.peek(argv, "--preset", "--run-id", "--storage", "--resume", "--start-or-resume")
    resume_flag = next((name for name in ("--resume", "--start-or-resume") if early[name] is not None), None)
    if resume_flag:
        if not early["--run-id"]:
            raise UserError(f"{resume_flag} needs --run-id with the name of the run to continue")
        config.check_run_id(early["--run-id"])
        from fashion.reports import runs
        from fashion.storage import open_storage

        storage = open_storage(early["--storage"] or cli.DEFAULT_STORAGE)
        if resume_flag == "--resume" or runs.find_run(storage, early["--run-id"]) is not None:
            return Flags(train=runs.stored_config(storage, early["--run-id"])), True
    return Flags(train=config.preset(early["--preset"] or "default")), False


if __name__ == "__main__":
    cli.run(main, again=cli.RESUME)
