"""The audit: verdicts for every shipped process, written by hand after the mathematics, and figures of its findings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from dpm_scales.audit import audit, forward, invariances, reverse
from dpm_scales.audit.corrections import corrections
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import Lab
from dpm_scales.audit.steady import steady_state
from dpm_scales.audit.transitions import preserving, reverse_step
from dpm_scales.errors import UserError
from dpm_scales.operators import HeatOperator, Operator, OsmosisOperator
from dpm_scales.processes import (
    VE,
    VP,
    BlurringChain,
    Context,
    Homogeneous,
    InverseHeat,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
)
from dpm_scales.rng import Randomness
from dpm_scales.schedules import (
    ConstantBeta,
    ConstantNoise,
    LinearTimeBlur,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    NoNoise,
)
from support.audit_helpers import Verdicts, by_name, finding, photo, verdicts
from support.oracles import refused
from support.reference import TWINS, Twin, dct_basis, eigenvalues
from support.shell import CONFIGS, composed

SHORT = {
    "E": Verdict.EXACTLY,
    "L": Verdict.IN_LAW,
    "M": Verdict.IN_EXPECTATION,
    "C": Verdict.CORRECTED,
    "V": Verdict.VIOLATED,
    "-": Verdict.NOT_APPLICABLE,
}
FORWARD = (
    *("initial state", "Markov property", "transition from the initial state"),
    *("variance-preserving transition", "semigroup"),
    *("conditional entropy", "condition for the entropy", "entropy by the determinant"),
    *("permutation of pixels", "steady state", "bound of the noise"),
    *("average grey value", "rotation by 90 degrees", "positivity", "relative entropy"),
)
REVERSE = (
    *("transition", "initial state", "semigroup", "entropy of the images", "entropy of the data given an image"),
    *("bounds of a reverse step's entropy", "steady state"),
    *("permutation of pixels", "rotation by 90 degrees", "average grey value"),
)
#: forward and reverse, in the order of the names above
EXPECTED = {
    "vp": ("ELCLL ECE ELC -L--", "LLLEEEL -L-"),
    "ve": ("ELC-L EEE E-- -L--", "LCLEEEL -L-"),
    "heat": ("ELC-L ECC -CC ML--", "LCLVECL -LM"),
    "blurring_constant": ("ELC-L ECC -CC ML--", "LCLVECL -LM"),
    "blurring": ("ELC-L ECC -CC VL--", "LLLEEEL -LV"),
    "blurring_chain": ("ELC-L VCC -CC ML--", "LCLVECL -LM"),
    "homogeneous": ("EEE-E --- -E- EE--", "--EV--- -EE"),
    "osmosis": ("EEE-E --- -C- ELEE", "--EV--- -LE"),
    "inverse_osmosis": ("ELC-L ECC -CC MLMM", "LCLVECL -LM"),
    "osmosis_diffusion": ("ELC-L ECC -CC VL--", "LCLEEEL -LV"),
    "rectified": ("ELC-L ECC -CC VL--", "LLLVECL -LV"),
    "hdfm": ("ELC-L ECC -CC VL--", "LLLVECL -LV"),
    "warm": ("ELC-L ECC -CC ML--", "LCLEEEL -LM"),
    "equal_snr": ("ELCLL ECC -CC VL--", "LLLEEEL -LV"),
    "power_law": ("ELC-L ECC -CC VL--", "LCLEEEL -LV"),
    "flicker": ("ELC-L ECC -CC VL--", "LCLEEEL -LV"),
    "low_pass_flow": ("ELC-L ECC -CC VL--", "LLLVECL -LV"),
    "cut_off": ("ELC-L ECC -CC VL--", "LLLEEEL -LV"),
}
#: refused: frequencies whose clock has not started have no density
UNCHECKED = ["clocked"]


def shipped(name: str) -> Process:
    process = instantiate(composed(f"process={name}", "out=x", name="evolve").process, _convert_="all")
    assert isinstance(process, Process)
    return process


def read(forward: str, reverse: str) -> Verdicts:
    """A line of the table above."""
    found = {("forward", name): SHORT[c] for name, c in zip(FORWARD, forward.replace(" ", ""), strict=True)}
    return found | {("reverse", name): SHORT[c] for name, c in zip(REVERSE, reverse.replace(" ", ""), strict=True)}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_shipped_process() -> None:
    assert sorted([*EXPECTED, *UNCHECKED]) == sorted(path.stem for path in (CONFIGS / "process").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_shipped_processes(name: str) -> None:
    assert verdicts(audit(shipped(name), photo(), samples=400)) == read(*EXPECTED[name])


@pytest.mark.parametrize("name", UNCHECKED)
def test_frequencies_without_noise_are_refused(name: str) -> None:
    with refused("clock", "without noise", "spread=0"):
        audit(shipped(name), photo())


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_any_schedule_keeps_its_law(twin: Twin) -> None:
    """What the constructor accepts is Markov, a semigroup and turns with its image, on images of any size and shape."""
    found = verdicts(audit(twin.build(), photo(12, 7), samples=200))
    for name in ("Markov property", "transition from the initial state", "semigroup", "rotation by 90 degrees"):
        assert found["forward", name] is not Verdict.VIOLATED, name
    for name in ("semigroup", "steady state", "bounds of a reverse step's entropy", "rotation by 90 degrees"):
        assert found["reverse", name] is not Verdict.VIOLATED, name
    grows = twin.chain_noise is None
    assert (found["forward", "conditional entropy"] is not Verdict.VIOLATED) or not grows


def test_steps_that_add_nothing_are_no_contradiction() -> None:
    process = InverseHeat(4, blur=ListedBlurSigmas([1, 1, 2, 2]))
    for seed in range(3):
        row = finding(forward.markov, process, seed=seed, samples=200)
        assert row.verdict is Verdict.IN_LAW


def test_products_of_the_betas_by_hand() -> None:
    """Eq. (15) for beta = 0.6, three steps: variance 1 - 0.64^3; a schedule that is truncated has one beta before."""
    row = finding(preserving, VP(3, ConstantBeta(0.6)), samples=400)
    assert row.verdict is Verdict.IN_LAW and row.measured < 1e-9
    assert f"{1 - 0.64**2:.4g} there" in row.note and row.drawn is not None and row.std_error is not None
    assert abs(row.drawn) < 5 * row.std_error and row.std_error == pytest.approx((2 / (400 * 54)) ** 0.5)
    assert finding(preserving, VP(8), samples=100).verdict is Verdict.IN_LAW
    other = finding(preserving, VE(8), samples=100)
    assert other.verdict is Verdict.NOT_APPLICABLE and "alpha = 1 and beta" in other.note


def test_step_back_by_hand() -> None:
    """Eq. (32) without correlation would be a scalar; Sigma of one step, by the formula for a Gaussian's posterior."""
    process = VP(2, ConstantBeta(0.6))
    lab = Lab(process, photo(), samples=100)
    values = np.linalg.eigvalsh(lab.data_covariance.numpy())
    steps = []
    for keep, added in ((0.64, 0.36), (0.64, 0.36)):
        total = keep * values + added
        steps.append(np.ptp(values * added / total) / (values * added / total).mean())
        values = total
    row = finding(reverse_step, process, samples=100)
    assert row.verdict is Verdict.IN_LAW and row.measured < 1e-6
    assert f"up to {max(steps):.3g} of their mean, at t = {0.5 * steps.index(max(steps)):.3g}" in row.note


