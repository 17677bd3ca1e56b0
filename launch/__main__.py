"""python -m launch --experiment NAME [--job J] [--overlay O ...] [--set knob=value ...] [--run_dir D] [--flag ...]"""

import argparse
import collections
import inspect
import pathlib
import sys
import traceback
import types
import typing

from launch import distributed, simulated
from maxlike import catalog
from maxlike.errors import Failed, UserError

EPILOG = """Begin with `python -m launch --experiment quickstart`. A job's own parameters are plain flags:
`--job generate --prompt "It is a truth"`, `--job data --step 100`; `--experiment E --job NAME --help` shows them. --set
takes the knobs that gin files bind, and their macros: `--set steps=50`, `--set norm.RMSNorm.eps=1e-5`. gin files are
code: run only files you trust."""
DEFAULT_JOB = "train"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; `python -m launch --help` shows the flags")


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="python -m launch", description=__doc__, epilog=EPILOG, allow_abbrev=False, add_help=False)
    parser.add_argument("--help", action="store_true", help="show this help, or a job's")
    parser.add_argument("--list", action="store_true", help="show experiments, overlays and jobs")
    parser.add_argument("--experiment", metavar="NAME", help="a name from --list, or a path to a .gin file")
    parser.add_argument("--job", metavar="J", help="what to do with it (default: the file's own, else train)")
    parser.add_argument("--overlay", action="append", default=[], metavar="O", help="a gin file put on top; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="one gin binding; repeatable")
    parser.add_argument("--run_dir", metavar="D", help="the run's directory (default: runs/NAME)")
    parser.add_argument(
        "--xla", action="append", default=[], metavar="G", help="a further group of XLA flags, repeatable"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="bare clusters: where the processes meet")
    parser.add_argument("--processes", type=int, metavar="N", help="bare clusters: number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="bare clusters: index of this process")
    parser.add_argument(
        "--join_timeout", type=float, default=distributed.JOIN_TIMEOUT, metavar="S", help="seconds to wait for them"
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.help and "--job" not in " ".join(argv):
        parser.print_help()
        raise SystemExit(0)
    return arguments, rest


def _show_list() -> None:
    for kind in ("experiment", "overlay", "job"):
        print(f"{kind}s")
        for name, path in catalog.names(kind).items():
            print(f"  {name:24} {catalog.doc(path)}")


def _job_flags(job: typing.Callable, rest: list[str], name: str) -> dict[str, object]:
    """`--flag value` pairs as keyword arguments of the job's function, converted by its annotations."""
    hints = typing.get_type_hints(job)
    known = [p.name for p in inspect.signature(job).parameters.values() if p.kind is p.KEYWORD_ONLY]
    flags: dict[str, object] = {}
    words = collections.deque(rest)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{word!r} is no flag; did you forget quotes around a text with spaces?")
        knob = flag[2:].replace("-", "_")
        if knob not in known:
            choices = ", ".join(f"--{k}" for k in known) or "none"
            raise UserError(
                f"the job {name} has no flag {flag}{catalog.nearest(knob, known)}; its own flags: {choices}"
            )
        if not equals:
            if hints[knob] is bool and (not words or words[0].lower() not in ("true", "false")):
                value = "true"  # a switch
            elif words:
                value = words.popleft()
            else:
                raise UserError(f"{flag} needs a value")
        converted = _convert(flag, value, hints[knob])
        flags[knob] = flags[knob] + converted if isinstance(converted, tuple) and knob in flags else converted
    return flags


def _convert(flag: str, text: str, hint: object) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text == "None" and type(None) in arguments:
            return None
        return _convert(flag, text, next(a for a in arguments if a is not type(None)))
    if origin is tuple:  # a repeatable flag
        return (_convert(flag, text, arguments[0]),)
    if origin is typing.Literal:
        if text not in arguments:
            raise UserError(f"{flag}={text!r}{catalog.nearest(text, arguments)}; it takes {' or '.join(arguments)}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag}={text!r}: it takes true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise UserError(f"{flag}={text!r}: it takes {hint.__name__}") from None


def _show_job(job: typing.Callable, name: str) -> None:
    print(f"--job {name}: {inspect.getdoc(job)}\n\nflags")
    for parameter in inspect.signature(job).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = "" if parameter.default is parameter.empty else f" (default {parameter.default!r})"
            print(f"  --{parameter.name}{default}")


def _run_name(experiment: str) -> str:
    """The default name of a run. A run's own config.gin, run again, gives a new run beside it."""
    path = pathlib.Path(experiment)
    if path.suffix != ".gin":
        return experiment
    return f"{path.resolve().parent.name}-again" if path.name == "config.gin" else path.stem


def _run(argv: list[str]) -> None:
    arguments, rest = _arguments(argv)
    if arguments.list:
        _show_list()
        return
    if arguments.experiment is None:
        raise UserError("name an experiment: `python -m launch --experiment quickstart`; --list shows all")
    catalog.find("experiment", arguments.experiment)
    if arguments.job is not None:
        catalog.find("job", arguments.job)
    from launch import environment

    wanted = arguments.job or DEFAULT_JOB
    simulated.prepare(wanted, rest)
    environment.prepare(arguments.xla, simulated.compiles_for(wanted, rest))
    import absl.flags

    absl.flags.FLAGS(["maxlike"])  # Grain's workers read absl flags, which somebody must have parsed
    distributed.join(arguments.coordinator, arguments.processes, arguments.process, arguments.join_timeout)
    from maxlike import config, noun, refusals

    subject = config.load(
        arguments.experiment,
        overlays=arguments.overlay,
        bindings=arguments.set,
        job=arguments.job,
        default_job=DEFAULT_JOB,
        kind=noun.Noun,
    )
    job = subject.config.job
    name = arguments.job or job.__name__
    if arguments.help:
        _show_job(job, name)
        return
    run_dir = pathlib.Path(arguments.run_dir or pathlib.Path("runs") / _run_name(arguments.experiment))
    flags = _job_flags(job, rest, name)
    with refusals.as_user_errors():
        job(subject, run_dir, **flags)


def main() -> int:
    code, why = 0, ""
    try:
        _run(sys.argv[1:])
    except UserError as error:
        code, why = 2, str(error)
        print(f"maxlike: {error}", file=sys.stderr)
    except Failed as answer:
        code, why = 1, str(answer)
        print(f"maxlike: {answer}", file=sys.stderr)
    except KeyboardInterrupt:
        code, why = 130, "interrupted"
        print("maxlike: interrupted", file=sys.stderr)
    except Exception as error:
        distributed.await_cause()
        if not distributed.joined():
            raise
        code, why = 1, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    distributed.leave(code, why)
    return code


if __name__ == "__main__":
    sys.exit(main())
