"""Train: `python train.py --config=configs/config_train.py -- experiment=NAME key=value ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into options and, after `--`, overrides of the configuration."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="train.py",
        description="Train a model. Overrides of the configuration follow after --.",
        usage="python train.py --config=FILE [--dryrun] -- experiment=NAME key=value ...",
    )
    parser.add_argument(
        "--config", default="configs/config_train.py", help="file with make_config()"
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="print and save the configuration, train nothing"
    )
    options, rest = parser.parse_known_args(arguments[:split])
    if rest:
        parser.error(
            f"unknown argument {' '.join(rest)}; overrides go after --: "
            f"python train.py --config={options.config} -- {' '.join(rest)}"
        )
    return options, list(arguments[split + 1 :])


def main(arguments: Sequence[str]) -> int:
    """Compose the configuration and run its trainer; return the exit code."""
    options, overrides = parse(arguments)
    from transfer1.config import (
        ConfigError,
        check_consistency,
        check_trainable,
        compose,
        locate,
        to_yaml,
    )

    try:
        config = compose(options.config, overrides)
        check_consistency(config)
        if options.dryrun:
            text = to_yaml(config)
            path = Path(config.job.path_local) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(text, end="")
            print(f"saved as {path}", file=sys.stderr)
            return 0
        check_trainable(config)
        return locate(config.trainer.type, "trainer.type")(config).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
