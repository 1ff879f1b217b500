"""Muon: its iteration is a polynomial of the singular values, its steps are those of other implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.networks import UNet
from dpm_scales.networks.blocks import ResidualBlock
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.muon import (
    COEFFICIENTS,
    MATRIX_RATE,
    ROUNDS,
    Muon,
    embedding_weights,
    is_matrix,
    orthogonalized,
)
from support.oracles import close, generator
from support.shell import FAST, assert_equal, attempt, checkpoint, column, train


def twin(matrix: np.ndarray) -> np.ndarray:
    """The iteration on singular values alone."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / np.sqrt((s**2).sum())
    for _ in range(ROUNDS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@pytest.mark.parametrize("rows, columns", [(3, 40), (40, 3), (17, 17), (20, 31), (6, 12), (1, 5)])
def test_iteration_is_a_polynomial_of_the_singular_values(rows: int, columns: int) -> None:
    """By rows and by Gram matrices, tall and wide, several at once."""
    matrices = torch.randn(3, rows, columns, generator=generator(), dtype=torch.float64)
    found = orthogonalized(matrices)
    for matrix, own in zip(matrices.numpy(), found.numpy(), strict=True):
        close(own, twin(matrix), 1e-12)
    values = torch.linalg.svdvals(found)
    assert 0.3 < float(values.min()) and float(values.max()) < 1.3


def test_float32_is_enough_for_singular_values_that_lie_far_apart() -> None:
    u, _, v = torch.linalg.svd(torch.randn(48, 432, generator=generator()), full_matrices=False)
    matrix = (u * torch.logspace(0, -4, 48)) @ v
    for shape in (matrix, matrix[:, :60]):
        close(orthogonalized(shape[None])[0].numpy(), twin(shape.double().numpy()), 1e-3)
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9))


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(20, 16),
            "first": nn.Conv2d(3, 16, 3),
            "same": nn.Conv2d(16, 16, 3),
            "wide": nn.Conv2d(32, 16, 3),
            "linear": nn.Linear(48, 16),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
        }
    )


def with_gradients(net: nn.Module, seed: int) -> None:
    noise = generator(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=noise)


def test_steps_are_muons_and_adamws() -> None:
    """Three steps with weight decay: matrices beside a twin in numpy, all else beside torch's AdamW."""
    net, other = network(), network()
    rate, betas, decay = 0.01, (0.8, 0.95), 0.1
    muon = Muon(net.parameters(), rate, betas, decay, [net["embedding"].weight])
    adamw = torch.optim.AdamW(other.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=True)
    names = {"same.weight", "wide.weight", "linear.weight"}
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters() if name in names}
    moments = {name: np.zeros_like(value) for name, value in weights.items()}
    for step in range(3):
        for side in (net, other):
            with_gradients(side, step)
        for name, p in net.named_parameters():
            if name in names:
                assert p.grad is not None
                grad = p.grad.double().numpy()
                moments[name] = betas[0] * moments[name] + (1 - betas[0]) * grad
                direction = (1 - betas[0]) * grad + betas[0] * moments[name]
                flat = direction.reshape(len(grad), -1)
                size = rate * MATRIX_RATE * 0.2 * max(flat.shape) ** 0.5
                weights[name] = weights[name] * (1 - rate * decay) - size * twin(flat).reshape(grad.shape)
        muon.step()
        adamw.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        expected = torch.from_numpy(weights[name]).float() if name in names else q
        close(p.detach().numpy(), expected.detach().numpy(), 1e-4)
        assert not torch.equal(p, q) or name not in names
    unet = UNet(3, 3, widths=[16, 32], num_classes=10, embedding_dim=40)
    left = {id(p) for p in embedding_weights(unet)}
    shapes = {tuple(p.shape) for p in unet.parameters() if is_matrix(p) and id(p) not in left}
    assert len(left) == 5 + sum(isinstance(m, ResidualBlock) for m in unet.modules())
    assert (16, 16, 3, 3) in shapes and (96, 32) in shapes and all(40 not in shape for shape in shapes)
    assert {name for name, p in net.named_parameters() if is_matrix(p)} == names | {"embedding.weight"}
    # the state is AdamW's, so that a run may change from one to the other
    adamw.load_state_dict(muon.state_dict())
    muon.load_state_dict(adamw.state_dict())
    muon.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has one since 2.9")
