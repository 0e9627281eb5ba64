"""Bayesian logistic regression: the posterior as a density to sample from, and three laws of data with two classes."""

import math
from dataclasses import dataclass

import torch
from scipy.special import gammaincinv
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from nsgf_lite.inputs import exact, read_clouds, read_counts, read_parameters
from nsgf_lite.toy import _check, _normal, _uniform


def _read_data(X: Tensor, t: Tensor) -> None:
    read_clouds(X=X)
    if X.ndim != 2:
        raise ValueError(f"X must have shape (S, q), one row of features for each case, got {tuple(X.shape)}")
    if not isinstance(t, Tensor) or t.shape != X.shape[:1] or not bool((t.abs() == 1).all()):
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"t must have shape ({len(X)},) and values -1 and 1, one for each row of X, got {got}")


def _read_samples(x: Tensor, q: int) -> None:
    read_clouds(x=x)
    if x.ndim != 2 or x.shape[1] != q + 1:
        raise ValueError(f"x must have shape (n, {q + 1}): {q} weights and log alpha, got {tuple(x.shape)}")


@dataclass(frozen=True, eq=False)
class LogisticPosterior:
    """Posterior of ``x = [w, log alpha]`` given cases X (S, q) and classes t (S,), -1 or 1; dimension q + 1.

    ``alpha ~ Gamma(shape, rate)`` with density proportional to ``alpha^{shape-1} exp(-rate alpha)``, ``w | alpha`` is
    N(0, I/alpha), and ``P(t = 1 | w) = 1 / (1 + exp(-w . X))``. There is no intercept: give X a column of ones to have
    one. The density is that of log alpha, and so has alpha, the Jacobian, as a factor.

    Parameters
    ----------
    X, t : Tensor
        The cases and their classes.
    shape, rate : float
        Of the prior of alpha. The papers write Gamma(1, 0.01); the gradient in the code of Liu and Wang reads 0.01 as
        the rate, as here by default. The codes of Mokrov et al. and of Fan et al. read it as the scale: ``rate=100``.

    Raises
    ------
    ValueError
        If the cases are not a cloud, a class is another number, or shape or rate is not positive; when called, if the
        points are not of dimension q + 1.

    Source
    ------
    Gershman, Hoffman, Blei (2012); Liu and Wang (2016), Section 5; Fan et al. (2022), Section 5.3.
    """

    X: Tensor
    t: Tensor
    shape: float = 1.0
    rate: float = 0.01

    def __post_init__(self) -> None:
        _read_data(self.X, self.t)
        read_parameters(self, positive="shape rate")

    @exact
    def log_density(self, x: Tensor) -> Tensor:
        """Log of prior times likelihood at points x (n, q + 1), shape (n,); the prior is normalised.

        It holds n times S numbers at once.
        """
        q = self.X.shape[1]
        _read_samples(x, q)
        w, log_alpha = x[:, :-1], x[:, -1]
        alpha = log_alpha.exp()
        weights = q / 2 * (log_alpha - math.log(2 * math.pi)) - alpha * w.square().sum(1) / 2
        constant = self.shape * math.log(self.rate) - math.lgamma(self.shape)
        precision = constant + self.shape * log_alpha - self.rate * alpha
        return weights + precision + logsigmoid(w @ self._signed(x).T).sum(1)

    def _signed(self, x: Tensor) -> Tensor:
        return self.X.to(x) * self.t.to(x).unsqueeze(1)

    def prior(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points from the prior, shape (n, q + 1)."""
        u = _uniform(n, generator, torch.float64).clamp(1e-300, 1 - 1e-16)
        noise = _normal(n, generator, torch.float64, self.X.shape[1])
        _check(n, generator, dtype)
        alpha = torch.from_numpy(gammaincinv(self.shape, u.cpu().numpy())).to(u) / self.rate
        alpha = alpha.clamp_min(torch.finfo(dtype).tiny).unsqueeze(1)
        return torch.cat([noise / alpha.sqrt(), alpha.log()], 1).to(dtype)


@exact
@torch.no_grad()
def predictive(x: Tensor, X: Tensor, t: Tensor) -> tuple[float, float]:
    """Accuracy, and mean log likelihood of a case, on X (S, q) and t (S,) by posterior samples x (n, q + 1).

    The probability of a case's class is the mean over the samples; it is right where that is more than one half.

    Raises
    ------
    ValueError
        If samples, cases and classes do not fit one another.

    Source
    ------
    Liu and Wang (2016), as in their code.
    """
    _read_data(X, t)
    _read_samples(x, X.shape[1])
    signed = (X.double() * t.double().unsqueeze(1)).to(x.device)
    total = signed.new_full((len(X),), -math.inf)
    for part in x.double().split(max(1, 2**22 // len(X))):
        total = torch.logaddexp(total, torch.logsumexp(logsigmoid(part[:, :-1] @ signed.T), 0))
    log_probability = total - math.log(len(x))
    return float((log_probability > -math.log(2)).double().mean()), float(log_probability.mean())


def _classes(n: int, generator: Generator, dtype: torch.dtype, share: float) -> Tensor:
    """Classes -1 and 1, the second with probability `share`."""
    return torch.where(_uniform(n, generator, dtype) < share, 1.0, -1.0).to(dtype)


class Labelled:
    """A law of cases with classes."""

    def labelled(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Draw n cases, shape (n, q), and their classes -1 and 1, shape (n,)."""
        raise NotImplementedError

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n cases, shape (n, q)."""
        return self.labelled(n, generator, dtype)[0]


@dataclass(frozen=True)
class Twonorm(Labelled):
    """Two normal classes, equally likely: ``N(t a, I)`` with all entries of a equal to ``2 / sqrt(d)``.

    Source
    ------
    Breiman (1996), Bias, variance, and arcing classifiers.
    """

    d: int = 20

    def __post_init__(self) -> None:
        read_counts(d=self.d)

    def labelled(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Draw n cases, shape (n, d), and their classes -1 and 1, shape (n,)."""
        t = _classes(n, generator, dtype, 0.5)
        return 2 / math.sqrt(self.d) * t.unsqueeze(1) + _normal(n, generator, dtype, self.d), t


@dataclass(frozen=True)
class Ringnorm(Labelled):
    """One normal class within the other: N(0, 4I) if t = 1, N(a, I) if t = -1, entries of a equal to ``2 / sqrt(d)``.

    Breiman's a, which the recorded copies of the set have; later generators halve it.

    Source
    ------
    Breiman (1996), Bias, variance, and arcing classifiers.
    """

    d: int = 20

    def __post_init__(self) -> None:
        read_counts(d=self.d)

    def labelled(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Draw n cases, shape (n, d), and their classes -1 and 1, shape (n,)."""
        t = _classes(n, generator, dtype, 0.5)
        z, inner = _normal(n, generator, dtype, self.d), (t < 0).unsqueeze(1)
        return torch.where(inner, 2 / math.sqrt(self.d) + z, 2 * z), t


@dataclass(frozen=True)
class Waveform(Labelled):
    """Two of three triangular waves, mixed by a uniform share, with unit noise at 21 places; t = 1 for one pair.

    The waves are ``max(6 - |i - c|, 0)`` at i = 1…21 with c = 11, 15, 7. The pair 11 and 7 has class 1, and a third of
    the cases; the others have class -1, as in the benchmark's version with two classes.

    Source
    ------
    Breiman, Friedman, Olshen, Stone (1984), pages 49 to 55; Breiman (1996).
    """

    def labelled(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Draw n cases, shape (n, 21), and their classes -1 and 1, shape (n,)."""
        pair = torch.floor(3 * _uniform(n, generator, dtype)).clamp_max(2).long()
        place = torch.arange(1, 22, dtype=dtype, device=generator.device)
        peaks = torch.tensor([[11.0, 7.0], [11.0, 15.0], [15.0, 7.0]], dtype=dtype, device=generator.device)
        wave = (6 - (place - peaks[pair].unsqueeze(-1)).abs()).clamp_min(0)
        share = _uniform(n, generator, dtype).unsqueeze(1)
        mixed = share * wave[:, 0] + (1 - share) * wave[:, 1]
        return mixed + _normal(n, generator, dtype, 21), torch.where(pair == 0, 1.0, -1.0).to(dtype)
