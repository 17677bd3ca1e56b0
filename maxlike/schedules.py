"""Learning-rate schedules: a class with knobs, called with the run's `Clock`, gives a pure function count -> rate.

`count` is the number of completed updates. Every schedule is evaluated at t = count + 1, so the first update of a
warmup is not wasted at rate 0 and the last update of a run gets the end of the decay. Everything is float32 `jnp`
without Python branches on the count, so it runs under jit and scan, for any count that fits an int32.

Durations are numbers of steps (`2000`), or text with a unit: "2000 steps", "1e9 tokens", "10 %" (of the run's steps).
A schedule that is meant to be prolonged or branched (InverseSqrt, Power) refuses "%".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from maxlike.errors import UserError

Duration = int | str
Tail = Literal["linear", "1-sqrt", "exponential", "cosine"]
Rate = Callable[[jax.Array], jax.Array]

TOKENS_PER_SEQUENCE = 4096  # the Power law counts its batch in sequences of this many tokens


@dataclasses.dataclass(frozen=True)
class Clock:
    """How long a run is: `steps` updates of `tokens_per_step` tokens each. Refuses either below 1."""

    steps: int
    tokens_per_step: int

    def __post_init__(self):
        for name in ("steps", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise UserError(f"Clock.{name}={getattr(self, name)} must be at least 1.")

    def in_steps(self, duration: Duration, knob: str, relative: bool = True) -> float:
        """The duration in steps, perhaps fractional. `knob` names it in errors; `relative=False` refuses "%"."""
        amount, unit = _parse(duration, knob)
        if unit == "%" and not relative:
            raise UserError(
                f"{knob}={duration!r} is relative to the length of the run, which this schedule must not depend on: "
                'give it in "steps" or "tokens".'
            )
        return {"steps": amount, "tokens": amount / self.tokens_per_step, "%": amount / 100 * self.steps}[unit]


def _parse(duration: Duration, knob: str) -> tuple[float, str]:
    if isinstance(duration, int) and not isinstance(duration, bool):
        amount, unit = float(duration), "steps"
    else:
        text = str(duration).strip()
        unit = next((u for u in ("steps", "tokens", "%") if text.endswith(u)), None)
        try:
            amount = float(text.removesuffix(unit)) if unit else math.nan
        except ValueError:
            amount = math.nan
    if not 0 <= amount < math.inf:
        raise UserError(f'{knob}={duration!r} is no duration: write 2000, "2000 steps", "1e9 tokens" or "10 %".')
    return amount, unit


def _positive(knob: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise UserError(f"{knob}={value} must be a positive number.")
    return value


def _ratio(knob: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{knob}={value} is outside [0, 1].")
    return value


def _choice(knob: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{knob}={value!r} is unknown: use one of {', '.join(choices)}.")
    return value


def _time(count: jax.Array) -> jax.Array:
    return jnp.asarray(count, jnp.float32) + 1.0  # cast first: count + 1 overflows at the largest int32


def _warmed(warmup: float, peak: float, after: Callable[[jax.Array], jax.Array]) -> Rate:
    """Linear from 0 to `peak` over `warmup` steps, then `after(t)`."""

    def rate(count):
        t = _time(count)
        return jnp.where(t < warmup, peak * (t / max(warmup, 1.0)), after(t)).astype(jnp.float32)

    return rate


def _fitting(name: str, clock: Clock, warmup: float, decay: float) -> None:
    if warmup + decay > clock.steps:
        raise UserError(
            f"{name}: warmup ({warmup:g} steps) and decay ({decay:g} steps) do not fit into {clock.steps} steps: "
            f"shorten {name}.warmup, or train longer."
        )


def tail(kind: Tail, u: jax.Array, floor: float) -> jax.Array:
    """The shape of a decay: 1 at u = 0, `floor` at u = 1 and beyond.

    linear: 1 - (1-r) u;  1-sqrt: 1 - (1-r) sqrt(u);  cosine: r + (1-r) (1 + cos(pi u)) / 2;
    exponential: r + (1-r) (e^(1-u) - 1) / (e - 1), the form with exact end points.
    """
    u = jnp.clip(u, 0.0, 1.0)
    shape = {
        "linear": lambda: 1.0 - u,
        "1-sqrt": lambda: 1.0 - jnp.sqrt(u),
        "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * u)),
        "exponential": lambda: jnp.expm1(1.0 - u) / math.expm1(1.0),
    }[kind]()
    return floor + (1.0 - floor) * shape


class Constant:
    """`lr` for ever, after a linear warmup."""

    def __init__(self, *, lr: float, warmup: int | str = 0):
        self.lr, self.warmup = _positive("Constant.lr", lr), warmup

    def __call__(self, clock: Clock) -> Rate:
        return _warmed(clock.in_steps(self.warmup, "Constant.warmup"), self.lr, lambda t: self.lr)


class Linear:
    """Linear warmup, then a straight line to `min_ratio` * lr at the last update."""

    def __init__(self, *, lr: float, warmup: int | str = 0, min_ratio: float = 0.0):
        self.lr, self.warmup = _positive("Linear.lr", lr), warmup
        self.min_ratio = _ratio("Linear.min_ratio", min_ratio)

    def __call__(self, clock: Clock) -> Rate:
        return _to_the_end("Linear", clock, self.lr, self.warmup, "linear", self.min_ratio)


class Cosine:
    """Linear warmup, then half a cosine to `min_ratio` * lr at the last update."""

    def __init__(self, *, lr: float, warmup: int | str = 0, min_ratio: float = 0.1):
        self.lr, self.warmup = _positive("Cosine.lr", lr), warmup
        self.min_ratio = _ratio("Cosine.min_ratio", min_ratio)

    def __call__(self, clock: Clock) -> Rate:
        return _to_the_end("Cosine", clock, self.lr, self.warmup, "cosine", self.min_ratio)


def _to_the_end(name: str, clock: Clock, lr: float, warmup: Duration, kind: Tail, floor: float) -> Rate:
    start = clock.in_steps(warmup, f"{name}.warmup")
    _fitting(name, clock, start, 0.0)
    length = max(clock.steps - start, 1e-6)
    return _warmed(start, lr, lambda t: lr * tail(kind, (t - start) / length, floor))


class WSD:
    """Warmup, stable, decay (MiniCPM, arXiv 2404.06395): constant at `lr` until the last `decay`, then `tail`.

    tail: "linear", "1-sqrt", "exponential" (with exact end points) or "cosine"; `floor` is its end in units of lr.
    """

    def __init__(
        self,
        *,
        lr: float,
        warmup: int | str = 0,
        decay: int | str = "10 %",
        tail: Tail = "linear",
        floor: float = 0.0,
    ):
        self.lr, self.warmup, self.decay = _positive("WSD.lr", lr), warmup, decay
        self.tail, self.floor = _choice("WSD.tail", tail, get_args(Tail)), _ratio("WSD.floor", floor)

    def __call__(self, clock: Clock) -> Rate:
        warmup, decay = clock.in_steps(self.warmup, "WSD.warmup"), clock.in_steps(self.decay, "WSD.decay")
        _fitting("WSD", clock, warmup, decay)
        start, length = clock.steps - decay, max(decay, 1e-6)
        return _warmed(warmup, self.lr, lambda t: self.lr * tail(self.tail, (t - start) / length, self.floor))


class InverseSqrt:
    """Warmup, then decay without a horizon, then (optionally) a linear cooldown at the end of the run.

    With t in steps and everything in units of lr: t / T_w in the warmup; f_d + (1 - f_d) / sqrt((t - T_w + T_s) / T_s)
    after it; over the last T_c steps a line from the value at its start down to f_c. Nothing before the cooldown knows
    how long the run is, so a run can be branched and prolonged; therefore no duration may be given in "%".
    T_w `warmup`, T_s `scale`, T_c `cooldown`, f_d `decay_floor`, f_c `cooldown_floor` (not above f_d).
    Source: the schedule of MPT, used by "Does your data spark joy?", arXiv 2406.03476.
    """

    def __init__(
        self,
        *,
        lr: float,
        warmup: int | str,
        scale: int | str,
        cooldown: int | str = 0,
        decay_floor: float = 0.0,
        cooldown_floor: float = 0.0,
    ):
        self.lr, self.warmup, self.scale, self.cooldown = _positive("InverseSqrt.lr", lr), warmup, scale, cooldown
        self.decay_floor = _ratio("InverseSqrt.decay_floor", decay_floor)
        self.cooldown_floor = _ratio("InverseSqrt.cooldown_floor", cooldown_floor)
        if cooldown_floor > decay_floor:
            raise UserError(
                f"InverseSqrt.cooldown_floor={cooldown_floor} is above InverseSqrt.decay_floor={decay_floor}: "
                "a cooldown must not raise the rate."
            )

    def __call__(self, clock: Clock) -> Rate:
        warmup, scale, cooldown = (
            clock.in_steps(getattr(self, knob), f"InverseSqrt.{knob}", relative=False)
            for knob in ("warmup", "scale", "cooldown")
        )
        _positive("InverseSqrt.scale", scale)
        if cooldown:
            _fitting("InverseSqrt", clock, warmup, cooldown)
        start, length = clock.steps - cooldown, max(cooldown, 1e-6)

        def after(t):
            stable = jnp.minimum(t, start) if cooldown else t
            # max: the branch that `where` discards must not produce a NaN
            root = jnp.sqrt(jnp.maximum(stable - warmup + scale, scale) / scale)
            value = self.decay_floor + (1.0 - self.decay_floor) / root
            if cooldown:
                value += jnp.clip((t - start) / length, 0.0, 1.0) * (self.cooldown_floor - value)
            return self.lr * value

        return _warmed(warmup, self.lr, after)


class Power:
    """The Power scheduler (arXiv 2408.13359): a rate that depends on the tokens seen and on the batch alone.

    With n tokens seen and beta the batch in sequences of 4096 tokens (tokens_per_step / 4096):
    p(n) = min(eta_max, a beta n^b); a linear warmup to p(n_w), then p(n). If `decay` is asked for, over the last of it
    p at its start times `tail`, down to `floor` and not below. The warmup may not be given in "%": then runs of
    different lengths share one curve until the shorter one decays.

    a > 0 (4), b < 0 (-0.51), eta_max > 0 (0.02): the paper's values hold for its muP parametrization; with the standard
    one divide eta_max and a by about width / 256 for the matrices. warmup: 1e9 tokens in the paper.
    """

    def __init__(
        self,
        *,
        a: float = 4.0,
        b: float = -0.51,
        eta_max: float = 0.02,
        warmup: int | str = "1e9 tokens",
        decay: int | str | None = None,
        tail: Tail = "exponential",
        floor: float = 0.0,
    ):
        self.a, self.eta_max = _positive("Power.a", a), _positive("Power.eta_max", eta_max)
        if not b < 0:
            raise UserError(f"Power.b={b} must be negative: the rate falls with the tokens seen.")
        self.b, self.warmup, self.decay = b, warmup, decay
        self.tail, self.floor = _choice("Power.tail", tail, get_args(Tail)), _ratio("Power.floor", floor)

    def __call__(self, clock: Clock) -> Rate:
        warmup = clock.in_steps(self.warmup, "Power.warmup", relative=False)
        tokens_per_step = float(clock.tokens_per_step)
        log_scale = math.log(self.a * tokens_per_step / TOKENS_PER_SEQUENCE)

        def power(t):  # in log space and float32: token counts overflow an int32
            log_n = jnp.log(jnp.maximum(jnp.asarray(t, jnp.float32), 1e-6) * tokens_per_step)
            return jnp.exp(jnp.minimum(math.log(self.eta_max), log_scale + self.b * log_n))

        log_peak = log_scale + self.b * math.log(max(warmup, 1.0) * tokens_per_step)
        peak = math.exp(min(math.log(self.eta_max), log_peak))
        if self.decay is None:
            return _warmed(warmup, peak, power)
        decay = clock.in_steps(self.decay, "Power.decay")
        _fitting("Power", clock, warmup, decay)
        start, length = clock.steps - decay, max(decay, 1e-6)
        return _warmed(
            warmup, peak, lambda t: power(jnp.minimum(t, start)) * tail(self.tail, (t - start) / length, self.floor)
        )
