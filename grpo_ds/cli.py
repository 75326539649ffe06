"""The command `grpo-ds`: what is installed, is an estimator sound, can the nodes train. Heavy imports come late."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from grpo_ds.config import RecipeError
from grpo_ds.processes import leave

_EXAMPLE = "A whole package with an estimator and its tests is shown by: python -m pydoc grpo_ds.conformance"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: fine, 1: a check failed or a plugin is broken, 2: wrong input."""
    parser = argparse.ArgumentParser(prog="grpo-ds", description="Tools beside launch/train.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plugins(commands)
    _add_check_estimator(commands)
    _add_doctor(commands)
    _add_selftest(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not selftest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return int(args.run(args))
    except RecipeError as error:
        print(f"grpo-ds: {error}", file=sys.stderr)
        return 2


def _add_plugins(commands: Any) -> None:
    from grpo_ds.plugin_list import GROUPS

    parser = commands.add_parser(
        "plugins", help="list plugins: where from, needs, options", description=plugins.__doc__, epilog=_EXAMPLE
    )
    parser.add_argument("group", nargs="?", choices=[group.removeprefix("grpo_ds.") for group in GROUPS])
    parser.set_defaults(run=plugins)


def plugins(args: argparse.Namespace) -> int:
    """List what is installed in each group (or in one), from which distribution, with needs and options."""
    from grpo_ds.plugin_list import GROUPS, describe_group
    from grpo_ds.plugins import list_plugins

    groups = [f"grpo_ds.{args.group}"] if args.group else list(GROUPS)
    print("\n\n".join(describe_group(group) for group in groups))
    return int(any(row.problem for group in groups for row in list_plugins(group)))


def _add_check_estimator(commands: Any) -> None:
    parser = commands.add_parser(
        "check-estimator",
        help="test an advantage estimator's properties",
        description=check_estimator.__doc__,
        epilog=_EXAMPLE,
    )
    parser.add_argument("name", help="a built-in, an entry point, package.module.Name or path/file.py:Name")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the estimator; VALUE as in JSON",
    )
    parser.add_argument("--functions", type=int, default=2, metavar="K", help="reward functions it is tried with")
    parser.set_defaults(run=check_estimator)


def check_estimator(args: argparse.Namespace) -> int:
    """Run the conformance kit on an estimator and print a table; exit code 1 if a property does not hold."""
    from grpo_ds import conformance

    options = dict(_option(text) for text in args.option)
    results = conformance.check_estimator(args.name, options, args.functions)
    width = max(len(result.property) for result in results)
    for result in results:
        verdict = "passed" if result.passed else f"FAILED  {result.detail}"
        print(f"{result.property:<{width}}  {verdict}")
    failed = sum(not result.passed for result in results)
    print(f"{args.name}: {failed} of {len(results)} properties do not hold" if failed else f"{args.name}: all hold")
    return int(failed > 0)


def _add_doctor(commands: Any) -> None:
    from grpo_ds import doctor

    about = doctor.examine.__doc__
    doctor.add_arguments(commands.add_parser("doctor", help="check the nodes of a launch", description=about))


def _add_selftest(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        help="two rounds at learning rate 0: nothing may move",
        usage="grpo-ds selftest --recipe NAME [options of launch/train.py]",
        description=selftest.__doc__,
    )
    parser.set_defaults(run=selftest)


def selftest(args: argparse.Namespace) -> int:
    """Run two rounds of a recipe at learning rate 0 and check that weights and samples stay; exit code 1 if they moved."""
    from grpo_ds.selftest import selftest as run

    return run(args.rest)


def _option(text: str) -> tuple[str, Any]:
    """`eps=1e-6` -> ("eps", 1e-06); what is no JSON is text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise RecipeError(f"--option {text}: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def run() -> NoReturn:
    """What the shell calls."""
    leave(main())


if __name__ == "__main__":
    run()