def test_steps_are_those_of_torchs_muon() -> None:
    """Whose iteration runs in bfloat16."""
    ours, theirs = (nn.Parameter(torch.ones(24, 60)) for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    pair = Muon([ours], 0.02 / MATRIX_RATE, (0.9, 0.99), 0.0), torch.optim.Muon([theirs], **options)
    for step in range(3):
        ours.grad = torch.randn(24, 60, generator=generator(step))
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    change, difference = (theirs - 1).detach(), (ours - theirs).detach()
    assert float(difference.norm() / change.norm()) < 0.05


def test_a_step_is_skipped_where_a_gradient_is_not_finite() -> None:
    net = network()
    muon = Muon(net.parameters(), 0.01, (0.9, 0.99), 0.1)
    with_gradients(net, 0)
    muon.found_inf = torch.zeros(())
    muon.step()
    before = [p.detach().clone() for p in net.parameters()]
    moments = [{key: value.clone() for key, value in muon.state[p].items()} for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, np.nan)
    muon.found_inf = torch.ones(())
    muon.step()
    for p, old, state in zip(net.parameters(), before, moments, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(muon.state[p][key], value) for key, value in state.items())


def test_a_closure_starts_from_no_gradients() -> None:
    """As Lightning's, which zeroes the gradients of the whole group within the step: the same bits as outside of it."""
    nets = network(), network()
    plain, closed = (Muon(net.parameters(), 0.01, (0.9, 0.99), 0.0, [net["embedding"].weight]) for net in nets)
    x = torch.randn(4, 3, 9, 9, generator=generator())

    def loss_of(net: nn.ModuleDict) -> Tensor:
        return net["same"](net["first"](x)).square().mean() + net["linear"](torch.ones(2, 48)).square().mean()

    def closure() -> float:
        loss = loss_of(nets[1])
        closed.zero_grad()
        loss.backward()
        return float(loss)

    for _ in range(3):
        plain.zero_grad()
        loss = loss_of(nets[0])
        loss.backward()
        plain.step()
        assert closed.step(closure) == float(loss)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p, q), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name


# --- runs -------------------------------------------------------------------------------------------------------------

MUON = ("optimizer.method=muon", "network.widths=[16]", *FAST)


def rates(run_dir: Path) -> list[float]:
    return column(run_dir, "lr-Muon")


def test_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[int] = []
    configure = DiffusionModule.configure_optimizers

    def watch(self: DiffusionModule) -> dict[str, Muon]:
        made: dict[str, Muon] = configure(self)
        if self.method == "muon":
            matrices.append(len(made["optimizer"]._matrices))
        return made

    monkeypatch.setattr(DiffusionModule, "configure_optimizers", watch)
    whole = train(tmp_path / "whole", *MUON)
    train(tmp_path / "part", *MUON, "trainer.max_steps=2")  # before a validation, which zeroes gradients
    part = train(tmp_path / "part", *MUON)
    assert_equal(checkpoint(whole)["state_dict"], checkpoint(part)["state_dict"])
    assert len(rates(whole)) == len(rates(part)) > 3 and set(matrices) == {matrices[0]} and matrices[0] > 3
    other = train(tmp_path / "other", *(option for option in MUON if "muon" not in option))
    weights: list[dict[str, Tensor]] = [checkpoint(run)["state_dict"] for run in (whole, other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # another method takes effect, with the moments of the first
    train(tmp_path / "other", *MUON, "trainer.max_steps=8")
    assert checkpoint(tmp_path / "other")["global_step"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("optimizer.method=muom",), ("unknown optimizer.method 'muom'", "did you mean 'muon'")),
        (("optimizer.method=muon", "trainer=fsdp"), ("needs whole matrices", "trainer=fsdp")),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run", *options)
    assert outcome.status == 2 and all(word in outcome.err for word in words)
    assert not (tmp_path / "run").exists()