def test_only_processes_without_blur_take_permutations() -> None:
    for process in (VP(8, ConstantBeta(0.1)), VE(8)):
        assert finding(invariances.permutation, process, samples=100).verdict is Verdict.EXACTLY
    row = finding(invariances.permutation, Homogeneous(8), samples=100)
    assert row.verdict is Verdict.NOT_APPLICABLE and row.measured > 0.1


# --- figures ----------------------------------------------------------------------------------------------------------


def test_printed_and_true_numbers() -> None:
    """By hand: Eq. (14) is a geometric series of beta, the truth one of beta^2."""
    keep, rows = math.sqrt(0.99), corrections(3)
    first = rows[0]
    assert first.printed == pytest.approx(0.1 * (1 - keep**100) / (1 - keep))
    assert first.printed == pytest.approx(7.9, abs=0.05)
    assert first.true == pytest.approx(math.sqrt(1 - 0.99**100)) and first.true == pytest.approx(0.796, abs=5e-4)
    by_source = {row.example: row for row in rows}
    assert len(by_source) == len(rows) == 9
    for row in rows:
        assert abs(row.measured - row.true) < 5 * row.std_error, row.example
        assert row.printed is None or abs(row.measured - row.printed) > 10 * row.std_error, row.example
    bound, limit = rows[2], rows[3]
    assert bound.printed == pytest.approx(0.1 / (1 - keep)) and bound.true == pytest.approx(1, abs=1e-4)
    assert limit.printed == pytest.approx(math.sqrt(2)) and limit.true == pytest.approx(math.sqrt(4 / 3))
    walk = next(row for row in rows if "random walk" in row.example)
    assert walk.true == pytest.approx(0.1 * math.sqrt(200 / 54))


