"""`python -m transfer1.interop`: convert checkpoints, and check released files, on the CPU."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transfer1.config import Config, ConfigError, compose


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into options and, after `--`, overrides of the configuration."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m transfer1.interop",
        description="Exchange weights with other software. Overrides of the configuration, where a "
        "command needs the sizes of the networks, follow after --.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write a checkpoint in another file layout")
    convert.add_argument("source", type=Path, help="X.pt, X.safetensors, or a folder of diffusers")
    convert.add_argument("target", type=Path, help="the same; must not exist")
    convert.add_argument(
        "--to",
        required=True,
        help="original, tpN (for example tp8), fsdp, portable (.safetensors or .pt) or diffusers",
    )
    check = commands.add_parser("check", help="tell what loading a released file does to every key")
    check.add_argument("source", type=Path, help="base_model.pt, edge_control.pt, ...")
    check.add_argument("--part", choices=("base", "control"), help="default: by the file's name")
    adapter = commands.add_parser("adapter", help="export the LoRA adapters of a checkpoint")
    adapter.add_argument("source", type=Path, help="checkpoint of a run with lora=NAME")
    adapter.add_argument("target", type=Path, help="folder to write")
    adapter.add_argument("--to", choices=("peft", "diffusers"), default="peft")
    merge = commands.add_parser(
        "merge-lora", help="add adapters to the weights: a plain checkpoint"
    )
    merge.add_argument("source", type=Path, help="checkpoint of a run with lora=NAME, or the base")
    merge.add_argument("target", type=Path, help="X.pt, for checkpoint.load_path with lora=null")
    merge.add_argument("--adapter", type=Path, help="folder of peft; default: those of source")
    for command in (adapter, merge):
        command.add_argument("--averages", action="store_true", help="take the averaged adapters")
    for command in (convert, check, adapter, merge):
        command.add_argument("--config", default="configs/config_train.py", help="make_config()")
    return parser.parse_args(arguments[:split]), list(arguments[split + 1 :])


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code, 2 after bad input."""
    options, overrides = parse(arguments)
    try:
        config: Config | None = compose(options.config, overrides) if overrides else None
        for line in run(options, config):
            print(line)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, config: Config | None) -> list[str]:
    """The lines that a command prints."""
    from . import adapters, convert, layouts, released
    from .files import Scratch

    if options.command == "convert":
        return convert.convert(options.source, options.target, options.to, config)
    if options.command == "adapter":
        return adapters.export(options.source, options.target, options.to, options.averages)
    if options.command == "merge-lora":
        return adapters.merge_into(
            options.source, options.target, options.adapter, options.averages
        )
    if config is None:
        raise ConfigError("check needs the networks: add `-- experiment=NAME`")
    with tempfile.TemporaryDirectory() as folder:
        found = layouts.read(options.source, Scratch(Path(folder)))
        part = options.part or released.describe(options.source)
        return released.check(found, part, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
