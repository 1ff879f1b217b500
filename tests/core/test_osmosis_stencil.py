"""The osmosis stencil against matrices summed edge by edge, and the facts that hold for every guidance image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_scales.errors import UserError
from dpm_scales.operators import OsmosisOperator, canonical_drift, drift_stencil
from dpm_scales.operators.stencil import osmosis_stencil, white_stencil
from support.osmosis_twins import (
    SIZES,
    drift_matrix,
    guidance_images,
    images,
    osmosis_matrix,
    per_image,
    sparse_osmosis_matrix,
    white_matrix,
)
from support.reference import neumann_laplacian

TOLERANCE = 1e-13

#: batch and channels of the guidance image, for images of batch 2 and 3 channels
BATCHES = [(2, 3), (1, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", BATCHES)
def test_products_are_those_of_the_matrix_summed_edge_by_edge(height: int, width: int, batch: tuple[int, int]) -> None:
    v, u = guidance_images(*batch, height, width), images(2, 3, height, width) - 0.5
    op = OsmosisOperator(v)
    torch.testing.assert_close(op.matvec(u), per_image(osmosis_matrix, v, u), atol=TOLERANCE, rtol=0)
    white = op.stencil(u.dtype, white=True).product(u)
    torch.testing.assert_close(white, per_image(white_matrix, v, u), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dense_matrices_are_those_summed_edge_by_edge(height: int, width: int) -> None:
    v = guidance_images(2, 3, height, width)
    P, L = OsmosisOperator(v).dense(), OsmosisOperator(v).dense(white=True)
    assert P.shape == L.shape == (2, 3, height * width, height * width)
    for b in range(2):
        for c in range(3):
            np.testing.assert_allclose(P[b, c], osmosis_matrix(v[b, c].numpy()), atol=TOLERANCE)
            np.testing.assert_allclose(L[b, c], white_matrix(v[b, c].numpy()), atol=1e-12)
            np.testing.assert_allclose(sparse_osmosis_matrix(v[b, c].numpy()).toarray(), P[b, c], atol=TOLERANCE)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
    contrast=st.floats(0, 14),
    power=st.floats(0.1, 8),
)
def test_facts_of_every_guidance_image(height: int, width: int, seed: int, contrast: float, power: float) -> None:
    """Columns sum to 0, off-diagonals >= 0, P v = 0, L is the symmetric similarity, -P has its spectrum in [0, 8]."""
    v = torch.exp(-contrast * images(1, 1, height, width, seed=seed) ** power)
    op = OsmosisOperator(v)
    P, L, n = op.dense()[0, 0], op.dense(white=True)[0, 0], height * width
    assert P.sum(0).abs().max() <= TOLERANCE
    assert (P - torch.diag(P.diagonal())).min() >= 0
    assert op.matvec(v).abs().max() <= TOLERANCE
    assert torch.equal(L, L.mT)
    root = v.flatten().sqrt()
    torch.testing.assert_close(-P * root / root[:, None], L, atol=1e-9, rtol=0)
    mu = torch.linalg.eigvalsh(L)
    assert mu[0] >= -1e-12 and mu[-1] <= 8 + 1e-12
    if n <= 36:
        spectrum = np.linalg.eigvals(-P.numpy())  # of the matrix that is not symmetric, by another algorithm
        np.testing.assert_allclose(np.sort(spectrum.real), mu, atol=1e-6)


def test_the_spectral_bound_is_attained_and_kept_by_the_worst_guidance() -> None:
    rows, columns = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    worst = {
        "constant": torch.ones(14, 14),
        "checkerboard": torch.where((rows + columns) % 2 == 0, 1.0, 1e-6),
        "stripes": torch.where(rows % 2 == 0, 1.0, 1e-6),
        "lone bright pixels": torch.where((rows % 3 == 1) & (columns % 3 == 1), 1.0, 1e-6),
        "lone dark pixels": torch.where((rows % 3 == 1) & (columns % 3 == 1), 1e-6, 1.0),
        "steps": 10.0 ** -(rows + columns).double(),
        "slightly uneven": torch.where((rows + columns) % 2 == 0, 1.0, 0.99),
    }
    largest = {
        name: float(torch.linalg.eigvalsh(OsmosisOperator(v.double()[None]).dense(white=True))[..., -1])
        for name, v in worst.items()
    }
    assert all(mu <= 8 + 1e-12 for mu in largest.values()), largest
    assert largest["constant"] > 7.89 and largest["checkerboard"] > 7.999, largest


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_constant_guidance_is_the_neumann_laplacian(height: int, width: int) -> None:
    op = OsmosisOperator(torch.full((1, 1, height, width), 0.37, dtype=torch.float64))
    laplacian = neumann_laplacian(height, width)
    np.testing.assert_allclose(op.dense()[0, 0], laplacian, atol=TOLERANCE)
    np.testing.assert_allclose(op.dense(white=True)[0, 0], -laplacian, atol=TOLERANCE)


# --- drift given on the edges -----------------------------------------------------------------------------------------


def random_drift(height: int, width: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """d in [-2, 2]."""
    return 4 * images(2, 3, height, width - 1, seed=seed) - 2, 4 * images(2, 3, height - 1, width, seed=seed + 1) - 2


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_general_drift_is_the_matrix_summed_edge_by_edge(height: int, width: int) -> None:
    right, down = random_drift(height, width)
    stencil, u = drift_stencil(right, down), images(2, 3, height, width)
    product, dense = stencil.product(u), stencil.dense()
    for b in range(2):
        for c in range(3):
            matrix, flat = drift_matrix(right[b, c].numpy(), down[b, c].numpy()), u[b, c].numpy().ravel()
            np.testing.assert_allclose(dense[b, c], matrix, atol=TOLERANCE)
            np.testing.assert_allclose(product[b, c].numpy().ravel(), matrix @ flat, atol=TOLERANCE)
            assert np.abs(matrix.sum(0)).max() <= TOLERANCE
            assert (dense[b, c] - torch.diag(dense[b, c].diagonal())).min() >= 0


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_canonical_drift_on_the_edges_is_the_operator_of_the_guidance_image(height: int, width: int) -> None:
    v = guidance_images(2, 3, height, width)
    right, down = canonical_drift(v)
    assert right.shape == (2, 3, height, width - 1) and down.shape == (2, 3, height - 1, width)
    for drift in (right, down):
        assert drift.numel() == 0 or drift.abs().max() <= 2
    torch.testing.assert_close(drift_stencil(right, down).dense(), OsmosisOperator(v).dense(), atol=1e-12, rtol=0)


def test_canonical_drift_is_the_gradient_of_the_logarithm_where_that_is_small() -> None:
    grey = torch.exp(1e-3 * images(1, 1, 6, 7))
    right, down = canonical_drift(grey)
    torch.testing.assert_close(right, grey.log().diff(dim=-1), atol=1e-9, rtol=0)
    torch.testing.assert_close(down, grey.log().diff(dim=-2), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shapes", [((1, 1, 4, 5), (1, 1, 4, 5)), ((1, 1, 4, 4), (2, 1, 3, 5)), ((4, 4), (3, 5))])
def test_drift_of_no_common_grid_is_refused(shapes: Any) -> None:
    with pytest.raises(UserError, match="H, W - 1"):
        drift_stencil(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_single_precision_keeps_the_weights_of_dark_pixels() -> None:
    """1 - d/2 would leave none of their digits."""
    v = guidance_images(1, 1, 9, 8, dark=0.4)
    exact, single = osmosis_stencil(v).dense(), osmosis_stencil(v.float()).dense().double()
    off_diagonal = ~torch.eye(72, dtype=torch.bool)
    torch.testing.assert_close(single[0, 0][off_diagonal], exact[0, 0][off_diagonal], atol=0, rtol=1e-6)
    u = images(1, 1, 9, 8)
    op = OsmosisOperator(v)
    assert op.matvec(u.float()).dtype == torch.float32
    torch.testing.assert_close(op.matvec(u.float()).double(), op.matvec(u), atol=2e-6, rtol=0)


def test_a_broken_image_does_not_touch_its_neighbours_in_the_batch() -> None:
    v, u = guidance_images(3, 2, 4, 5), images(3, 2, 4, 5)
    broken = u.clone()
    broken[1, 0] = torch.nan
    op = OsmosisOperator(v)
    for product in (op.matvec, op.stencil(u.dtype, white=True).product):
        whole, part = product(u), product(broken)
        assert torch.isnan(part[1, 0]).all()
        part[1, 0] = whole[1, 0]
        assert torch.equal(part, whole)


def test_white_stencil_of_another_scale_is_the_same() -> None:
    v = guidance_images(1, 2, 5, 6)
    torch.testing.assert_close(white_stencil(255 * v).dense(), white_stencil(v).dense(), atol=1e-12, rtol=0)


def test_affine_and_parts() -> None:
    v = guidance_images(3, 2, 4, 5)
    stencil = osmosis_stencil(v)
    torch.testing.assert_close(stencil.affine(-0.7, 1.0).dense(), torch.eye(20) - 0.7 * stencil.dense())
    assert torch.equal(stencil.part(slice(1, 3), slice(0, 1)).dense(), stencil.dense()[1:, :1])
    assert torch.equal(osmosis_stencil(v[:1]).part(slice(1, 3), slice(1, 2)).dense(), stencil.dense()[:1, 1:])


def test_the_compiled_stencil_is_the_eager_one() -> None:
    """One graph, as the compiler's front takes it apart; what its back makes of such graphs is seen on the network."""
    stencil, u = osmosis_stencil(guidance_images(2, 3, 9, 14)), images(2, 3, 9, 14)
    compiled = torch.compile(stencil.product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), stencil.product(u), atol=TOLERANCE, rtol=0)