def test_condition_is_misprinted_only_where_the_signal_falls() -> None:
    """With alpha = 1 both conditions say beta >= 0."""
    for process, verdict in ((VE(6), Verdict.EXACTLY), (VP(6), Verdict.CORRECTED)):
        row = finding(forward.entropy_condition, process, samples=100)
        assert row.verdict is verdict and bool(row.corrected) == (verdict is Verdict.CORRECTED)


def test_entropy_is_a_sum_in_which_one_frequency_may_fall() -> None:
    """Five equal steps, then one that is longer: by the recursion of Eq. (36), frequency by frequency."""
    times = [*(0.02 * k for k in range(1, 6)), 0.128]
    row = finding(forward.conditional_entropy, BlurringChain(6, 0.1, ListedDissipationTimes(times)), samples=1000)
    mu = np.pi**2 * np.add.outer(np.arange(6) ** 2 / 36, np.arange(9) ** 2 / 81).ravel()
    variances = [np.full_like(mu, 0.01)]
    for step in np.diff(times):
        variances.append(np.exp(-2 * mu * step) * variances[-1] + 0.01)
    rises = 0.5 * np.diff(np.log(variances), axis=0)
    assert rises.min() < -1e-4 and rises.mean(1).min() > 0
    assert row.verdict is Verdict.EXACTLY and "one frequency falls" in row.note
    assert row.measured == pytest.approx(rises.mean(1).min(), rel=1e-9)
    assert row.drawn is not None and row.std_error is not None and 0 < row.std_error < 0.006
    assert abs(row.drawn - row.measured) < 5 * row.std_error


def test_noise_of_ones_own_under_blur_is_no_chain_with_one_beta() -> None:
    process = InverseHeat(4, ListedNoise([0.05, 0.08, 0.1, 0.1]), ListedDissipationTimes([1.0, 10.0, 100.0, 1000.0]))
    row = finding(steady_state, process, samples=200)
    assert row.verdict is Verdict.CORRECTED and "at every frequency" in row.note
    assert "gamma_1^2 I" in row.corrected and "sum beta" not in row.corrected
    assert "sum beta_k^2" in finding(steady_state, BlurringChain(20), samples=200).corrected


