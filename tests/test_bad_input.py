"""What does not fit is refused: a ValueError that names the argument, says what came, and what is needed."""

import re

import pytest
import torch
from torch import Generator

import nsgf_lite as nl
from nsgf_lite import closed_forms, metrics, toy
from nsgf_lite.fields import exact_plan

NAN, INF = float("nan"), float("inf")


def cloud(n=4, d=2, dtype=torch.float64):
    return torch.randn(n, d, generator=Generator().manual_seed(n), dtype=dtype)


def weights(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def spoiled(x, value):
    x = x.clone()
    x.view(-1)[1] = value
    return x


def refused(call, *parts):
    """The call raises ValueError, and its message has all the parts."""
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} is not in {str(caught.value)!r}"


def with_field(name):
    def call(x, y, eps=0.5, a=None, b=None, **options):
        field = nl.fields.Sinkhorn(eps, **options) if name == "Sinkhorn" else nl.fields.Wasserstein()
        return field(x, y, a=a, b=b)

    return call


SOLVERS = {
    "potentials": nl.potentials,
    "plan": nl.plan,
    "entropic_cost": nl.entropic_cost,
    "sinkhorn_divergence": nl.sinkhorn_divergence,
    "barycentric_map": nl.barycentric_map,
    "fields.Sinkhorn": with_field("Sinkhorn"),
}
# those that take two clouds and weights, without a temperature
EXACT = {
    "fields.Wasserstein": with_field("Wasserstein"),
    "metrics.w2": lambda x, y, eps, a=None, b=None: metrics.w2(x, y, a, b),
    "exact_plan": lambda x, y, eps, a=None, b=None: exact_plan(x, y, a, b),
}
UNWEIGHTED = {
    "metrics.mmd2": lambda x, y, eps: metrics.mmd2(x, y),
    "follow": lambda x, y, eps: nl.follow(nl.fields.Sinkhorn(eps), x, y, 0.1, 1),
}

CLOUDS = {
    "x empty": (lambda: (cloud(0), cloud()), ("x must", r"got \(0, 2\)")),
    "y empty": (lambda: (cloud(), cloud(0)), ("y must", r"got \(0, 2\)")),
    "no dimension": (lambda: (cloud(4, 0), cloud(4, 0)), ("x must", r"got \(4, 0\)")),
    "vector": (lambda: (cloud()[0], cloud()), ("x must have shape", r"got \(2,\)")),
    "four axes": (lambda: (cloud(), cloud()[None, None]), ("y must have shape", r"got \(1, 1, 4, 2\)")),
    "dimensions differ": (lambda: (cloud(), cloud(4, 3)), ("x and y", r"\(4, 2\) and \(4, 3\)")),
    "one is a batch": (lambda: (cloud(), cloud()[None]), ("x and y", r"\(4, 2\) and \(1, 4, 2\)")),
    "batches differ": (
        lambda: (torch.zeros(2, 4, 2), torch.zeros(3, 4, 2)),
        ("x and y", r"\(2, 4, 2\) and \(3, 4, 2\)"),
    ),
    "dtypes differ": (lambda: (cloud(), cloud().float()), ("x and y", "float64", "float32")),
    "devices differ": (lambda: (cloud(), cloud().to("meta")), ("x and y", "cpu", "meta")),
    "integers": (lambda: (cloud().long(), cloud().long()), ("x must be a float32 or float64", "int64")),
    "half precision": (lambda: (cloud().half(), cloud().half()), ("x must be a float32 or float64", "float16")),
    "complex": (lambda: (cloud(), cloud().to(torch.complex64)), ("y must be a float32 or float64", "complex64")),
    "array": (lambda: (cloud().numpy(), cloud()), ("x must be .* tensor", "ndarray")),
    "list": (lambda: (cloud(), [[0.0, 1.0]]), ("y must be .* tensor", "list")),
    "None": (lambda: (cloud(), None), ("y must be .* tensor", "NoneType")),
    "NaN in x": (lambda: (spoiled(cloud(), NAN), cloud()), ("x must be finite",)),
    "inf in y": (lambda: (cloud(), spoiled(cloud(), INF)), ("y must be finite",)),
    "-inf in y": (lambda: (cloud(), spoiled(spoiled(cloud(), INF).flip(0), -INF)), ("y must be finite",)),
}


