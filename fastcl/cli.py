"""The command line: `fastcl run | methods | info | demo | bench`."""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import safetensors  # noqa: F401  checkpoints
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:
    sys.exit(f"fastcl: the command line needs the package {error.name}: run `pip install 'fastcl[cli]'`")

import torch

from . import __version__, build_info, streams
from . import bench as benchmarks
from ._paths import check_outputs
from .checkpoint import write_atomically
from .methods import METHODS
from .runner import Config, Run

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
PICTURES = {"plot_occupancy": "-masks", "plot_growth": "-growth", "plot_generated": "-generated"}  # a method's own


def main() -> None:
    """Entry point. An error is one sentence on stderr. Status 2: bad input, nothing written; 1: the disk failed in the
    middle (full, gone); 130: Ctrl-C."""
    try:
        app()
    except _Stopped as error:
        print(f"fastcl: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as ending:
        if ending.code == 130:  # Ctrl-C before or after the training itself: typer leaves without a word
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    print("fastcl: interrupted; a run with --checkpoint goes on by the same command with --resume", file=sys.stderr)
    sys.exit(130)


class _Stopped(Exception):
    status = 1


class _BadInput(_Stopped):
    status = 2


class _Interrupted(_Stopped):
    status = 130


@contextmanager
def _explained(checkpoint: Path | None) -> Iterator[None]:
    """Ctrl-C and disk errors as one sentence that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:  # typer would leave without a word
        raise _Interrupted(f"interrupted; {_going_on(checkpoint)}") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise _Stopped(f"{error.strerror or error}{where}; {_going_on(checkpoint)}") from None


def _going_on(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "nothing to go on from: --checkpoint keeps one, --resume continues from it"
    if not (checkpoint / "state.json").exists():
        return f"--resume has nothing to go on from: no epoch has ended in {checkpoint}"
    return f"the same command with --resume continues from the last epoch in {checkpoint}"


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="One of `fastcl methods`.")],
    data: Annotated[str, typer.Option(help="digits or mnist.")] = "digits",
    data_root: Annotated[str | None, typer.Option(help="Folder of the IDX files.")] = None,
    scenario: Annotated[str, typer.Option(help="split, permuted, rotated or variation.")] = "split",
    setting: Annotated[str, typer.Option(help="task, domain or class.")] = "class",
    tasks: Annotated[int | None, typer.Option(help="Number of tasks.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate; the method's own if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and permutations.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A method's own option, key=value; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result (png, pdf, svg).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder for a checkpoint after every epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from --checkpoint.")] = False,
    previous: Annotated[bool, typer.Option("--previous", help="Continue from the one before it.")] = False,
) -> None:
    """Train METHOD on a stream of tasks and report its accuracy on each."""
    _set_threads(threads)
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise _BadInput(f"plot is {plot} but must end in .png, .pdf or .svg")
    with _explained(checkpoint):
        config = Config(
            method, data, data_root, scenario, setting, tasks, epochs, batch_size, lr, seed, device,
            _options(method, option or []),
        )  # fmt: skip
        if plot is not None:
            _plots()  # whether it can be drawn, before training
        _check_outputs(config, {"out": out, "plot": plot}, {"checkpoint": checkpoint})
        run = _prepare(config, checkpoint, resume=resume or previous, previous=previous)
        if previous:
            print(
                f"fastcl: goes on from the previous checkpoint: task {run.task + 1}, epoch {run.epoch}", file=sys.stderr
            )
        result = _train(run)
        console.print(_matrix_table(result))
        if out is not None:
            write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
        if plot is not None:
            _plots().result_picture(result, plot)
            for own, suffix in PICTURES.items():
                if hasattr(run.learner, own):
                    getattr(run.learner, own)(plot.with_stem(plot.stem + suffix))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False) -> None:
    """List the methods."""
    rows = [{"name": m.name, "paper": m.paper, "seed": m.seed, "settings": m.settings} for m in METHODS.values()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("name", "paper", "seed", "settings", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["name"], row["paper"], row["seed"], " ".join(row["settings"]))
    console.print(table)


@app.command()
def info() -> None:
    """Show versions and which kernels run."""
    print(json.dumps({"fastcl": __version__, **build_info()}, indent=1))


@app.command()
def demo(
    data_root: Annotated[str | None, typer.Option(help="MNIST's IDX files; default $FASTCL_DATA, data/mnist.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("out"),
) -> None:
    """Fine-tuning, EWC and joint training on real digits (and on MNIST where it is): a table and a picture."""
    root = _find_mnist(data_root)
    try:
        check_outputs({"out": out / "demo.json", "plot": out / "demo.png"})
    except (ValueError, OSError) as error:
        raise _BadInput(str(error)) from None
    # strengths: the best of 10^1..10^5 on these streams, seed 0
    streams = [
        Config("", "digits", scenario="permuted", setting="task", options={"strength": 100.0}),
        Config("", "digits", scenario="rotated", setting="domain", options={"strength": 1000.0}),
    ]
    if root is None:
        console.print("MNIST not found (give --data-root or $FASTCL_DATA): digits only.")
    else:
        streams.append(Config("", "mnist", str(root), setting="task", options={"strength": 1e5}))
    results = []
    for stream in streams:
        for method in ("finetune", "ewc", "joint"):
            options = stream.options if method == "ewc" else {}
            results.append(_train(_prepare(replace(stream, method=method, options=options))))
    table = Table(title="Continual learning, mean over tasks at the end", header_style="bold")
    for column in ("stream", "method", "accuracy", "forgetting", "seconds"):
        table.add_column(column, justify="left" if column in ("stream", "method") else "right", no_wrap=True)
    for i, r in enumerate(results):
        table.add_row(
            f"{r['scenario']} {r['data']}, {r['setting']} setting" if i % 3 == 0 else "", r["method"],
            f"{100 * r['average_accuracy']:.1f}%", f"{100 * r['forgetting']:.1f}%", f"{r['seconds']:.1f}",
            end_section=i % 3 == 2,
        )  # fmt: skip
    console.print(table)
    write_atomically(out / "demo.json", (json.dumps(results, indent=1) + "\n").encode())
    _plots().comparison_picture(results, out / "demo.png")
    console.print(f"Picture: {out / 'demo.png'}")


def _check_outputs(config: Config, files: dict[str, Path | None], folders: dict[str, Path | None]) -> None:
    try:
        check_outputs(files, folders, streams.files(config.data, config.data_root))
    except (ValueError, OSError) as error:
        raise _BadInput(str(error)) from None


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small tensors, few rounds, no torch.compile.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.md, bench.json and bench.png.")] = Path("out"),
) -> None:
    """fastcl against eager torch and torch.compile on this machine: a table and a picture."""
    _set_threads(threads)
    try:
        check_outputs({name: out / name for name in ("bench.json", "bench.md", "bench.png")})
    except (ValueError, OSError) as error:
        raise _BadInput(str(error)) from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _BadInput(f"device is {device!r} but cannot be used here: {str(error).splitlines()[0]}") from None
    plots = _plots()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")

        def report(name: str, done: int, total: int) -> None:
            progress.update(bar, description=name, completed=done, total=total)

        result = benchmarks.run(device, quick, compile=not quick, report=report)
    table = Table("case", "fastcl", "contender", "ratio", title="Time relative to fastcl", header_style="bold")
    for case in result["cases"]:
        mine = case["medians"]["fastcl"]
        for i, (name, seconds) in enumerate((k, v) for k, v in case["medians"].items() if k != "fastcl"):
            first = () if i else (case["name"], benchmarks.human(mine))
            table.add_row(*(first or ("", "")), name, f"{seconds / mine:.2f}")
        table.add_section()
    console.print(table)
    for note in result["notes"]:
        console.print(note, markup=False)
    write_atomically(out / "bench.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(out / "bench.md", benchmarks.table(result).encode())
    plots.speed_picture(result, out / "bench.png")
    console.print(f"Table and picture: {out / 'bench.md'}, {out / 'bench.png'}")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise _BadInput(f"threads is {threads} but must be at least 1")
        torch.set_num_threads(threads)


def _prepare(config: Config, folder: Path | None = None, **how: bool) -> Run:
    try:
        return Run(config, folder, **how)
    except (ValueError, OSError, ImportError) as error:
        raise _BadInput(_one_line(error)) from None
    except Exception as error:
        if not config.options and config.seed == 0:
            raise  # nobody's bad input: a fault of ours
        given = ", ".join(f"{key}={value!r:.60}" for key, value in {**config.options, "seed": config.seed}.items())
        raise _BadInput(
            f"{config.method} cannot be built with {given}: {type(error).__name__}: {_one_line(error)}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nException raised from", 1)[0].split())


def _train(run: Run) -> dict[str, Any]:
    c, n_tasks = run.config, len(run.stream.tasks)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(c.method, total=None, loss=float("nan"))

        def report(task: int, epoch: int, batch: int, batches: int, loss: float) -> None:
            progress.update(
                bar,
                description=f"{c.method}: task {task + 1}/{n_tasks}, epoch {epoch + 1}/{c.epochs}",
                completed=epoch * batches + batch + 1,
                total=c.epochs * batches,
                loss=loss,
            )

        return run.train(report)


def _options(method: str, pairs: list[str]) -> dict[str, Any]:
    """key=value strings, checked against the method's own keyword arguments."""
    if method not in METHODS:
        return {}  # Config will say so
    known: dict[str, inspect.Parameter] = {}
    for cls in reversed(METHODS[method].__mro__):
        for function in ("__init__", "build"):
            if function in vars(cls):
                signature = inspect.signature(getattr(cls, function))
                known.update({k: p for k, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY})
    for taken in ("setting", "lr", "optimizer", "seed"):
        known.pop(taken, None)
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise _BadInput(f"option is {pair!r} but must be key=value")
        if key not in known:
            raise _BadInput(f"option {key!r} is unknown to {method}: it has {', '.join(sorted(known))}")
        options[key] = _typed(key, text, known[key].default)
    return options


def _typed(key: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # literal_eval's, by its manual
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise _BadInput(f"option {key} is an integer of {len(text)} digits but must fit a float") from None
    if default is not None and type(value) is not type(default):
        raise _BadInput(f"option {key} is {text!r} but must be of type {type(default).__name__}, like {default!r}")
    return value


def _find_mnist(data_root: str | None) -> Path | None:
    candidates = [data_root] if data_root else [os.environ.get("FASTCL_DATA"), "data/mnist", "../shared/data/mnist"]
    for candidate in filter(None, candidates):
        folder = Path(candidate)
        if any(folder.glob("train-images*")) or (folder / "MNIST" / "raw").is_dir():
            return folder
    if data_root:
        raise _BadInput(f"data_root is {data_root} but holds no train-images IDX file")
    return None


def _plots() -> Any:
    try:
        from . import plots
    except ImportError as error:
        raise _BadInput(f"drawing needs the package {error.name}: run `pip install 'fastcl[cli]'`") from None
    return plots


def _matrix_table(result: dict[str, Any]) -> Table:
    n = len(result["accuracy"])
    table = Table(
        title=f"{result['method']}, {result['scenario']} {result['data']}, {result['setting']} setting, accuracy in %",
        caption=f"average {100 * result['average_accuracy']:.2f}, forgetting {100 * result['forgetting']:.2f}, "
        f"{result['seconds']:.1f} s",
    )
    table.add_column("after task")
    for j in range(n):
        table.add_column(str(j + 1), justify="right")
    for i, row in enumerate(result["accuracy"]):
        table.add_row(
            str(i + 1), *(f"{100 * v:.1f}" if j <= i else f"[dim]{100 * v:.1f}[/]" for j, v in enumerate(row))
        )
    return table
