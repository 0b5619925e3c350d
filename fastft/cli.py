"""The command line: `fastft train | plan | evaluate | check | stats | show | export | ...`."""

import argparse
import atexit
import gc
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastft import __version__
from fastft.config import RunConfig
from fastft.errors import ConfigError, FastftError
from fastft.runfile import read_run_file, schema

_EXIT_CODES = """\
exit codes:
  0  done
  1  a bug in fastft, or in code that a run file names; with a traceback
  2  an error you can mend: run file, data, checkpoint, arguments
  3  training stopped by its own policy (gradients.stop_after)
  4  interrupted by SIGTERM or Ctrl-C after a finished step; saved, go on with --resume
  130  interrupted by Ctrl-C at once: before training, or a second time
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    options = _parse(arguments)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Read when torch first allocates on a GPU. Segments that grow leave few gaps, so that what
        # is reserved stays close to what is used, which a memory budget needs.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Python's last search for garbage would walk through all that torch brought: a second.
    atexit.register(gc.freeze)
    console = Console(stderr=False, soft_wrap=not sys.stdout.isatty())
    try:
        options.run(options, console)
    except FastftError as error:
        for problem in error.problems:
            print(f"fastft: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastft: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        # argparse gives up on positional arguments that follow an option.
        options.overrides = [*options.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastft",
        description="Fine-tunes scientific foundation models.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _add_run_command(commands, "train", _train, "fine-tune as a run file says")
    command.add_argument("--dry-run", action="store_true", help="show what would be trained; stop")
    command.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint"
    )
    command.add_argument(
        "--profile",
        action="store_true",
        help="profile a few steps and write a report; its settings are [profile]",
    )
    command = _add_run_command(commands, "plan", _plan, "what fits into GPU memory, and how fast")
    command.add_argument(
        "--budget",
        metavar="SIZES",
        help="GPU memory, as 80GB,40GB,22GiB; default: the run file's, or what the device has",
    )
    command.add_argument(
        "--no-device", action="store_true", help="estimate without a GPU, and without weights"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where plans and memory.png go; default: 'plan' in the run folder",
    )
    command = _add_run_command(commands, "evaluate", _evaluate, "score a trained model")
    command.add_argument("--split", choices=["validation", "test"], default="validation")
    _add_checkpoint(command)
    _add_run_command(commands, "check", _check, "check the data of a run file")
    command = _add_run_command(
        commands, "stats", _stats, "compute what the data's variables are normalised by"
    )
    command.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples to read (default: 200)"
    )
    command = _add_run_command(
        commands, "export", _export, "write a checkpoint for the model family's own tools"
    )
    command.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write")
    _add_checkpoint(command)

    command = commands.add_parser("show", help="describe a checkpoint")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument(
        "--run",
        type=Path,
        metavar="RUN.toml",
        dest="run_file",
        help="describe it as its adapter does",
    )
    command.set_defaults(run=_show)
    command = commands.add_parser(
        "convert", help="write the run file of another trainer's options file"
    )
    command.add_argument("options_file", type=Path, metavar="OPTIONS")
    command.add_argument("--to", type=Path, required=True, metavar="RUN.toml", help="file to write")
    command.add_argument(
        "--adapter",
        default="pet",
        metavar="NAME",
        help="whose options these are (default: pet, the options.yaml of `mtt train`)",
    )
    command.set_defaults(run=_convert)
    command = commands.add_parser("schema", help="print the JSON Schema of a run file")
    command.set_defaults(run=_schema)
    return parser


def _add_run_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text)
    command.add_argument("run_file", type=Path, metavar="RUN.toml")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="a setting instead of the run file's, as optim.lr=1e-4 or data.train.0.path=a.npz",
    )
    command.set_defaults(run=run)
    return command


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="'best' (default), 'latest', a checkpoint folder, or a file with weights",
    )


def _config(options: argparse.Namespace) -> RunConfig:
    return read_run_file(options.run_file, options.overrides, _optim_preset)


def _optim_preset(
    model: Mapping[str, Any], finetune: Mapping[str, Any], name: str
) -> Mapping[str, Any]:
    return importlib.import_module("fastft.adapters.registry").optim_preset(model, finetune, name)


# Commands import what they need on their own: torch takes seconds, and `schema` needs none of it.


def _train(options: argparse.Namespace, console: Console) -> None:
    if options.resume:
        options.overrides = [*options.overrides, "checkpoint.resume=auto"]
    config = _config(options)
    if options.profile and config.profile is None:
        options.overrides = [*options.overrides, "profile={}"]
        config = _config(options)
    result = importlib.import_module("fastft.train").train(config, console, dry_run=options.dry_run)
    if result is not None:
        folder = config.run.folder
        logs = (
            f"tensorboard --logdir {folder}"
            if config.log.tensorboard
            else f"{folder}/metrics.jsonl"
        )
        lines = [f"checkpoint: {result.checkpoint}", f"logs: {logs}"]
        if result.best is not None:
            lines.insert(1, f"best checkpoint: {result.best}")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _plan(options: argparse.Namespace, console: Console) -> None:
    if options.no_device:
        # Python's searches for garbage among all that torch brings take a second of ten, and the
        # estimate has its own.
        gc.disable()
    try:
        importlib.import_module("fastft.plan").plan(
            _config(options),
            console,
            budgets=options.budget.split(",") if options.budget is not None else (),
            no_device=options.no_device,
            out=options.out,
        )
    finally:
        gc.enable()


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    importlib.import_module("fastft.evaluate").evaluate(
        _config(options), console, checkpoint=options.checkpoint, split=options.split
    )


def _export(options: argparse.Namespace, console: Console) -> None:
    _refuse_existing(options.to)
    importlib.import_module("fastft.evaluate").export(
        _config(options), console, options.to, checkpoint=options.checkpoint
    )


def _check(options: argparse.Namespace, console: Console) -> None:
    importlib.import_module("fastft.check").check(_config(options), console)


def _stats(options: argparse.Namespace, console: Console) -> None:
    if options.samples < 1:
        raise ConfigError(f"--samples: must be at least 1; got {options.samples}; raise it")
    importlib.import_module("fastft.check").stats(_config(options), console, options.samples)


def _show(options: argparse.Namespace, console: Console) -> None:
    config = read_run_file(options.run_file, (), _optim_preset) if options.run_file else None
    description = importlib.import_module("fastft.check").describe(options.checkpoint, config)
    # A title must not be folded to the width of a narrow table.
    width = min(len(description.title), console.width)
    table = Table(title=Text(description.title), show_header=False, min_width=width)
    table.add_column()
    # Paths are folded, not cut.
    table.add_column(overflow="fold")
    for row in description.rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _convert(options: argparse.Namespace, console: Console) -> None:
    _refuse_existing(options.to)
    registry = importlib.import_module("fastft.adapters.registry")
    text, notes = registry.convert_options(options.adapter, options.options_file)
    write = importlib.import_module("fastft.atomic").write_file_atomically
    write(options.to, lambda path: path.write_text(text))
    lines = [*notes, f"{options.options_file} -> {options.to}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _refuse_existing(target: Path) -> None:
    # A link that leads nowhere is something, too.
    if os.path.lexists(target):
        raise ConfigError(
            f"--to: must be a new file; got '{target}', which exists; name another, or remove it"
            " first"
        )


def _schema(options: argparse.Namespace, console: Console) -> None:
    # Not print(): rich ends quietly where the reader has left (`| head`).
    console.print(json.dumps(schema(), indent=2), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