@pytest.mark.parametrize("function", SOLVERS | EXACT | UNWEIGHTED)
@pytest.mark.parametrize("case", CLOUDS)
def test_clouds(function, case):
    make, parts = CLOUDS[case]
    refused(lambda: (SOLVERS | EXACT | UNWEIGHTED)[function](*make(), 0.5), *parts)


WEIGHTS = {
    "too few": (lambda: weights(0.5, 0.5), ("must have shape", r"\(4,\)", r"got \(2,\)")),
    "a matrix": (lambda: torch.full((4, 4), 1 / 16, dtype=torch.float64), ("must have shape", r"got \(4, 4\)")),
    "negative": (lambda: weights(0.5, 0.7, -0.3, 0.1), ("non-negative", "-0.3")),
    "sum too large": (lambda: weights(0.5, 0.5, 0.5, 0.5), ("must sum to one", "off by 1")),
    "sum slightly off": (lambda: weights(0.25, 0.25, 0.25, 0.25002), ("must sum to one", "off by 2e-05")),
    "all zero": (lambda: weights(0, 0, 0, 0), ("must sum to one", "off by 1")),
    "NaN": (lambda: weights(0.5, NAN, 0.25, 0.25), ("finite", "nan")),
    "inf": (lambda: weights(0.5, INF, 0.25, 0.25), ("finite", "inf")),
    "another dtype": (lambda: weights(0.25, 0.25, 0.25, 0.25, dtype=torch.float32), ("float64",)),
    "another device": (lambda: weights(0.25, 0.25, 0.25, 0.25).to("meta"), ("on cpu", "meta")),
    "list": (lambda: [0.25] * 4, ("must be a tensor", r"got \[0.25")),
}


@pytest.mark.parametrize("function", SOLVERS | EXACT)
@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_weights(function, case, name):
    make, parts = WEIGHTS[case]
    call = (SOLVERS | EXACT)[function]
    refused(lambda: call(cloud(), cloud() + 1, 0.5, **{name: make()}), f"^{name} must", *parts)


def test_weights_within_the_stated_tolerance_pass():
    """Sums are right within 1e-6 in float64 and 1e-4 in float32."""
    x = cloud()
    nl.potentials(x, x + 1, 0.5, weights(0.25, 0.25, 0.25, 0.25 + 9e-7))
    a = weights(0.25, 0.25, 0.25, 0.25 + 9e-5, dtype=torch.float32)
    nl.potentials(x.float(), x.float() + 1, 0.5, a)
    refused(lambda: nl.potentials(x.float(), x.float() + 1, 0.5, a + 1e-4), "a must sum to one")
    refused(lambda: nl.potentials(x, x + 1, 0.5, weights(0.25, 0.25, 0.25, 0.25 + 1.1e-6)), "a must sum to one")


NUMBERS = [
    *(("eps", value) for value in (0, 0.0, -1.0, NAN, INF, "0.1", None, True, [0.1], torch.tensor(0.1))),
    *(("tol", value) for value in (0, -1e-4, NAN, INF, "small", None, True)),
]
STEPS = [0, -5, 2.5, 1e4, NAN, INF, "many", None, True]


@pytest.mark.parametrize("function", SOLVERS)
@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers(function, name, value):
    arguments = {"eps": 0.5, name: value}
    got = re.escape(repr(value))
    refused(lambda: SOLVERS[function](cloud(), cloud() + 1, **arguments), f"^{name} must be a positive", f"got {got}")


@pytest.mark.parametrize("function", [name for name in SOLVERS if name != "fields.Sinkhorn"])
@pytest.mark.parametrize("value", STEPS)
def test_max_iter(function, value):
    call = SOLVERS[function]
    refused(
        lambda: call(cloud(), cloud() + 1, 0.5, max_iter=value),
        "^max_iter must be a positive integer",
        f"got {value!r}",
    )


