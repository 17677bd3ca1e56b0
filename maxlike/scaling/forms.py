"""Forms of scaling laws: sums of power terms, in logarithms."""

import dataclasses

import numpy as np

from maxlike.errors import UserError

EXPONENT = 20.0  # no exponent is searched beyond this
PREFACTOR = 16.0  # nor a prefactor beyond e^+-16 of the middle of the data


@dataclasses.dataclass(frozen=True)
class Term:
    """prefactor * product of variable^exponent. powers: (variable, name of its exponent); divides: the exponents are
    written as divisors, A / N^alpha with alpha >= 0. A term without powers is a constant."""

    prefactor: str
    powers: tuple[tuple[str, str], ...] = ()
    divides: bool = False

    def __str__(self) -> str:
        if self.divides:
            return f"{self.prefactor} / " + " ".join(f"{variable}^{exponent}" for variable, exponent in self.powers)
        return " ".join([self.prefactor, *(f"{variable}^{exponent}" for variable, exponent in self.powers)])


@dataclasses.dataclass(frozen=True)
class Form:
    """y = sum of positive terms. name: as `--form` takes it. variables: of the law, in the order of columns of x.

    Its parameters are a flat vector: for each term the logarithm of its prefactor and then its exponents as powers,
    which for a term that divides are the negative of what is reported.
    """

    name: str
    variables: tuple[str, ...]
    terms: tuple[Term, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for term in self.terms for name in (term.prefactor, *(name for _, name in term.powers)))

    @property
    def log_linear(self) -> bool:
        """Whether the logarithm of y is linear in the parameters: the fit is then convex."""
        return len(self.terms) == 1

    def log_y(self, theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
        """theta: [..., parameters]; log_x: [points, variables]; returns [..., points]."""
        return np.logaddexp.reduce(self.log_terms(theta, log_x), axis=-2)

    def log_y_and_slopes(self, theta: np.ndarray, log_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log y [..., points] and its derivative by the parameters [..., points, parameters]."""
        logs = self.log_terms(theta, log_x)
        log_y = np.logaddexp.reduce(logs, axis=-2)
        shares = np.exp(logs - log_y[..., None, :])
        columns = []
        for index, term in enumerate(self.terms):
            share = shares[..., index, :]
            columns.append(share)
            columns += [share * log_x[:, self.variables.index(variable)] for variable, _ in term.powers]
        return log_y, np.stack(columns, -1)

    def shifted(self, theta: np.ndarray, log_x: np.ndarray, log_y: float) -> np.ndarray:
        """The parameters for x and y multiplied by e^log_x [variables] and e^log_y. theta: [..., parameters]."""
        out = np.array(theta)
        for place, indices in self._places():
            for offset, variable in enumerate(indices, 1):
                out[..., place] -= theta[..., place + offset] * log_x[variable]
            out[..., place] += log_y
        return out

    def bounds(self) -> list[tuple[float, float]]:
        """Of the parameters, for centred data."""
        out = []
        for term in self.terms:
            out.append((-PREFACTOR, PREFACTOR))
            out += [(-EXPONENT, 0.0 if term.divides else EXPONENT)] * len(term.powers)
        return out

    def reported(self, theta: np.ndarray) -> np.ndarray:
        """Parameters as they are written: prefactors themselves, divisors' exponents positive. theta: [..., p]."""
        out = np.array(theta)
        for term, (place, indices) in zip(self.terms, self._places()):
            with np.errstate(over="ignore"):  # an end of an interval may be infinite, which is what is known then
                out[..., place] = np.exp(theta[..., place])
            if term.divides:
                out[..., place + 1 : place + 1 + len(indices)] *= -1
        return out

    def __str__(self) -> str:
        return "y = " + " + ".join(str(term) for term in self.terms)

    def _places(self) -> list[tuple[int, list[int]]]:
        """(place of the prefactor, columns of the variables) of each term."""
        places, place = [], 0
        for term in self.terms:
            places.append((place, [self.variables.index(variable) for variable, _ in term.powers]))
            place += 1 + len(term.powers)
        return places

    def log_terms(self, theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
        """Logarithms of the terms, [..., terms, points]."""
        theta = np.asarray(theta)
        logs = []
        for place, indices in self._places():
            exponents = theta[..., place + 1 : place + 1 + len(indices)]
            logs.append(theta[..., place, None] + exponents @ log_x[:, indices].T)
        return np.stack(logs, -2)


def power_law(variables: tuple[str, ...] = ("x",), *, floor: bool = False) -> Form:
    """y = a x^b, or a x1^b_x1 x2^b_x2 ... of several variables; with a floor + c, c >= 0."""
    _check(variables)
    named = [(variable, "b" if len(variables) == 1 else f"b_{variable}") for variable in variables]
    terms = (Term("a", tuple(named)), *((Term("c"),) if floor else ()))
    return Form("power+floor" if floor else "power", tuple(variables), terms)


def chinchilla(variables: tuple[str, str] = ("N", "D")) -> Form:
    """y = E + A / N^alpha + B / D^beta, for parameters N and tokens D (Hoffmann et al., arXiv 2203.15556, eq. 10)."""
    _check(variables)
    if len(variables) != 2:
        raise UserError(
            f"the form chinchilla takes two variables, parameters and tokens, and was given {len(variables)}: "
            "name two with --x, or take --form power"
        )
    size, data = variables
    terms = (Term("E"), Term("A", ((size, "alpha"),), divides=True), Term("B", ((data, "beta"),), divides=True))
    return Form("chinchilla", (size, data), terms)


def of_name(name: str, variables: tuple[str, ...]) -> Form:
    """The form that `Form.name` names."""
    if name == "chinchilla":
        return chinchilla(variables)
    if name in ("power", "power+floor"):
        return power_law(variables, floor=name == "power+floor")
    raise UserError(f"there is no law of the form {name!r}: take power, power+floor or chinchilla")


def _check(variables: tuple[str, ...]) -> None:
    if not variables or len(set(variables)) != len(variables):
        raise UserError(f"a law needs variables of different names and was given {tuple(variables)}: correct --x")
