"""The command line: the public functions, with the same words.

What may live here: options, reading what they name, and printing. Nothing here decides anything about a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.debugging import Reproducer
from graphopt.errors import CaptureError, GraphOptError, PipelineError, nearest_name
from graphopt.graph import Graph
from graphopt.optimize import optimize as optimize_model
from graphopt.pipeline import Observer, describe, registered, summary, watching
from graphopt.report import Inspection, PassRecord, Report, explanation_lines
from graphopt.report.terminal import statistics
from graphopt.targets import TARGETS

__all__ = ["app", "main"]

app = typer.Typer(
    name="graphopt",
    help="Make neural networks smaller and faster, and prove every rewrite.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP: Final = (
    "An .onnx or .pt2 file, or package.module:name in the current folder or installed: a model, or a function without "
    "arguments that returns one, alone or with its example inputs."
)
DTYPES: Final = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
}

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
Shapes = Annotated[
    list[str],
    typer.Option(
        "--example-shape",
        metavar="SHAPE",
        help="Shape of an example input: 1,3,224,224. With a type, int64:1,16, and with the name of the argument, "
        "input_ids=int64:1,16. Repeat it for further inputs.",
    ),
]
Dynamics = Annotated[
    list[str],
    typer.Option(
        "--dynamic",
        metavar="INPUT:DIM",
        help="A dimension that varies from call to call, besides the batch: input_ids:1. Repeat it for further ones.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for files, report and manifest.")]
PrintAfterChange = Annotated[
    bool, typer.Option("--print-after-change", help="Print the graph after every pass that changes it, on stderr.")
]
StopAfter = Annotated[int | None, typer.Option(min=0, metavar="N", help="Run the first N passes only.")]
Bisect = Annotated[
    bool, typer.Option("--bisect", help="If the target cannot take the result, find the pass and the site to blame.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def optimize(
    model: Model,
    target: Annotated[
        str, typer.Option("--target", "-t", help="What the result is for; see graphopt targets.")
    ] = "torch",
    flops: Annotated[float | None, typer.Option(help="At most so many flops: up to 1 a share of the model's.")] = None,
    params: Annotated[float | None, typer.Option(help="At most so many parameters: up to 1 a share.")] = None,
    memory: Annotated[float | None, typer.Option(help="At most so many bytes at the peak: up to 1 a share.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Values of a model that is built without: .safetensors, the index of shards, or a folder."),
    ] = None,
    output: Output = None,
    pipeline: Annotated[
        str | None, typer.Option(help="The passes to run: text such as prune-channels{importance=l1}, or a .toml file.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="Batches for criteria that look at data, or a function.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A function of a module that returns a metric.")
    ] = None,
    verify: Annotated[
        str, typer.Option(help="Check passes after each, at the end or never: each, final, off.")
    ] = "each",
    seed: Annotated[int, typer.Option(min=0, help="Seeds whatever is random.")] = 0,
    example_shape: Shapes = [],  # noqa: B006  # typer wants a list
    dynamic: Dynamics = [],  # noqa: B006
    report: Annotated[
        Path | None, typer.Option(help="Write the report to this file: .json for data, anything else is a page.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    time: Annotated[bool, typer.Option("--time", help="Print how long each pass took.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what each pass did.")] = False,
    print_after_change: PrintAfterChange = False,
    stop_after: StopAfter = None,
    bisect: Bisect = False,
    reproducer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="If something fails, write what graphopt replay needs there.")
    ] = None,
) -> None:
    """Make a model smaller, and prove that what is left computes what it did."""
    given = {"flops": flops, "params": params, "memory": memory}
    wanted = {name: value for name, value in given.items() if value is not None}
    budget = graphopt.Budget(**wanted) if wanted else None
    with (
        _progress(quiet, dump=print_after_change, stop_after=stop_after),
        graphopt.debugging(reproducer=reproducer, bisect=bisect),
    ):
        result = optimize_model(
            *_given(model, example_shape, dynamic, seed),
            target=target,
            budget=budget,
            pipeline=pipeline,
            calibration=_called(calibration, "calibration") if calibration else None,
            evaluate=_named(evaluate, "evaluate") if evaluate else None,
            checkpoint=checkpoint,
            output=output,
            verify=verify,  # type: ignore[arg-type]  # checked by optimize, with the nearest valid name
            seed=seed,
        )
    result.report.model = _title(model)
    if report is not None:
        _save(result.report, report)
    if as_json:
        typer.echo(result.report.to_json())
    elif not quiet:
        console = Console()
        console.print(result.report)
        if output is None:
            console.print("[dim]Nothing was written: -o FOLDER writes the model, its report and a manifest.[/]")
    if (time or stats) and not quiet:
        Console(stderr=as_json).print(statistics(result.report, times=time, counts=stats))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A folder that --reproducer wrote.", show_default=False)],
    output: Output = None,
    print_after_change: PrintAfterChange = False,
    stop_after: StopAfter = None,
    bisect: Bisect = False,
    quiet: Quiet = False,
) -> None:
    """Run again what failed, from the files that --reproducer wrote."""
    with _progress(quiet, dump=print_after_change, stop_after=stop_after), graphopt.debugging(bisect=bisect):
        result = optimize_model(**Reproducer.load(folder), output=output)
    if not quiet:
        Console().print(result.report)


@app.command()
def inspect(
    model: Model,
    example_shape: Shapes = [],  # noqa: B006
    dynamic: Dynamics = [],  # noqa: B006
    dot: Annotated[Path | None, typer.Option(help="Write what ties what as a graph for Graphviz.")] = None,
    graphml: Annotated[Path | None, typer.Option(help="Write what ties what as GraphML.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the groups of a model, what must stay whole and why, and the cost by layer."""
    found = _inspected(model, example_shape, dynamic, quiet)
    try:
        if dot is not None:
            dot.write_text(found.coupling.dot(), encoding="utf-8")
        if graphml is not None:
            found.coupling.write_graphml(graphml)
    except OSError as error:
        raise _unwritable(error) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        Console().print(found)