@pytest.mark.parametrize("function", [nl.potentials, nl.barycentric_map])
def test_init(function):
    x, y = cloud(4), cloud(5)
    small, other = nl.potentials(x, x + 1, 0.5), nl.potentials(x.float(), y.float(), 0.5)
    refused(lambda: function(x, y, 0.5, init=small), "^init must be", r"\(5,\)", r"got \(4,\)")
    refused(lambda: function(x, y, 0.5, init=other), "^init must be", "float64", "got .* torch.float32")
    function(x, y, 0.5, init=nl.potentials(x + 1, y, 0.5))


@pytest.mark.parametrize("method", ["__call__", "potential"])
def test_points_of_a_map(method):
    T = nl.barycentric_map(cloud(), cloud() + 1, 0.5)
    call = getattr(T, method)
    refused(lambda: call(cloud(3, 3)), "points", r"\(4, 2\) and \(3, 3\)")
    refused(lambda: call(cloud(3).float()), "points", "float32")
    refused(lambda: call(cloud(3)[None]), "points", r"\(1, 3, 2\)")
    refused(lambda: call(cloud(0)), "points must", r"\(0, 2\)")
    refused(lambda: call(spoiled(cloud(3), NAN)), "points must be finite")
    refused(lambda: call(cloud(3).long()), "points must", "int64")
    refused(lambda: nl.fields.Sinkhorn(0.5)(cloud(), cloud() + 1, at=cloud(3, 3)), "points", r"\(3, 3\)")


def test_exact_plans_are_for_single_clouds():
    x = torch.zeros(2, 4, 2)
    refused(lambda: nl.fields.Wasserstein()(x, x), r"x must have shape \(n, d\)", r"got \(2, 4, 2\)")
    refused(lambda: exact_plan(x, x), r"x must have shape \(n, d\)", r"got \(2, 4, 2\)")
    refused(lambda: metrics.w2(x, x), r"x must have shape \(n, d\)", r"got \(2, 4, 2\)")
    refused(lambda: metrics.mmd2(x, x), r"x must have shape \(n, d\)", r"got \(2, 4, 2\)")
    refused(lambda: nl.fields.Wasserstein()(x[0], x[0], at=x[0]), "at must be None", "at the particles only")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, "wide"])
def test_bandwidth(value):
    refused(lambda: metrics.mmd2(cloud(), cloud(), value), "bandwidth must be a positive", f"got {value!r}")


@pytest.mark.parametrize("pairs", [1, 0, -1, 2.5, "two"])
def test_floor(pairs):
    refused(lambda: metrics.floor(toy.Moons(), 8, Generator(), pairs=pairs), "pairs must be", f"got {pairs!r}")


FOLLOW = [
    *(({"method": value}, ("method must be one of euler, heun, rk4", value)) for value in ("rk45", "Euler", "")),
    *(({"step": value}, ("step must be a positive", str(value))) for value in (0.0, -0.1, NAN, INF, "half", None)),
    *(
        ({"steps": value}, ("steps must be a positive integer", str(value)))
        for value in (0, -3, 2.0, "ten", None, True)
    ),
    *(({"stop_below": value}, ("stop_below must be", str(value))) for value in (-1.0, NAN, "slow")),
    ({"a": weights(0.5, 0.5)}, ("a must have shape",)),
    ({"b": weights(0.5, 0.7, -0.2, 0.0)}, ("b must be finite and non-negative",)),
]


@pytest.mark.parametrize(("change", "parts"), FOLLOW)
def test_follow(change, parts):
    arguments = {"step": 0.1, "steps": 2} | change
    refused(lambda: nl.follow(nl.fields.Sinkhorn(0.5), cloud(), cloud() + 1, **arguments), *parts)


