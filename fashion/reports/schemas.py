"""The schema of each table of the reports, and the names of the storage's folders for reports, runs and searches."""

import pyarrow as pa

SCHEMA_VERSION = 1
REPORTS_FOLDER = "reports"
RUNS_FOLDER = "runs"
SEARCHES_FOLDER = "searches"

_TIME = pa.timestamp("us", tz="UTC")

RUN_ID = pa.field("run_id", pa.string())
"""The first column of every file of the reports, in addition to those of its table."""

# Losses are nats per row, accuracies are fractions in 0..1, times are seconds, and epochs count from 1.
SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        [
            ("kind", pa.string()),  # train, trial, refit or study
            ("search_id", pa.string()),
            ("status", pa.string()),  # running, completed, diverged, failed or interrupted
            ("error", pa.string()),
            ("started_at", _TIME),
            ("finished_at", _TIME),
            ("wall_s", pa.float64()),
            ("dataset", pa.string()),
            ("dataset_sha256", pa.string()),
            ("source_hash", pa.string()),
            ("preset", pa.string()),
            ("config_json", pa.string()),
            ("num_parameters", pa.int64()),
            ("world_size", pa.int32()),
            ("device", pa.string()),
            ("precision", pa.string()),
            ("threads_per_worker", pa.int32()),
            ("exchange", pa.string()),  # how ranks exchange gradients: none, shared memory, gloo or nccl
            ("data_mode", pa.string()),
            ("epochs_done", pa.int32()),
            ("best_epoch", pa.int32()),
            ("train_loss", pa.float64()),
            ("train_accuracy", pa.float64()),
            ("val_loss", pa.float64()),
            ("val_accuracy", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_accuracy", pa.float64()),
            ("test_rows", pa.int64()),
            ("images_per_s", pa.float64()),
            ("peak_memory_bytes", pa.int64()),  # of the largest worker
            ("peak_gpu_memory_bytes", pa.int64()),  # the same of GPUs; null on CPUs
            ("checkpoint", pa.string()),  # folder of the chosen one, relative to the storage
            ("resumed_from", pa.int32()),  # epoch after which the run was last resumed; null if it never was
            ("hardware", pa.string()),  # of the workers' machines
            ("ray_version", pa.string()),
            ("torch_version", pa.string()),
        ]
    ),
    "epochs": pa.schema(
        [
            ("epoch", pa.int32()),
            ("split", pa.string()),
            ("loss", pa.float64()),
            ("accuracy", pa.float64()),
            ("rows", pa.int64()),
            ("lr", pa.float64()),
            ("epoch_time_s", pa.float64()),
            ("data_wait_s", pa.float64()),
            ("images_per_s", pa.float64()),
        ]
    ),
    "trials": pa.schema(
        [
            ("search_id", pa.string()),
            ("trial_id", pa.string()),  # t0000, t0001, ... in the order in which they were sampled
            ("status", pa.string()),  # running, completed, stopped, diverged or error
            ("error", pa.string()),
            ("lr", pa.float64()),
            ("dropout_conv", pa.float64()),
            ("dropout_fc", pa.float64()),
            ("weight_decay", pa.float64()),
            ("label_smoothing", pa.float64()),
            ("padding", pa.string()),
            ("depth", pa.string()),
            ("settings_json", pa.string()),  # all sampled settings
            ("max_epochs", pa.int32()),
            ("epochs_done", pa.int32()),
            ("rung", pa.int32()),  # epoch of the last ASHA rung that the trial reached; null before the first
            ("best_epoch", pa.int32()),
            ("val_loss", pa.float64()),  # of the best epoch
            ("val_accuracy", pa.float64()),
            ("last_val_accuracy", pa.float64()),
            ("wall_s", pa.float64()),  # including what was trained before a resume
        ]
    ),
    # What a search found: one row for each setting that it drew. Values and ranges are in the setting's own unit, drops
    # and effects are fractions of accuracy. What could not be estimated is null.
    "importance": pa.schema(
        [
            ("search_id", pa.string()),
            ("setting", pa.string()),
            ("importance", pa.float64()),  # share of what sets the best trials apart; all settings' shares sum to 1
            ("method", pa.string()),  # ped-anova
            ("p", pa.float64()),  # of best and other trials having the same values by chance
            ("trials", pa.int32()),  # ranked, by their best val accuracy, and among them:
            ("best_trials", pa.int32()),
            ("stopped_trials", pa.int32()),  # trained for fewer epochs
            ("diverged_trials", pa.int32()),  # ranked last
            ("best_low", pa.float64()),  # values of the best trials; null for choices, as all values below
            ("best_high", pa.float64()),
            ("first_third", pa.float64()),  # values that cut the trials into thirds
            ("second_third", pa.float64()),
            ("epoch", pa.int32()),  # the last that all trials reached; effects compare the best accuracy up to it
            ("effect_trials", pa.int32()),  # without the diverged ones
            ("effect", pa.float64()),  # from `effect_from` to `effect_to`: of thirds, or of choices
            ("effect_low", pa.float64()),  # its 95 % interval
            ("effect_high", pa.float64()),
            ("effect_from", pa.string()),
            ("effect_to", pa.string()),
            ("low_accuracy", pa.float64()),  # estimated means of the three thirds
            ("middle_accuracy", pa.float64()),
            ("high_accuracy", pa.float64()),
            ("overfit_trials", pa.int32()),  # that ran every epoch
            ("overfit_effect", pa.float64()),  # on the rise of val loss from its lowest to the last epoch, in nats
            ("overfit_effect_low", pa.float64()),
            ("overfit_effect_high", pa.float64()),
            ("winner", pa.float64()),
            ("winner_choice", pa.string()),
            ("near_trials", pa.int32()),  # the winner's neighbours
            ("near_drop", pa.float64()),  # their median loss of accuracy against it, at equal epochs
            ("fall_per_tenth", pa.float64()),  # loss per tenth of the searched range, away from the winner
            ("flat_low", pa.float64()),  # values that cost less than a point
            ("flat_high", pa.float64()),
            ("note", pa.string()),  # why something is null, one line
        ]
    ),
    "predictions": pa.schema(
        [
            ("split", pa.string()),
            ("index", pa.int32()),
            ("label", pa.uint8()),
            ("predicted", pa.uint8()),
            ("probabilities", pa.list_(pa.float32(), 10)),
            ("loss", pa.float32()),
        ]
    ),
    "classes": pa.schema(
        [
            ("split", pa.string()),
            ("label", pa.uint8()),
            ("name", pa.string()),
            ("precision", pa.float64()),
            ("recall", pa.float64()),
            ("f1", pa.float64()),
            ("support", pa.int64()),
        ]
    ),
    "bench": pa.schema(
        [
            ("row", pa.string()),  # letter and name, as b_job_vs_step
            ("ours", pa.float64()),  # medians over the repeats, in `unit`
            ("reference", pa.float64()),
            ("unit", pa.string()),
            ("ratio", pa.float64()),  # median of the repeats' own ratios, ours / reference
            ("ratio_min", pa.float64()),
            ("ratio_max", pa.float64()),
            ("repeats", pa.int32()),
            ("target", pa.float64()),  # null for rows without a target
            ("met", pa.bool_()),
            ("hardware", pa.string()),
            ("threads", pa.int32()),
            ("torch_version", pa.string()),
            ("ray_version", pa.string()),
            ("source_hash", pa.string()),
        ]
    ),
    "study": pa.schema(
        [
            ("study_id", pa.string()),
            ("part", pa.string()),
            ("arm", pa.string()),
            ("baseline", pa.string()),  # the arm that this one is compared with; null for the baseline itself
            ("preset", pa.string()),
            ("settings_json", pa.string()),  # the settings that differ from the preset
            ("seeds", pa.int32()),  # runs of the arm, with seeds 0, 1, ...
            ("epochs", pa.int32()),
            ("train_rows", pa.int64()),  # per epoch
            ("val_accuracy", pa.float64()),  # mean over the seeds, of each run's chosen epoch; _std is the deviation
            ("val_accuracy_std", pa.float64()),
            ("val_loss", pa.float64()),
            ("val_loss_std", pa.float64()),
            ("test_accuracy", pa.float64()),
            ("test_accuracy_std", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_loss_std", pa.float64()),
            ("turning_epoch", pa.float64()),  # epoch of the lowest val loss, the median over the seeds
            ("val_effect", pa.float64()),  # mean difference to the baseline's accuracy, paired by seed
            ("val_effect_low", pa.float64()),  # its 95 % interval
            ("val_effect_high", pa.float64()),
            ("test_effect", pa.float64()),
            ("test_effect_low", pa.float64()),
            ("test_effect_high", pa.float64()),
            ("only_arm_right", pa.int64()),  # test images that only this arm's model of seed 0 has right
            ("only_baseline_right", pa.int64()),
            ("mcnemar_p", pa.float64()),
            ("num_parameters", pa.int64()),
            ("precision", pa.string()),
            ("wall_s", pa.float64()),  # of all runs of the arm
            ("hardware", pa.string()),
            ("dataset_sha256", pa.string()),
            ("torch_version", pa.string()),
            ("ray_version", pa.string()),
            ("source_hash", pa.string()),
        ]
    ),
    "confusion": pa.schema(
        [("split", pa.string()), ("label", pa.uint8()), ("predicted", pa.uint8()), ("count", pa.int64())]
    ),
}

PROCESS_COLUMNS = (
    "num_parameters",
    "world_size",
    "device",
    "precision",
    "threads_per_worker",
    "exchange",
    "peak_memory_bytes",
    "peak_gpu_memory_bytes",
    "hardware",
)
"""Columns of `runs` that only the training process can fill."""