@pytest.mark.parametrize("level", [0, 20])
def test_dark_images(level: int) -> None:
    """The guidance image is then far from flat, and a black image has no steady state."""
    image = (photo() // 13).clamp(max=level)
    assert finding(steady_state, OsmosisDiffusion(50), image, samples=200).verdict is Verdict.CORRECTED
    row = finding(invariances.osmosis_entropy, OsmosisFilter(8), image, samples=100)
    assert row.verdict is (Verdict.EXACTLY if level else Verdict.NOT_APPLICABLE)


def test_mean_of_noisy_osmosis_stays_positive() -> None:
    """Where d_min > 0 a single transition sharpens; the marginal, a sum of positive parts, does not."""
    row = finding(invariances.positivity, OsmosisDiffusion(20, value_range=(0.0, 1.0)), samples=100)
    assert row.verdict is Verdict.IN_EXPECTATION and row.measured >= -1e-5


class OwnOsmosis(Process):
    """The osmosis filter, written without the class of the package."""

    tolerance = 1e-6

    def __init__(self) -> None:
        super().__init__(HeatOperator("discrete"), 8, NoNoise(), LogBlur(), value_range=(0.0, 1.0))
        self.filter = OsmosisFilter(8)

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        return self.filter.context(x_0, generator)

    def operator(self, context: Context = None) -> Operator:
        return self._operator if context is None else OsmosisOperator(context, 200)

    def steady_state(self, mean: Tensor, context: Context = None) -> Tensor:
        flat = mean[..., None, None]
        return flat if context is None else context / context.mean((-2, -1), keepdim=True) * flat


def test_a_process_of_ones_own_is_osmosis_by_its_steady_state() -> None:
    assert verdicts(audit(OwnOsmosis(), photo(), samples=100)) == verdicts(
        audit(OsmosisFilter(8), photo(), samples=100)
    )


@pytest.mark.parametrize("process", [VP(20), InverseHeat(8), BlurringChain(8)], ids=["vp", "heat", "chain"])
def test_paths_home_have_the_variance_of_the_data(process: Process) -> None:
    row = finding(reverse.steady_state, process, samples=400)
    assert row.verdict is Verdict.IN_LAW and row.drawn is not None and row.std_error is not None
    c = Lab(process, photo()).data_covariance  # the energy of a Gaussian vector has the variance 2 tr C^2
    assert row.std_error == pytest.approx(float((2 * (c @ c).trace() / 400).sqrt() / c.trace()), rel=0.25)
    assert abs(row.drawn) < 5 * row.std_error


def test_closed_forms_of_steps_say_where_they_are_approximations() -> None:
    """The spectrum of the constant guidance image stands for that of the one that guides."""
    noisy, flat = (
        finding(reverse.entropy_bounds, OsmosisDiffusion(8, guidance_noise=noise), samples=100) for noise in (0.1, 0.0)
    )
    assert "since it takes the spectrum of the constant guidance image" in noisy.note
    differences = [float(row.note.split("differ by ")[1].split(",")[0]) for row in (noisy, flat)]
    assert 1e-5 < differences[0] < 1e-2 and differences[1] < 1e-5, differences
    assert "since it takes" not in finding(reverse.entropy_bounds, VP(8), samples=100).note


def test_one_scale_has_no_step_to_compare() -> None:
    for process in (VP(1), InverseHeat(1)):
        rows = audit(process, photo(), samples=100)
        assert by_name(rows, "conditional entropy").verdict is Verdict.NOT_APPLICABLE
        assert not [row for row in rows if row.verdict is Verdict.VIOLATED and row.direction == "forward"]


def test_paper_chain_in_the_audit_itself() -> None:
    """The printed sum at step 100 of the paper's chain, in the finding's note."""
    row = finding(forward.initial_transition, VP(100, ConstantBeta(0.1)), samples=200)
    assert row.scale == 1 and "7.88 there" in row.note and "0.7962" in row.note
    truth = math.sqrt(1 - 0.99**100)
    assert row.measured == pytest.approx(truth, rel=1e-7)
    assert row.drawn is not None and row.std_error is not None and abs(row.drawn - truth) < 5 * row.std_error


def test_chain_form_lets_the_entropy_fall_where_the_printed_condition_holds() -> None:
    """Steps of blur that grow: gamma_k^2 = exp(-2 mu dT_k) gamma_{k-1}^2 + beta^2 falls, beta > (1 - alpha) gamma."""
    row = finding(forward.entropy_condition, BlurringChain(20, 0.1, LogBlur(0.5, 24.0)), samples=200)
    times = np.array([0.0, *(0.5 * (0.5 * 48.0 ** (k / 19)) ** 2 for k in range(20))])
    mu = np.pi**2 * np.add.outer(np.arange(6) ** 2 / 36, np.arange(9) ** 2 / 81).ravel()
    gamma, falls, misled = np.zeros_like(mu), 0, 0
    for step in np.diff(times):
        alpha = np.exp(-mu * step)
        new = np.sqrt(alpha**2 * gamma**2 + 0.01)
        falling = new < gamma * (1 - 1e-9)
        falls, misled = falls + falling.sum(), misled + (falling & (0.1 >= (1 - alpha) * gamma)).sum()
        gamma = new
    assert falls > 100 and f"of {falls} steps" in row.note and f"lets {misled} pass" in row.note


def test_variance_of_the_grey_value_is_that_of_the_paths() -> None:
    row = finding(invariances.average_grey, InverseHeat(8, ConstantNoise(0.2)), samples=400)
    assert f"gamma / sqrt(N) = {0.2 / math.sqrt(54):.4g}" in row.note and row.std_error is not None


def test_a_process_is_left_as_it_is() -> None:
    process = OsmosisFilter(8)
    degree, state = process.degree, torch.get_rng_state()
    first = audit(process, photo(), seed=3)
    assert process.degree == degree and torch.equal(torch.get_rng_state(), state)
    assert first == audit(process, photo(), seed=3)


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), photo(1, 9)])
def test_images_that_do_not_fit(images: Tensor) -> None:
    with pytest.raises(UserError, match="uint8"):
        audit(VP(4), images)