LAWS = [
    toy.EightGaussians(),
    toy.Moons(),
    toy.SCurve(),
    toy.Checkerboard(),
    toy.Circles(),
    toy.Spiral(),
    toy.Gaussian(),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_sample(law):
    for n in (0, -1, 2.0, "ten", None, True):
        refused(lambda n=n: law.sample(n, Generator()), "n must be a positive integer", f"got {n!r}")
    for generator in (None, 0, torch):
        refused(lambda g=generator: law.sample(3, g), "generator must be a torch.Generator", "got ")
    for dtype in (torch.int64, torch.float16, "float32", None):
        refused(lambda t=dtype: law.sample(3, Generator(), t), "dtype must be", f"got {re.escape(repr(dtype))}")


@pytest.mark.parametrize(
    "covariance",
    [
        ((1.0, 2.0), (2.0, 1.0)),  # indefinite
        ((1.0, 1.0), (1.0, 1.0)),  # singular
        ((1.0, 0.5), (0.0, 1.0)),  # not symmetric
        ((1.0,),),  # too small
        ((NAN, 0.0), (0.0, 1.0)),
    ],
)
def test_covariance_of_a_sample(covariance):
    refused(lambda: toy.Gaussian((0.0, 0.0), covariance).sample(3, Generator()), "covariance must be", "got ")


def test_mean_of_a_sample():
    refused(lambda: toy.Gaussian((0.0, NAN)).sample(3, Generator()), "mean must be finite", "nan")


CLOSED = {
    "gaussian_ot": lambda a=0.0, A=1.0, b=1.0, B=2.0, eps=0.5: closed_forms.gaussian_ot(a, A, b, B, eps),
    "gaussian_divergence": lambda a=0.0, A=1.0, b=1.0, B=2.0, eps=0.5: closed_forms.gaussian_divergence(
        a, A, b, B, eps
    ),
    "gaussian_velocity": lambda a=0.0, A=1.0, b=1.0, B=2.0, eps=0.5: closed_forms.gaussian_velocity(a, A, b, B, eps),
    "gaussian_map": lambda A=1.0, B=2.0, eps=0.5: closed_forms.gaussian_map(A, B, eps),
    "two_atom_mass": lambda eps=0.5: closed_forms.two_atom_mass(0.7, 0.4, 2.0, eps),
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("eps", [0.0, -1.0, NAN, INF, "0.1", None])
def test_temperature_of_closed_forms(name, eps):
    CLOSED[name]()
    refused(lambda: CLOSED[name](eps=eps), "eps must be", f"got {eps!r}")


BAD_COVARIANCES = [
    (0.0, "positive definite"),
    (-1.0, "positive definite"),
    (NAN, "A must|B must"),
    ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
    ([[1.0, 1.0], [1.0, 1.0]], "positive definite"),
    ([[1.0, 0.5], [0.0, 1.0]], "symmetric"),
    ([1.0, 2.0], "symmetric"),
    ([[1.0, 2.0]], "symmetric"),
    ("one", "A must|B must"),
]


@pytest.mark.parametrize("name", [name for name in CLOSED if name.startswith("gaussian")])
@pytest.mark.parametrize(("covariance", "need"), BAD_COVARIANCES)
def test_covariances_of_closed_forms(name, covariance, need):
    refused(lambda: CLOSED[name](A=covariance), "^A must", need, "got")
    refused(lambda: CLOSED[name](B=covariance), "^B must", need, "got")


@pytest.mark.parametrize("name", ["gaussian_ot", "gaussian_divergence", "gaussian_velocity"])
def test_means_of_closed_forms(name):
    refused(lambda: CLOSED[name](a=[0.0, 1.0]), "^a must have 1 entries", "got 2")
    refused(lambda: CLOSED[name](b=[0.0, 1.0]), "^b must have 1 entries", "got 2")
    refused(lambda: CLOSED[name](a=NAN), "^a must be finite", "nan")
    refused(lambda: CLOSED[name](b=INF), "^b must be finite", "inf")
    two = [[1.0, 0.0], [0.0, 1.0]]
    refused(lambda: CLOSED[name](A=two, a=[0.0, 0.0]), "A and B must have one size", r"\(2, 2\) and \(1, 1\)")


FLOW = {"m": 0.0, "S": 1.0, "target_mean": 1.0, "target_covariance": 2.0, "eps": 0.5, "times": [0.0, 1.0]}


@pytest.mark.parametrize("name", ["S", "target_covariance"])
@pytest.mark.parametrize(("covariance", "need"), BAD_COVARIANCES)
def test_covariances_of_the_gaussian_flow(name, covariance, need):
    need = need.replace("A must|B must", f"{name} must")
    refused(lambda: closed_forms.gaussian_flow(**FLOW | {name: covariance}), f"^{name} must", need, "got")


def test_gaussian_flow():
    flow = closed_forms.gaussian_flow
    flow(**FLOW)
    two = [[1.0, 0.0], [0.0, 1.0]]
    refused(lambda: flow(**FLOW | {"S": two}), "S and target_covariance must have one size", r"\(2, 2\) and \(1, 1\)")
    for name in ("m", "target_mean"):
        refused(lambda name=name: flow(**FLOW | {name: [0.0, 1.0]}), f"^{name} must have 1 entries", "got 2")
        refused(lambda name=name: flow(**FLOW | {name: NAN}), f"^{name} must be finite", "nan")
    for eps in (0.0, -1.0, NAN, INF, "0.1", None):
        refused(lambda eps=eps: flow(**FLOW | {"eps": eps}), "eps must be a positive", f"got {eps!r}")


@pytest.mark.parametrize(
    "times", [[], [-0.1, 1.0], [0.0, 0.0], [1.0, 0.5], [0.0, NAN], [0.0, INF], [[0.0, 1.0]], 1.0, "now", None]
)
def test_times_of_the_gaussian_flow(times):
    refused(lambda: closed_forms.gaussian_flow(**FLOW | {"times": times}), "^times must be increasing", "got ")


@pytest.mark.parametrize("mass", [0.0, 1.0, -0.1, 1.1, NAN, "half"])
def test_masses_of_two_atoms(mass):
    refused(lambda: closed_forms.two_atom_mass(mass, 0.4, 2.0, 0.5), "alpha must", f"got {mass!r}")
    refused(lambda: closed_forms.two_atom_mass(0.7, mass, 2.0, 0.5), "beta must", f"got {mass!r}")


@pytest.mark.parametrize("distance", [0.0, -1.0, NAN, "far"])
def test_distance_of_two_atoms(distance):
    refused(lambda: closed_forms.two_atom_mass(0.7, 0.4, distance, 0.5), "distance must", f"got {distance!r}")


JKO = {"mean": 0.0, "covariance": 1.0, "target_mean": 1.0, "target_covariance": 2.0}


@pytest.mark.parametrize("name", ["covariance", "target_covariance"])
@pytest.mark.parametrize(("covariance", "need"), BAD_COVARIANCES)
def test_covariances_of_steps_between_gaussians(name, covariance, need):
    need = need.replace("A must|B must", f"{name} must")
    for function in (closed_forms.gaussian_kl, closed_forms.gaussian_chi2):
        refused(lambda function=function: function(**JKO | {name: covariance}), f"^{name} must", need, "got")
    refused(lambda: closed_forms.jko_gaussian(**JKO | {name: covariance}, step=0.1), f"^{name} must", need, "got")


def test_steps_between_gaussians():
    step = closed_forms.jko_gaussian
    for scheme in ("jko", "explicit", "crank-nicolson", "trapezoid"):
        step(**JKO, step=0.1, scheme=scheme)
    for size in (0.0, -1.0, NAN, INF, "0.1", None, True):
        refused(lambda size=size: step(**JKO, step=size), "^step must be a positive", f"got {size!r}")
    refused(lambda: step(**JKO, step=0.1, scheme="euler"), "^scheme must be one of jko", "got 'euler'")
    refused(lambda: step(**JKO | {"mean": [0.0, 1.0]}, step=0.1), "^mean must have 1 entries", "got 2")
    refused(lambda: step(**JKO | {"target_mean": NAN}, step=0.1), "^target_mean must be finite", "nan")
    refused(lambda: step(0.0, 0.01, 0.0, 1.0, 0.5, "crank-nicolson"), "^step must leave", "got 0.5")
    refused(lambda: step(0.0, 4.0, 0.0, 1.0, 4 / 3, "explicit"), "^step must not flatten", "got 1.33")
    assert closed_forms.gaussian_chi2(0.0, 2.0, 0.0, 1.0) == INF


@pytest.mark.parametrize("t", [-0.1, NAN, INF, "late", None, True])
def test_ou_moments(t):
    refused(lambda: closed_forms.ou_moments(t, 1.0, 0.0), "^t must be a non-negative", f"got {t!r}")


def test_sizes_of_ou_moments():
    two = [[1.0, 0.0], [0.0, 2.0]]
    refused(lambda: closed_forms.ou_moments(1.0, two, [0.0]), "^b must have 2 entries", "got 1")
    refused(lambda: closed_forms.ou_moments(1.0, two, [0.0, NAN]), "^b must be finite", "nan")
    refused(lambda: closed_forms.ou_moments(1.0, 1.0, 0.0, [0.0, 0.0]), "^mean must have 1 entries", "got 2")
    refused(lambda: closed_forms.ou_moments(1.0, two, [0.0, 0.0], None, 1.0), "one size", r"\(2, 2\) and \(1, 1\)")
    for covariance, need in BAD_COVARIANCES[:-1]:
        refused(lambda A=covariance: closed_forms.ou_moments(1.0, A, 0.0), "^A must", need.replace("|B must", ""))
        refused(lambda S=covariance: closed_forms.ou_moments(1.0, 1.0, 0.0, None, S), "^covariance must", "got")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, "one", None, True])