@app.command()
def explain(
    model: Model,
    param: Annotated[str, typer.Argument(help="The name of a parameter.", show_default=False)],
    dim: Annotated[int, typer.Argument(help="One of its dimensions, from 0.", show_default=False)],
    example_shape: Shapes = [],  # noqa: B006
    dynamic: Dynamics = [],  # noqa: B006
    every: Annotated[bool, typer.Option("--all", help="Print the way to every place, however many there are.")] = False,
) -> None:
    """Show why a dimension of a parameter goes with others, or cannot shrink."""
    found = _inspected(model, example_shape, dynamic, quiet=False)
    lines = list(explanation_lines(found, param, dim, most=sys.maxsize if every else 16))
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line)


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the passes, with their options."""
    rows = {
        name: {
            "does": summary(cls),
            "preserves": str(cls.preserves),
            "options": [option.to_dict() for option in describe(cls)],
        }
        for name, cls in registered().items()
    }
    _print_catalogue(rows, as_json, lambda row: f"preserves: {row['preserves']}")


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the targets, with their options."""
    rows = {
        name: {
            "does": summary(cls),
            "requires": cls.requires,
            "options": [option.to_dict() for option in describe(cls)],
        }
        for name, cls in TARGETS.items()
    }
    _print_catalogue(
        rows,
        as_json,
        lambda row: f"needs pip install 'graphopt[{row['requires']}]'" if row["requires"] else "needs no extra",
    )


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"graphopt {graphopt.__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line; ends the process with the exit status that tells what kind of thing went wrong."""
    try:
        app(prog_name="graphopt")
    except GraphOptError as error:
        print(f"graphopt: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        if "example_inputs" in str(error):
            print(
                "on the command line, that is --example-shape 1,3,224,224, or a function that returns both",
                file=sys.stderr,
            )
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("graphopt: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


# -- reading --------------------------------------------------------------------------------------------------------


def _inspected(model: str, shapes: list[str], dynamic: list[str], quiet: bool) -> Inspection:
    with _progress(quiet):
        found = graphopt.inspect(*_given(model, shapes, dynamic, seed=0))
    return dataclasses.replace(found, model=_title(model))


def _given(text: str, shapes: list[str], dynamic: list[str], seed: int) -> tuple[Any, Any]:
    """Return the model and its example inputs; where dimensions besides the batch vary, the model is captured here."""
    model, inputs = _loaded(text)
    if shapes:
        inputs = _inputs(shapes, seed)
    varying: dict[str, list[int]] = {}
    for each in dynamic:
        name, _, number = each.rpartition(":")
        if not name or not re.fullmatch(r"-?\d+", number):
            raise typer.BadParameter(f"--dynamic must be INPUT:DIM, such as input_ids:1; found {each!r}")
        varying.setdefault(name, []).append(int(number))
    return (capture(model, inputs, dynamic=varying), None) if varying else (model, inputs)


def _loaded(text: str) -> tuple[Any, Any]:
    """Return the model that MODEL names, and its example inputs where it brings some.

    Random weights of a model that is made here are the same in every run.
    """
    torch.manual_seed(0)
    if ":" not in text or Path(text).exists():
        if not Path(text).suffix:
            raise typer.BadParameter(f"MODEL must be an .onnx or .pt2 file or package.module:name; found {text!r}")
        return Path(text), None
    found = _named(text, "MODEL")
    if not isinstance(found, nn.Module) and callable(found):
        found = _result(found, text)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
        return found
    return found, None


def _called(text: str, option: str) -> Any:
    """Return what a name stands for, or what it returns where it is a function."""
    found = _named(text, option)
    return _result(found, text) if callable(found) else found


def _result(function: Callable[[], Any], text: str) -> Any:
    try:
        return function()
    except GraphOptError:
        raise
    except Exception as error:
        raise CaptureError(f"{text}() broke off{_line(error)}: {type(error).__name__}: {error}") from error


def _named(text: str, option: str) -> Any:
    """Import ``package.module:name``; the current folder comes first."""
    module_name, _, path = text.partition(":")
    if not path or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise typer.BadParameter(f"{option} must be package.module:name; found {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise CaptureError(
                f"{text}: there is no module '{error.name}' in {here} or among the installed packages"
            ) from error
        raise CaptureError(f"{text}: importing {module_name} failed{_line(error)}: {error}") from error
    except Exception as error:
        raise CaptureError(
            f"{text}: importing {module_name} failed{_line(error)}: {type(error).__name__}: {error}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            nearest = nearest_name(part, [name for name in dir(found) if not name.startswith("_")])
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            raise CaptureError(f"{text}: {module_name} has no '{part}'{hint}")
        found = getattr(found, part)
    return found


def _line(error: BaseException) -> str:
    """Return where an error of the user's code was raised, as `` at file:line``."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""


def _inputs(shapes: list[str], seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make random inputs of the given shapes; whole numbers are 0 or 1, which any table holds."""
    generator = torch.Generator().manual_seed(seed)
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in shapes:
        match = re.fullmatch(r"(?:(\w+)=)?(?:(\w+):)?(\d+(?:,\d+)*)?", text)
        if match is None or not text:
            raise typer.BadParameter(f"--example-shape must be like 1,3,224,224 or int64:1,16; found {text!r}")
        name, kind, sizes = match.groups()
        if kind is not None and kind not in DTYPES:
            nearest = nearest_name(kind, DTYPES)
            hint = f"; did you mean {nearest}?" if nearest else f"; there are {', '.join(DTYPES)}"
            raise typer.BadParameter(f"--example-shape: there is no type {kind!r}{hint}")
        shape = tuple(map(int, sizes.split(","))) if sizes else ()
        dtype = DTYPES[kind or "float32"]
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator).to(dtype)
        else:
            tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
        if name is not None:
            kwargs[name] = tensor
        elif kwargs:
            raise typer.BadParameter(
                f"--example-shape: inputs without a name come first; found {text!r} after {[*kwargs]}"
            )
        else:
            args.append(tensor)
    return tuple(args), kwargs


# -- printing -------------------------------------------------------------------------------------------------------


class _Terminal(Observer):
    """Show the stage that runs, dump graphs, and stop where asked."""

    def __init__(self, progress: Progress, dump: bool, stop_after: int | None) -> None:
        self.progress = progress
        self.task = progress.add_task("load", total=None)
        self.dump = dump
        self.stop_after = stop_after

    def stage(self, name: str) -> None:
        self.progress.update(self.task, description=name)

    def goes_on(self, position: int) -> bool:
        return self.stop_after is None or position < self.stop_after

    def changed(self, record: PassRecord, graph: Graph) -> None:
        if self.dump:
            self.progress.console.print(
                f"// after {record.name} (pass {record.position + 1})\n{graph.text()}\n",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def _progress(quiet: bool, *, dump: bool = False, stop_after: int | None = None) -> Iterator[None]:
    """Show on a terminal's standard error what is going on, for as long as the block runs."""
    # The stream as it is now: stages that silence libraries put another one in its place for a while.
    console = Console(file=sys.stderr)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with progress, watching(_Terminal(progress, dump, stop_after)):
        yield


def _title(model: str) -> str:
    return model if ":" in model else Path(model).name


def _save(report: Report, path: Path) -> None:
    try:
        if path.suffix == ".json":
            report.save_json(path)
        else:
            report.save_html(path)
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> PipelineError:
    return PipelineError(f"cannot write {error.filename}: {error.strerror}; choose another path")


def _print_catalogue(rows: dict[str, dict[str, Any]], as_json: bool, more: Callable[[dict[str, Any]], str]) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for name, row in rows.items():
        console.print(f"[bold]{escape(name)}[/]  [dim]{escape(more(row))}[/]")
        console.print(f"  {escape(row['does'])}")
        for option in row["options"]:
            default = f" = {option['default']}" if option["default"] else ""
            console.print(f"  {escape(option['name'])}{escape(default)}  [dim]{escape(option['takes'])}[/]")
            if option["help"]:
                console.print(Padding(escape(option["help"]), (0, 0, 0, 6)))
        console.print()


if __name__ == "__main__":
    main()