def test_entropies_of_the_way_back() -> None:
    """H(U_t), H(U_0 | U_t) and H(U_s | U_t) by numpy, for Gaussian data with the lab's covariance."""
    sigma, process = 0.3, InverseHeat(5, ConstantNoise(0.3), LinearTimeBlur(5.0))
    rows = audit(process, photo(), samples=100)
    data = Lab(process, photo()).data_covariance.numpy()
    basis, mu = np.kron(dct_basis(6), dct_basis(9)), eigenvalues(6, 9, "continuous").ravel()
    blurs = [basis.T @ np.diag(np.exp(-mu * k)) @ basis for k in range(6)]
    noise = [0.0, *[sigma**2] * 5]
    covariances = [a @ data @ a.T + n * np.eye(54) for a, n in zip(blurs, noise, strict=True)]

    def entropy(c: np.ndarray) -> float:
        return float(0.5 * np.linalg.slogdet(2 * np.pi * np.e * c)[1]) / 54

    total = np.array([entropy(c) for c in covariances])
    assert by_name(rows, "entropy of the images", "reverse").measured == pytest.approx(np.diff(total).min(), abs=1e-9)
    left = [
        entropy(data - data @ a.T @ np.linalg.solve(c, a @ data))
        for a, c in zip(blurs[1:], covariances[1:], strict=True)
    ]
    row = by_name(rows, "entropy of the data given an image", "reverse")
    assert row.measured == pytest.approx(np.diff(left).min(), abs=1e-7) and f"{left[-1]:.3f} at scale 1" in row.note
    # in the directions that a step adds noise to, all but the mean image
    free, slack = basis[1:], []
    for s, t in zip(range(1, 5), range(2, 6), strict=True):
        a = blurs[1]
        step = sigma**2 * (np.eye(54) - a @ a.T)
        own = covariances[s] - covariances[s] @ a.T @ np.linalg.solve(covariances[t], a @ covariances[s])
        sizes = [np.linalg.slogdet(free @ c @ free.T)[1] / 108 for c in (step, own)]
        slack.append(sizes[0] - sizes[1])
    found = by_name(rows, "bounds of a reverse step's entropy", "reverse")
    assert found.measured == pytest.approx(min(slack), abs=1e-7) and found.verdict is Verdict.CORRECTED
