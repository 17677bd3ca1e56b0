"""gin at the edge: find experiment files, refuse mistakes, build the `Experiment`, save what was used.

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
import threading
from collections.abc import Callable, Iterator, Sequence

import gin

from maxlike import catalog
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.gin_check import Check
from maxlike.gin_values import Reference

_LOCK = threading.RLock()
_active: list["Configuration | None"] = [None]


@dataclasses.dataclass(eq=False)
class Configuration:
    """A parsed set of gin files: where an experiment came from, and the text that makes it again.

    name: the experiment's name. doc: its one-line documentation. source: the gin text that was parsed.
    operative: every value that was in force, defaults included; as a file it reruns the same experiment.
    job: the function that the job file names, or None.
    """

    name: str
    doc: str
    source: str
    operative: str = ""
    job: Callable | None = None

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

    def inside(self, factory: Callable) -> Callable:
        """`factory`, called under this configuration; `inspect.unwrap` gives it back."""

        @functools.wraps(factory)
        def build(*args, **kwargs):
            with self.active(), _mistakes_as_sentences(self.name):
                return factory(*args, **kwargs)

        return build


def load(
    name: str, *, overlays: Sequence[str] = (), bindings: Sequence[str] = (), job: str | None = None
) -> Experiment:
    """The experiment of that name (or .gin path), with overlays put on top and single bindings last.

    Raises UserError for an unknown name, knob, module or macro, a value of the wrong type, a required knob that is
    missing, a binding that nothing used, and whatever a constructor refuses.
    """
    files = [catalog.find("experiment", name)]
    files += [catalog.find("overlay", overlay) for overlay in overlays]
    if job is not None:
        files.append(catalog.find("job", job))
    check = Check(catalog.roots())
    for path in files:
        check.read_file(path)
    for binding in bindings:
        check.read_text(binding, f"--set {binding!r}")
    check.check_types()
    configuration = Configuration(name, catalog.doc(files[0]), _flat(check))
    with configuration.active(), _mistakes_as_sentences(name):
        if not any(binding.target is Experiment for binding in check.bindings):
            raise UserError(f"{files[0]} binds nothing of experiment.Experiment, so it is no experiment")
        experiment = gin.get_configurable(Experiment)()
        experiment = dataclasses.replace(experiment, model=configuration.inside(experiment.model), config=configuration)
        experiment.abstract_model()
        configuration.operative = gin.operative_config_str(max_line_length=110)
        configuration.job, job_target = _job(check)
    _refuse_unused(check, configuration.operative, job_target)
    return experiment


def _flat(check: Check) -> str:
    """One gin text without includes: the imports, then the binding that counts for each key."""
    lines = ["from __gin__ import dynamic_registration", *check.imports, ""]
    return "\n".join(lines + [b.text for b in check.effective().values()]) + "\n"


def _parse(text: str) -> None:
    gin.clear_config()
    gin.parse_config(text)


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


def _refuse_unused(check: Check, operative: str, job: Callable | None) -> None:
    reader = Check(catalog.roots())
    reader.read_text_as_file(operative)
    used = {binding.key for binding in reader.bindings}
    idle = [binding for binding in check.unused(used) if job is None or binding.target is not job]
    if idle:
        one = idle[0]
        more = f" (and {len(idle) - 1} more: {'; '.join(b.where for b in idle[1:4])})" if len(idle) > 1 else ""
        raise UserError(
            f"{one.where}: nothing in this experiment uses `{one.text}`{more}; "
            "remove it, or bind the class it configures"
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
