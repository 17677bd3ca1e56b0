"""gin at the edge: find gin files, refuse mistakes, build the `Experiment` (or another noun), save what was used.

This module and its checker are the only ones that know gin. Library classes carry no decorators: gin files begin with
`from __gin__ import dynamic_registration` and import what they bind, so every class is as usable with plain keyword
arguments.

In a notebook:

    from maxlike import config, train
    experiment = config.load("quickstart", bindings=["steps = 200"])
    train.train(experiment, "runs/mine")

gin keeps one global configuration. It is cleared and parsed anew for each `load`, and an experiment's model factory
brings its own configuration back when it is called, so two experiments in one process never see each other's bindings.
"""

import contextlib
import dataclasses
import functools
import importlib.util  # noqa: F401  (gin 0.5.0 uses it without importing it)
import inspect
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import gin

from maxlike import catalog
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.gin_check import Binding, Check
from maxlike.gin_values import Reference, hints
from maxlike.noun import Noun

_LOCK = threading.RLock()
_active: list["Configuration | None"] = [None]


@dataclasses.dataclass(eq=False)
class Configuration:
    """A parsed set of gin files: where an experiment came from, and the text that makes it again.

    name: the experiment's name. doc: its one-line documentation. source: the gin text that was parsed.
    operative: every value that was in force, defaults included; as a file it reruns the same experiment.
    job: the function that the job file names, or None.
    overlays, bindings: what is for the experiments in a noun that has some, such as a comparison. own: what is for it.
    unused: {overlay's or --set's binding: the sentence that refuses it}, where `load` was asked to keep those.
    """

    name: str
    doc: str
    source: str
    operative: str = ""
    job: Callable | None = None
    overlays: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    unused: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the configuration that gin-built factories read."""
        with _LOCK:
            before = _active[0]
            if before is not self:
                _parse(self.source)
                _active[0] = self
            try:
                yield
            finally:
                if before is not self:
                    _active[0] = None
                    gin.clear_config()
                    if before is not None:
                        _parse(before.source)
                        _active[0] = before

    def text(self) -> str:
        """The operative configuration as a file: `python -m launch --experiment FILE` reruns the experiment."""
        title = self.doc or self.name
        return f"# {title}\n# The operative configuration of a run, defaults included.\n{self.operative}"

    def with_value(self, owner: type, knob: str, value: str | int) -> "Configuration":
        """The same with another value of a knob of the operative configuration, so that the file reruns what ran."""
        pattern = rf"^((?:\S*[./])?{owner.__name__}\.{knob}) = .*(?:\n    .*)*$"
        operative, found = re.subn(pattern, lambda line: f"{line[1]} = {value!r}", self.operative, flags=re.MULTILINE)
        if not found:
            raise ValueError(f"the operative configuration of {self.name} has no {owner.__name__}.{knob}")
        return dataclasses.replace(self, operative=operative)

    def inside(self, factory: Callable) -> Callable:
        """`factory`, called under this configuration; `inspect.unwrap` gives it back."""

        @functools.wraps(factory)
        def build(*args, **kwargs):
            with self.active(), _mistakes_as_sentences(self.name):
                return factory(*args, **kwargs)

        return build


def load(
    name: str,
    *,
    overlays: Sequence[str] = (),
    bindings: Sequence[str] = (),
    job: str | None = None,
    default_job: str | None = None,
    kind: type[Noun] = Experiment,
    unused: Literal["refuse", "keep"] = "refuse",
) -> Any:
    """The experiment of that name (or .gin path), with overlays put on top and single bindings last.

    job: a job file on top, or None; default_job: one for a file that names no job itself.
    kind: the noun that is wanted; Noun for any: then the job's first parameter decides whether it fits.
    unused: 'keep' leaves overlays' and single bindings that this experiment has no use for in `config.unused`; so the
        experiments of a comparison share what each of them knows a part of.

    Raises UserError for an unknown name, knob, module or macro, a value of the wrong type, a required knob that is
    missing, a binding that nothing used, whatever a constructor refuses, and a file about another noun.
    """
    path = catalog.find("experiment", name)
    check = Check(catalog.roots())
    check.read_file(path)
    noun = _noun(check, path)
    configuration = Configuration(name, catalog.doc(path), "")
    if noun.contains_experiments:
        configuration.overlays = tuple(overlays)
        configuration.bindings = tuple(text for text in bindings if not _is_own(text, check))
        overlays, bindings = (), [text for text in bindings if text not in configuration.bindings]
        configuration.own = tuple(bindings)
    first = len(check.bindings)
    for overlay in overlays:
        check.read_file(catalog.find("overlay", overlay))
    shared = check.bindings[first:]
    job = job or (None if _binds_job(check) else default_job)
    if job is not None:
        check.read_file(catalog.find("job", job))
    for text in bindings:
        shared += _read_binding(check, text, configuration.unused if unused == "keep" else None)
    check.check_types()
    configuration.source = _flat(check)
    with configuration.active(), _mistakes_as_sentences(name):
        made = gin.get_configurable(noun)()
        configuration.job, job_target = _job(check)
        _check_kind(made, kind, job_target, name)
        made = made.configured(configuration)
        configuration.operative = gin.operative_config_str(max_line_length=110)
    idle = _unused(check, configuration.operative, job_target)
    if unused == "keep":
        configuration.unused |= {b.where: _refusal([b]) for b in idle if b in shared}
        idle = [binding for binding in idle if binding not in shared]
    if idle:
        raise UserError(_refusal(idle))
    return made


def _noun(check: Check, path: pathlib.Path) -> type[Noun]:
    """The class that the file is about."""
    found = dict.fromkeys(b.target for b in check.bindings if inspect.isclass(b.target) and issubclass(b.target, Noun))
    if not found:
        raise UserError(f"{path} binds nothing of experiment.Experiment, so it is no experiment")
    if len(found) > 1:
        raise UserError(f"{path} binds both {' and '.join(kind.binds for kind in found)}: a file is about one of them")
    return next(iter(found))


def _is_own(binding: str, check: Check) -> bool:
    """Whether the text of a binding names something that the file itself imports, or a macro that it defines."""
    knob = binding.partition("=")[0].strip().rpartition("/")[2]
    module, dot, _ = knob.partition(".")
    return module in check.symbols if dot else any(b.target is None and b.argument == knob for b in check.bindings)


def _read_binding(check: Check, text: str, unused: dict[str, str] | None) -> list[Binding]:
    """The bindings that a --set text adds; where it names what is not there, and `unused` is given, its refusal."""
    before, where = len(check.bindings), f"--set {text!r}"
    try:
        check.read_text(text, where)
    except UserError as error:
        if unused is None:
            raise
        unused[where] = str(error)
    return check.bindings[before:]


def _check_kind(made: Noun, kind: type[Noun], job: Callable | None, name: str) -> None:
    """Refuses a noun that the job, or the caller, does not take; a job that does not say takes an experiment."""
    takers = [("this", kind)]
    if job is not None:
        first = next(iter(inspect.signature(job).parameters))
        takers.insert(0, (f"--job {job.__name__}", hints(job).get(first, Experiment)))
    for taker, wanted in takers:
        if not isinstance(made, wanted):
            raise UserError(f"{taker} takes a file that binds {wanted.binds}, and {name} is {made.described()}")


def bindings_of(operative: str) -> list[str]:
    """The bindings of an operative configuration, without comments and imports, one a line."""
    joined = re.sub(r"\\?\n +", " ", operative)
    return [line for line in joined.splitlines() if " = " in line and not line.startswith("#")]


def _flat(check: Check) -> str:
    """One gin text without includes: the imports, then the binding that counts for each key."""
    lines = ["from __gin__ import dynamic_registration", *check.imports, ""]
    return "\n".join(lines + [b.text for b in check.effective().values()]) + "\n"


def _parse(text: str) -> None:
    gin.clear_config()
    gin.parse_config(text)


def _binds_job(check: Check) -> bool:
    return any(binding.target is None and binding.argument == "job" for binding in check.bindings)


def _job(check: Check) -> tuple[Callable | None, Callable | None]:
    for binding in check.effective().values():
        if binding.target is None and binding.argument == "job":
            if not isinstance(binding.value, Reference):
                raise UserError(f"{binding.where}: `job` takes a function, written `job = @module.function`")
            # Its bindings are taken now: the job runs when gin's configuration is gone, and as a plain function.
            target = binding.value.target
            bound = functools.partial(target, **gin.get_bindings(gin.get_configurable(target)))
            return functools.update_wrapper(bound, target), target
    return None, None


def _unused(check: Check, operative: str, job: Callable | None) -> list[Binding]:
    """The bindings that took no part in what was built."""
    reader = Check(catalog.roots())
    reader.read_text_as_file(operative)
    used = {binding.key for binding in reader.bindings}
    return [binding for binding in check.unused(used) if job is None or binding.target is not job]


def _refusal(idle: list[Binding]) -> str:
    one = idle[0]
    more = f" (and {len(idle) - 1} more: {'; '.join(b.where for b in idle[1:4])})" if len(idle) > 1 else ""
    return (
        f"{one.where}: nothing in this experiment uses `{one.text}`{more}; remove it, bind the class it configures, or "
        "name the scope of the binding that hides it"
    )


@contextlib.contextmanager
def _mistakes_as_sentences(name: str) -> Iterator[None]:
    """Turns what a constructor refuses while gin builds into one sentence; gin's call trail is dropped."""
    try:
        yield
    except ValueError as error:
        sentence = str(error).split("\n  In call to configurable")[0].strip()
        raise UserError(sentence) from error
    except TypeError as error:
        text = str(error)
        if "required" not in text or "In call to configurable" not in text:
            raise
        owner = text.split("In call to configurable '")[1].split("'")[0]
        knobs = [part for part in text.split("\n")[0].split("'")[1::2] if part != "rngs"]
        raise UserError(
            f"experiment {name}: {owner} needs {' and '.join(knobs)}; bind `{owner}.{knobs[0]} = ...` in the gin file"
        ) from error
