"""The commands, one per stage, in pipeline order. Each loads its config, calls one function, prints its last line.

What a stage needs is imported inside its command, so that `--help` answers at once.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vnaw_pipeline.errors import ConfigError, PipelineError
from vnaw_pipeline.tasks import TASKS, Split, Task

if TYPE_CHECKING:
    from vnaw_pipeline.checks import Problem
    from vnaw_pipeline.stages import StageReport

app = typer.Typer(
    name="vnaw",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # importing rich is half of the time that --help takes
    pretty_exceptions_enable=False,
    help="Facial expressions in video: crops, embeddings once, temporal models in minutes, predictions per frame.",
)

_IN_PROCESSES = ("pretrain", "finetune", "extract", "train", "predict")


@app.callback()
def _refuse_launcher(context: typer.Context) -> None:
    """Several processes would each do the whole of a command that does not share its work."""
    if context.invoked_subcommand not in _IN_PROCESSES and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"vnaw {context.invoked_subcommand} runs in one process; start it without a launcher.")


Manifest = Annotated[Path, typer.Option(help="Manifest of videos (CSV).", exists=True, dir_okay=False)]
Annotations = Annotated[Path, typer.Option(help="Folder of the challenge's annotations.", exists=True, file_okay=False)]
SomeAnnotations = Annotated[
    Path | None, typer.Option(help="Folder of the challenge's annotations.", exists=True, file_okay=False)
]
VideoFiles = Annotated[
    Path | None, typer.Option(help="Folder of video files; gives frame counts.", exists=True, file_okay=False)
]
Crops = Annotated[Path, typer.Option(help="Folder that the manifest's crops lie under.", exists=True, file_okay=False)]
SomeCrops = Annotated[
    Path | None,
    typer.Option(
        help="Folder that the manifest's crops lie under; without it, no video has crops and embeddings are imported.",
        exists=True,
        file_okay=False,
    ),
]
Store = Annotated[str, typer.Option(help="Feature store: a folder, or s3://bucket/folder.")]
Predictions = Annotated[
    str | None, typer.Option(help="Folder of the run's tables, or s3://bucket/folder; without it, in the run folder.")
]
Run = Annotated[Path, typer.Option("--run-dir", help="Run folder.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML configuration; without it, the defaults.", exists=True, dir_okay=False),
]
Fold = Annotated[int | None, typer.Option(help="Validate on this fold of the manifest.", min=0)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value: section.key=value. Repeatable.")
]
ExperimentOut = Annotated[Path, typer.Option(help="Folder for the runs and the table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start afresh instead of going on.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read encoder.weights from a .pth file.")]
Tuned = Annotated[bool, typer.Option("--tuned", help="Finish the answers as the run's `vnaw tune` found best.")]


def _task_named(name: str) -> Task:
    """typer has no lists of choices."""
    found = next((task for task in TASKS.values() if task.name == name), None)
    if found is None:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(TASKS)}.")
    return found


Tasks = Annotated[
    list[Task] | None,
    typer.Option(
        "--task",
        parser=_task_named,
        metavar="TASK",
        help=f"{', '.join(TASKS)}; expr8 without it. Repeatable: the first is the manifest's main task.",
    ),
]


@app.command()
def demo(
    work_dir: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo_run"),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Render data with known truth and run every stage on it. Prints a table of scores."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.demo import DEMO_CONFIG, run_demo

    run_demo(work_dir, load_config(config or DEMO_CONFIG, overrides), typer.echo)


@app.command()
def manifest(
    out: Annotated[Path, typer.Option(help="Manifest to write (CSV).", dir_okay=False)],
    crops: SomeCrops = None,
    annotations: SomeAnnotations = None,
    tasks: Tasks = None,
    test_list: Annotated[
        Path | None, typer.Option(help="List of test videos, a name a line.", exists=True, dir_okay=False)
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Submission template; gives test lengths.", exists=True, dir_okay=False)
    ] = None,
    videos: VideoFiles = None,
    folds: Annotated[int, typer.Option(help="Number of 7:3 folds by source video; 0: none.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the folds.", min=0)] = 0,
) -> None:
    """Build the table of videos from the challenge's folders. Checks it."""
    from vnaw_pipeline.checks import check_manifest
    from vnaw_pipeline.manifests import build_manifest, write_manifest

    first, *others = tasks or [TASKS["expr8"]]
    table = build_manifest(annotations, crops, first, test_list, template, videos, folds, seed, others)
    write_manifest(table, out)
    counts = ", ".join(f"{count} {split}" for split, count in table.split.value_counts(sort=False).items())
    problems = check_manifest(out, annotations, crops, first, videos, template, others)
    errors = [problem for problem in problems if problem.severity == "error"]
    _print_problems(errors)
    found = f"{len(errors)} errors, {len(problems) - len(errors)} warnings (`vnaw check` lists them)"
    typer.echo(f"manifest: {found}; {len(table)} videos ({counts}), {table.num_frames.sum()} frames -> {out}")
    _exit_if(bool(errors))


