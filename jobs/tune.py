"""Search learning rate, dropout and more on Ray: many trials, poor ones stopped early by ASHA, the winner refitted."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from fashion import cli, config
from fashion.config import TrainConfig, UserError
from fashion.search.space import SearchConfig, SearchScale

PROG = "python -m jobs.tune"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `jobs.tune` takes."""

    storage: str = cli.DEFAULT_STORAGE
    """Local folder or URI (s3://, gs://, ...) that every node sees; holds data, searches and reports."""
    source: str = cli.DEFAULT_SOURCE
    """Where data comes from if the storage holds none yet; see jobs.prepare."""
    search_id: str = ""
    """Name of the search; made from the time if empty."""
    resume: bool = False
    """Continue --search-id, with the settings that it was started with."""
    start_or_resume: bool = False
    """Continue --search-id if it was started, else start it: the same command for every try."""
    refit: bool = False
    """Afterwards train the winner on all 60,000 rows and evaluate it once on test."""
    mlflow: str = ""
    """Address of an MLflow tracking server that is told each epoch as well, as in http://127.0.0.1:5000."""
    preset: str = "default"
    """Recipe that gives the settings which are not searched."""
    global_batch_size: int = TrainConfig.global_batch_size
    """Rows per optimizer step, >= 1."""
    max_train_rows: int = 0
    """Train trials on this many rows only, a seeded random subset; 0 takes all."""
    precision: config.Precision = "auto"
    """Arithmetic of the forward and backward pass; auto takes bf16 where the hardware has it natively."""
    deterministic: bool = False
    """Take kernels of a GPU that repeat their bits, and fail where there are none; CPUs repeat theirs anyway."""
    cuda_graph: bool = False
    """On a GPU, record a training step as a CUDA graph and replay it."""
    space: SearchConfig = field(default_factory=SearchConfig)
    scale: SearchScale = field(default_factory=SearchScale)

    def __post_init__(self) -> None:
        if self.search_id:
            config.check_run_id(self.search_id, name="--search-id")

    def base(self) -> TrainConfig:
        """Return the settings that are not searched."""
        return replace(
            config.preset(self.preset),
            global_batch_size=self.global_batch_size,
            max_train_rows=self.max_train_rows,
            precision=self.precision,
            deterministic=self.deterministic,
            cuda_graph=self.cuda_graph,
        )


def main(argv: Sequence[str]) -> None:
    """Parse, search, print the result."""
    default, goes_on = starting_point(argv)
    flags = cli.parse(Flags, argv, prog=PROG, description=__doc__ or "", default=default)
    search_id = flags.search_id or f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    base = flags.base()
    from fashion.reports import console
    from fashion.search import search
    from fashion.storage import open_storage

    storage = open_storage(flags.storage)
    try:
        found = search.search(
            storage,
            search_id,
            flags.space,
            base,
            flags.scale,
            options=search.SearchOptions(source=flags.source, resume=goes_on, refit=flags.refit, mlflow=flags.mlflow),
            announce=lambda plan: console.print_plan("search", search_id, storage.uri, plan.lines()),
        )
    except search.SearchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; continue with --search-id {search_id} --resume", file=sys.stderr)
        sys.exit(1)
    if found.was_finished:
        print(f"search {search_id} is finished already; nothing to do")
    console.print_trials(search_id, flags.space.searched(), found.rows(), flags.space.max_epochs)
    console.print_findings(found.findings)
    if found.refit is not None:
        refit = found.refit
        console.print_result(refit.run_id, refit.row, refit.paths, was_finished=refit.was_finished)
    print(f"search: {storage.show('searches', search_id)}\nreports: {storage.show('reports', 'trials')}")


def starting_point(argv: Sequence[str]) -> tuple[Flags, bool]:
    """Return what the flags override, the preset or the settings of the search that goes on, and whether one does."""
    early = cli.peek(argv, "--preset", "--search-id", "--storage", "--resume", "--start-or-resume")
    asked = next((name for name in ("--resume", "--start-or-resume") if early[name] is not None), None)
    if asked:
        if not early["--search-id"]:
            raise UserError(f"{asked} needs --search-id with the name of the search to continue")
        config.check_run_id(early["--search-id"], name="--search-id")
        from fashion.search import stored_settings
        from fashion.storage import open_storage

        storage = open_storage(early["--storage"] or cli.DEFAULT_STORAGE)
        if asked == "--resume" or storage.exists(*stored_settings.settings_place(early["--search-id"])):
            return of_stored(*stored_settings.stored_settings(storage, early["--search-id"])), True
    preset = config.preset(early["--preset"] or "default")
    return Flags(global_batch_size=preset.global_batch_size, max_train_rows=preset.max_train_rows), False


def of_stored(space: SearchConfig, base: TrainConfig) -> Flags:
    """Return the flags that a search was started with."""
    return Flags(
        preset=base.preset,
        global_batch_size=base.global_batch_size,
        max_train_rows=base.max_train_rows,
        precision=base.precision,
        deterministic=base.deterministic,
        cuda_graph=base.cuda_graph,
        space=space,
    )


if __name__ == "__main__":
    cli.run(main, again=cli.RESUME)