def test_barenblatt(value):
    x = cloud(3, 1)
    refused(lambda: closed_forms.barenblatt(value, x, 2.0), "^t must be a positive", f"got {value!r}")
    refused(lambda: closed_forms.barenblatt(1.0, x, value), "^m must be", f"got {value!r}")


def test_exponent_and_points_of_barenblatt():
    refused(lambda: closed_forms.barenblatt(1.0, cloud(3, 1), 1.0), "m must be greater than 1", "got 1.0")
    refused(lambda: closed_forms.barenblatt(1.0, cloud(3, 1)[:, 0], 2.0), "x must have shape", r"got \(3,\)")
    refused(lambda: closed_forms.barenblatt(1.0, spoiled(cloud(3, 1), NAN), 2.0), "x must be finite")
    refused(lambda: closed_forms.barenblatt(1.0, [[0.0]], 2.0), "x must be .* tensor", "got list")


def test_checks(monkeypatch):
    refused(lambda: nl.check("claim", 1.0), "give a bound")
    refused(lambda: nl.check("claim", torch.ones(2), below=1), "single number", r"got shape \(2,\)")
    refused(lambda: nl.check("claim", torch.ones(1, 1), below=2), "single number", r"got shape \(1, 1\)")
    refused(lambda: nl.check("claim", torch.ones(0), below=2), "single number", r"got shape \(0,\)")
    refused(lambda: nl.check("claim", "small", below=2), "single number", "got 'small'")
    refused(lambda: nl.check("claim", "1.0", below=2), "single number", "got '1.0'")
    refused(lambda: nl.check("claim", 1.0, below="2"), "bound", "got '2'")
    refused(lambda: nl.check("claim", [1.0, 2.0], below=2), "single number", r"got \[1.0, 2.0\]")
    refused(lambda: nl.check("claim", None, below=2), "single number", "got None")
    refused(lambda: nl.check("claim", 1.0, below=NAN), "bound", "nan")
    refused(lambda: nl.check("claim", 1.0, above=-INF), "bound", "inf")
    monkeypatch.setenv("NSGF_SCALE", "huge")
    refused(lambda: nl.scale(1, 2), "NSGF_SCALE must be 'fast' or 'full'", "got 'huge'")


def test_plots():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    refused(lambda: nl.plots.cloud(ax, cloud(4, 3)), r"x must have shape \(n, 2\)", r"got \(4, 3\)")
    refused(lambda: nl.plots.cloud(ax, cloud()[None]), r"x must have shape \(n, 2\)", r"got \(1, 4, 2\)")
    refused(lambda: nl.plots.arrows(ax, cloud(4), cloud(5)), "x and v must", r"\(4, 2\) and \(5, 2\)")
    plt.close(figure)
    refused(lambda: nl.plots.frames(lambda v: figure, [1], "n", "{value}"), "values must be 2 to 40", "got 1")
    refused(lambda: nl.plots.frames(lambda v: figure, range(41), "n", "{value}"), "values must be 2 to 40", "got 41")
    refused(lambda: nl.plots.frames(lambda v: figure, [1, 2], "n", "a picture"), r"alt must contain \{value\}")