@app.command()
def check(
    manifest: Manifest,
    crops: SomeCrops = None,
    annotations: SomeAnnotations = None,
    tasks: Tasks = None,
    template: Annotated[Path | None, typer.Option(help="Submission template.", exists=True, dir_okay=False)] = None,
    videos: VideoFiles = None,
) -> None:
    """List every problem of manifest, annotations and crops. With file and line; images are not opened."""
    from vnaw_pipeline.checks import check_manifest

    first, *others = tasks or [TASKS["expr8"]]
    problems = check_manifest(manifest, annotations, crops, first, videos, template, others)
    _print_problems(problems)
    errors = sum(problem.severity == "error" for problem in problems)
    typer.echo(f"check: {errors} errors, {len(problems) - errors} warnings in {manifest}")
    _exit_if(errors > 0)


@app.command()
def crop(
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    out: Annotated[Path, typer.Option(help="Folder for the crops.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
) -> None:
    """Find, align and cut out the main face of each video frame."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.crops.extract import extract_crops

    _finish(extract_crops(videos, out, load_config(config, overrides).crop, overwrite))


@app.command()
def pretrain(
    faces: Annotated[list[Path], typer.Option(help="Set of static faces to learn from. Repeatable.", exists=True)],
    validation: Annotated[
        list[Path], typer.Option(help="Set of faces that scores each epoch. Repeatable.", exists=True)
    ],
    run: Run,
    config: ConfigFile = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Train the image encoder on static faces. FERPlus, RAF-DB, AffectNet, any of them."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.training.faces import pretrain_encoder

    resolved = load_config(config, overrides)
    _finish(pretrain_encoder(faces, validation, run, resolved, allow_pickle=allow_pickle, overwrite=overwrite))


@app.command()
def finetune(
    manifest: Manifest,
    annotations: Annotations,
    crops: Crops,
    run: Run,
    config: ConfigFile = None,
    overrides: Overrides = None,
    fold: Fold = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Fine-tune the image encoder on labelled training frames."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.training.frames import finetune_encoder

    resolved = load_config(config, overrides)
    report = finetune_encoder(
        manifest, annotations, crops, run, resolved, fold=fold, allow_pickle=allow_pickle, overwrite=overwrite
    )
    _finish(report)


@app.command()
def extract(
    manifest: Manifest,
    crops: Crops,
    store: Store,
    config: ConfigFile = None,
    overrides: Overrides = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Encode every frame once into the feature store. Remove the store to start afresh."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.features.extract import extract_features

    _finish(extract_features(manifest, crops, store, load_config(config, overrides), allow_pickle=allow_pickle))


@app.command("import")
def import_(
    manifest: Manifest,
    features: Annotated[
        Path,
        typer.Option(help="Folder of <video>/00001.npy ..., or of <video>.h5 files.", exists=True, file_okay=False),
    ],
    store: Store,
) -> None:
    """Take over embeddings of another program into a feature store."""
    from vnaw_pipeline.features.exchange import import_features

    _finish(import_features(manifest, features, store))


@app.command()
def export(
    store: Store,
    out: Annotated[Path, typer.Option(help="Folder for the files.", file_okay=False)],
    layout: Annotated[
        Literal["tree", "hdf5"], typer.Option(help="An .npy file a frame, or an HDF5 file a video.")
    ] = "tree",
    manifest: Annotated[
        Path | None, typer.Option(help="Manifest of the videos to write; without it, all.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Write a store's embeddings as NumPy or HDF5 files."""
    from vnaw_pipeline.features.exchange import export_features

    _finish(export_features(store, out, layout, manifest))


@app.command()
def train(
    manifest: Manifest,
    annotations: Annotations,
    store: Store,
    run: Run,
    config: ConfigFile = None,
    overrides: Overrides = None,
    fold: Fold = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the temporal model on windows of the stored embeddings."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.training.windows import train_windows

    resolved = load_config(config, overrides)
    _finish(train_windows(manifest, annotations, store, run, resolved, fold=fold, overwrite=overwrite))


@app.command()
def predict(
    manifest: Manifest,
    store: Store,
    run: Run,
    split: Annotated[Split, typer.Option(help="Split to predict.")] = "validation",
    overrides: Overrides = None,
    tuned: Tuned = False,
    predictions: Predictions = None,
) -> None:
    """Write a row per frame of a split's videos. Into the run folder, or elsewhere."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.prediction.predict import predict_videos
    from vnaw_pipeline.prediction.tables import open_predicted
    from vnaw_pipeline.runs import RunFolder, read_run

    for key in (text.partition("=")[0] for text in overrides or []):
        if not key.startswith("predict.") or (tuned and key not in ("predict.batch_windows", "predict.precision")):
            why = "--tuned has found these values" if key.startswith("predict.") else "the rest is the run's"
            raise ConfigError(f"--set {key}: a prediction takes values of the section predict only, and {why}.")
    config = None
    if overrides:
        read_run(RunFolder(run))  # says what is wrong with it, such as that it is a composed one
        config = load_config(RunFolder(run).config, overrides).predict
    if tuned:
        config = open_predicted(run).tuned(config)
    _finish(predict_videos(manifest, store, run, split, config, predictions))


@app.command()
def tune(
    manifest: Manifest,
    annotations: Annotations,
    run: Run,
    predictions: Predictions = None,
) -> None:
    """Tune smoothing, bias and thresholds on validation predictions. `--tuned` then uses them."""
    from vnaw_pipeline.prediction.tune import tune_run

    _finish(tune_run(manifest, annotations, run, predictions))


@app.command()
def combine(
    runs: Annotated[list[Path], typer.Option("--run-dir", help="Run folder of a member. Repeatable.")],
    how: Annotated[
        Literal["mean", "hard", "soft"],
        typer.Option(help="Mean of runs of one task, or a cascade of a coarse5 and a negative4 run."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder of the composed run.")],
    split: Annotated[Split, typer.Option(help="Split that the members predicted.")] = "validation",
    tuned: Tuned = False,
) -> None:
    """Combine several runs into one, as an ensemble or a cascade."""
    from vnaw_pipeline.prediction.combine import combine_runs

    _finish(combine_runs(runs, how, out, split, tuned=tuned))


@app.command()
def evaluate(
    manifest: Annotated[Path | None, typer.Option(help="Manifest of videos.", exists=True, dir_okay=False)] = None,
    annotations: SomeAnnotations = None,
    run: Annotated[Path | None, typer.Option("--run-dir", help="Run folder with predictions.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder with a head: a name that ships, or a file.")] = None,
    faces: Annotated[
        Path | None, typer.Option(help="Set of static faces to score the encoder on.", exists=True)
    ] = None,
    split: Annotated[Split, typer.Option(help="Split to score.")] = "validation",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores here too.", dir_okay=False)] = None,
    predictions: Predictions = None,
) -> None:
    """Score a run's predictions, or an encoder on static faces. Over every labelled frame and for each of the run's
    tasks (--manifest, --annotations, --run-dir); or the encoder's own head (--encoder, --faces)."""
    from vnaw_pipeline.prediction.evaluate import evaluate_predictions, format_scores, scores_as_json
    from vnaw_pipeline.prediction.tables import open_predicted
    from vnaw_pipeline.provenance import write_json

    if encoder is not None and faces is not None and manifest is annotations is run is None:
        _evaluate_encoder(encoder, faces, split, json_file)
        return
    if manifest is None or annotations is None or run is None or encoder is not None or faces is not None:
        raise ConfigError(
            "Give --manifest, --annotations and --run-dir to score a run, or --encoder and --faces to score an encoder."
        )
    opened = open_predicted(run, predictions)
    found = {}
    for task in opened.tasks:
        scores = evaluate_predictions(manifest, annotations, opened.table(split, task), task.name, split, opened.fold)
        typer.echo(format_scores(scores, task))
        found[task.name] = scores_as_json(scores, task)
    if json_file is not None:  # the main task's scores, and the others' under their names
        write_json(json_file, {**found.pop(opened.task.name), **found})


@app.command()
def crossval(
    manifest: Manifest,
    annotations: Annotations,
    store: Store,
    out: ExperimentOut,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train and score the official split and every fold. Writes a table with mean and deviation."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.experiments import cross_validate

    _finish(cross_validate(manifest, annotations, store, out, load_config(config, overrides)))


@app.command()
def ablate(
    manifest: Manifest,
    annotations: Annotations,
    store: Store,
    out: ExperimentOut,
    seed: Annotated[list[int], typer.Option(help="Seed of the training. Repeatable.", min=0)],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train and score plain, augmented, with NAW and with both. Writes a table with mean and deviation."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.experiments import ablate as ablate_recipes

    _finish(ablate_recipes(manifest, annotations, store, out, load_config(config, overrides), seed))


@app.command()
def cascade(
    manifest: Manifest,
    annotations: Annotations,
    store: Store,
    out: ExperimentOut,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train and score CFC-SP, a coarse and a negative model cascaded. Both cascades are scored, hard and soft."""
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.experiments import cascade as train_cascade

    _finish(train_cascade(manifest, annotations, store, out, load_config(config, overrides)))


@app.command()
def submit(
    run: Run,
    template: Annotated[Path, typer.Option(help="The challenge's template.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Submission to write.", dir_okay=False)],
    split: Annotated[Split, typer.Option(help="Split that was predicted.")] = "test",
    predictions: Predictions = None,
) -> None:
    """Write a challenge submission for a template. Every line of it is answered, in its order."""
    from vnaw_pipeline.prediction.submission import write_submission
    from vnaw_pipeline.prediction.tables import open_predicted
    from vnaw_pipeline.template import template_task

    opened = open_predicted(run, predictions)
    task = template_task(template, opened.tasks)
    table = opened.table(split, task)
    lines = write_submission(table, template, out, task)
    typer.echo(f"submit: {lines} lines written and read back -> {out}")


@app.command()
def infer(
    inputs: Annotated[list[Path] | None, typer.Argument(help="Videos, images, or folders of them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results, one folder in it per input.")] = Path("infer_out"),
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder that ships, by name, or a weights file; without it, the config's, else fer_lite0."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run-dir", help="Run of `vnaw train` that reads the embeddings.")
    ] = None,
    camera: Annotated[int | None, typer.Option(help="Read from this camera until Ctrl-C.", min=0)] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Read expressions in videos, images or from a camera. Makes tables, time lines, annotated copies."""
    if bool(inputs) == (camera is not None):
        raise ConfigError("Give videos, images or folders to read, or --camera 0 (and not both).")
    from vnaw_pipeline.config import load_config
    from vnaw_pipeline.inference.run import infer_videos
    from vnaw_pipeline.runs import open_run

    of_encoder = [text for text in overrides or [] if text.startswith("encoder.")]
    named = any(text.startswith(("encoder.name=", "encoder.weights=")) for text in of_encoder)
    if of_encoder and (encoder is not None or not (named or config or run)):
        raise ConfigError(
            f"--set {of_encoder[0]}: of which encoder? Set encoder.name and encoder.weights, not --encoder."
        )
    opened = open_run(run) if run is not None else None
    if config is None and opened is not None:
        config = opened.folder.config
    resolved = load_config(config, overrides)
    report = infer_videos(
        inputs or [], out, resolved, encoder=encoder, run=opened, camera=camera, allow_pickle=allow_pickle
    )
    _finish(report)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Measurements, such as `bank` or `scale` (docs/performance.md names them); without any, all."
        ),
    ] = None,
    work_dir: Annotated[Path, typer.Option(help="Folder for synthetic data, removed as it goes.")] = Path("bench_run"),
    quick: Annotated[bool, typer.Option("--quick", help="All of it small, in about five minutes.")] = False,
    videos: Annotated[int | None, typer.Option(help="Size of the data; the default is Aff-Wild2's.", min=30)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here too, as they are found.", dir_okay=False)
    ] = None,
) -> None:
    """Measure what each stage costs. On synthetic data; prints a table in markdown."""
    from vnaw_pipeline.bench.figure import markdown_table
    from vnaw_pipeline.bench.run import run_bench
    from vnaw_pipeline.bench.size import FULL, QUICK
    from vnaw_pipeline.provenance import write_json

    figures = []
    size = QUICK if quick else FULL
    for figure in run_bench(work_dir, size if videos is None else size.of_videos(videos), names or []):
        typer.echo(f"{figure.name}: {figure.value:.4g} ({figure.detail})", err=True)
        figures.append(figure)
        if json_file is not None:
            write_json(json_file, [found.as_json() for found in figures])
    typer.echo(markdown_table(figures))


def _evaluate_encoder(encoder: str, faces: Path, split: Split, json_file: Path | None) -> None:
    from vnaw_pipeline.prediction.evaluate import format_scores
    from vnaw_pipeline.prediction.faces import evaluate_faces
    from vnaw_pipeline.provenance import write_json

    found = evaluate_faces(encoder, faces, split)
    scored = f"faces with a majority; macro-F1 over the {found.scores.num_classes} classes that occur"
    typer.echo(format_scores(found.scores, TASKS["expr8"], scored))
    if found.learnt_from_these:
        typer.echo("The encoder has learnt from these faces: the scores say nothing of others.")
    typer.echo(f"{found.frames_per_second:.0f} faces/s")
    if json_file is not None:
        write_json(json_file, found.as_json())


def _print_problems(problems: "list[Problem]") -> None:
    for problem in problems:
        typer.echo(str(problem))


def _finish(report: "StageReport") -> None:
    if "torch" in sys.modules:
        from vnaw_pipeline.processes import leave_processes

        leave_processes()
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        for note in report.notes:
            typer.echo(note)
        typer.echo(report.summary())
    _exit_if(not report.ok)


def _exit_if(failed: bool) -> None:
    if failed:
        raise typer.Exit(1)


_INTERRUPTED, _TERMINATED = 130, 143


def _terminate(*_: object) -> None:
    """A launcher or a queue stops the program; what is open is closed on the way out."""
    raise SystemExit(_TERMINATED)


def main() -> None:
    """Run the command line: what a user can mend becomes one message and exit code 1 (2: a wrong option or config
    value), without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are no news; the error at their end is ours
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):
            typer.echo("Stopped. What is written is whole; run the same command again to finish.", err=True)
        raise
    except PipelineError as error:
        typer.echo(str(error), err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        where = f" {str(error.filename).removeprefix('file:')}" if error.filename else ""
        typer.echo(
            f"Cannot read or write{where}: {error.strerror or error}. What was written so far is kept; "
            "mend this and run the same command again.",
            err=True,
        )
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which --help does not import
            typer.echo(
                f"The GPU's memory is full: {str(error).partition('. ')[0]}. Put less there at once: a larger "
                "train.accumulation, a smaller extract.batch_frames, finetune.batch_frames, pretrain.batch_faces or "
                "predict.batch_windows, or bank=memory. What was written so far is kept.",
                err=True,
            )
            sys.exit(1)
        if "torch" in sys.modules:
            from vnaw_pipeline.processes import hear_out_heartbeat

            hear_out_heartbeat(error)
        raise
