"""``nnUNetv2_diffrefine plan``: write a variant of the settings as plans of their own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.settings_block import read_settings

EPILOG = """example:
  nnUNetv2_diffrefine plan -d 4 -o nnUNetPlans_3steps --set sampling.steps=3 process.state=discrete
  nnUNetv2_train 4 3d_fullres 0 -tr DiffRefineTrainer -p nnUNetPlans_3steps
The preprocessed data are those of the source plans: nothing is preprocessed again.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``plan`` subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="write a variant of a method's settings as plans, for nnUNetv2_train -p",
        description="Copy nnU-Net plans and add a diffrefine block with other settings than the method's preset.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", help="dataset id or name; needed unless --show is given")
    parser.add_argument("-c", default="3d_fullres", help="configuration to extend (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans to start from (default: %(default)s)")
    parser.add_argument("-o", help="name of the new plans; needed unless --show is given")
    parser.add_argument(
        "-m", "--method", default="bridge", help="method whose preset is changed (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, e.g. sampling.steps=3")
    parser.add_argument("--show", action="store_true", help="print the resulting settings and write nothing")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write or show the variant."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name  # slow; --help must not be

    from nnunet_diffrefine.plans import merge, shipped_settings, write_variant

    changes = parse_changes(args.set)
    trainer, read = trainer_and_settings(args.method)
    if args.show:
        config = read(merge(shipped_settings(args.method, changes), changes))
        print(json.dumps(asdict(config), indent=2))
        return 0
    if not args.o:
        raise ConfigError("-o is missing: name the new plans, e.g. -o nnUNetPlans_3steps (or use --show).")
    if not args.d:
        raise ConfigError("-d is missing: name the dataset, e.g. -d 4 (or use --show).")
    target = write_variant(maybe_convert_to_dataset_name(args.d), args.p, args.o, args.c, args.method, changes, read)
    train = f"nnUNetv2_train {args.d} {args.c} FOLD -tr {trainer} -p {args.o}"
    print(f"Wrote {target}\nTrain with: {train}")
    return 0


def trainer_and_settings(method: str) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """Trainer of a method, for ``-tr``, and what reads its settings from a block."""
    from nnunet_diffrefine.methods import DEFAULT_METHOD, METHODS
    from nnunet_diffrefine.methods.recoseg import ReCoSeg, Synthesis
    from nnunet_diffrefine.methods.recoseg_settings import RECOSEG, SYNTHESIS, ReCoSegConfig, SynthesisConfig

    if method == RECOSEG:
        return ReCoSeg.trainer, partial(read_settings, ReCoSegConfig)
    if method == SYNTHESIS:
        return Synthesis.trainer, partial(read_settings, SynthesisConfig)
    if method == DEFAULT_METHOD or method not in METHODS:  # shipped_settings says which there are
        return "DiffRefineTrainer", RefineConfig.from_dict
    return METHODS[method].trainer, RefineConfig.from_dict


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """``["sampling.steps=3"]`` -> ``{"sampling": {"steps": 3}}``; values are JSON, anything else a string.

    Raises:
        ConfigError: a pair has no ``=``, or names a group and a setting inside it.
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set got {pair!r}; wanted KEY=VALUE, e.g. sampling.steps=3.")
        *groups, name = key.split(".")
        target = changes
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set gives {group!r} both a value and settings inside it ({pair!r}).")
        target[name] = _value(text)
    return changes


def _value(text: str) -> Any:  # noqa: ANN401 (any JSON value)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
