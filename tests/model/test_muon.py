"""Muon updates a matrix as torch's does, each part of a projection apart; AdamW does the rest."""

import math

import pytest
import torch
from small import model

from ysnake.training import muon
from ysnake.training.muon import Muon, orthogonal
from ysnake.training.optimizer import make_moments, make_optimizer
from ysnake.training.options import BETA2


@pytest.mark.parametrize("shape", [(96, 64), (24, 80)])
def test_with_its_coefficients_a_matrix_gets_the_update_of_torch(shape, monkeypatch):
    monkeypatch.setattr(muon, "ITERATIONS", ((3.4445, -4.7750, 2.0315),) * 5)
    own, expected = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    group = {"params": [own], "parts": [shape[0]], "weight_decay": 0.1}
    optimizer = Muon([group], (0.9, 0.95), momentum=0.95)
    make_moments(optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    theirs = torch.optim.Muon(
        [expected], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        own.grad = torch.randn(shape, generator=generator)
        expected.grad = own.grad.clone()
        optimizer.step()
        theirs.step()
    moved = (expected - 1).norm()
    assert (own - expected).norm() < 0.02 * moved  # torch computes in bfloat16


def with_singular_values(largest, smallest):
    """A matrix (24, 80) with these singular values and others between them."""
    left, right = (torch.linalg.qr(torch.randn(n, 24, dtype=torch.float64))[0] for n in (24, 80))
    values = torch.logspace(math.log10(largest), math.log10(smallest), 24, dtype=torch.float64)
    return left @ values.diag() @ right.mT


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-8])
def test_it_is_what_the_iterations_make_of_a_matrix(smallest):
    X = with_singular_values(1.0, smallest)
    expected = X / X.norm()
    for a, b, c in muon.ITERATIONS:
        gram = expected @ expected.mT
        expected = (a * torch.eye(24) + b * gram + c * gram @ gram) @ expected
    error = orthogonal(X[None].float(), 3.0)[0] - 3 * expected
    assert error.norm() < 1e-4 * 3 * expected.norm()


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-8])
def test_products_with_rounded_factors_make_no_singular_value_large(monkeypatch, smallest):
    """Some CPUs round the factors to bfloat16."""

    def product(x, y):
        return torch.bmm(x.bfloat16().float(), y.bfloat16().float())

    def sum_with_product(x, y, z, beta, alpha):
        return beta * x + alpha * product(y, z)

    X = with_singular_values(1.0, smallest)[None].float()
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(torch, "baddbmm", sum_with_product)
    made = orthogonal(X)[0]
    assert torch.linalg.svdvals(made).max() < 1.5


def test_singular_values_are_near_one():
    several = torch.stack([torch.randn(40, 96), torch.randn(40, 96) * 1e3, torch.zeros(40, 96)])
    *made, zeros = orthogonal(several)
    for each in made:
        values = torch.linalg.svdvals(each)
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert zeros.abs().max() == 0


@pytest.fixture
def trained():
    """A model, its weights before, and its Muon after one step with random gradients."""
    m = model(n_groups=2)
    optimizer = make_optimizer(m, 0.1, "muon")
    make_moments(optimizer)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
        group["weight_decay"] = 0.0
    optimizer.step()
    return m, before, optimizer


def test_each_heads_part_of_a_projection_is_made_orthogonal(trained):
    m, before, _ = trained
    sizes = m.backbone.layers[0].mixer.sizes
    heads = [sizes.head_dim] * sizes.heads
    for name, parts in {
        "in_proj": [*heads, *heads, *sizes.convolved[1:], sizes.heads],
        "out_proj": heads,
    }.items():
        path = f"backbone.layers.1.mixer.{name}.weight"
        moved = dict(m.named_parameters())[path].detach() - before[path]
        for part in moved.split(parts, 1 if name == "out_proj" else 0):
            values = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
            assert values.min() > 0.6
            assert values.max() < 1.3


def test_heads_that_are_larger_than_the_embedding_are_made_orthogonal():
    m = model(d_model=8, head_dim=16)
    optimizer = make_optimizer(m, 0.0, "muon")
    make_moments(optimizer)
    weight = m.backbone.layers[0].mixer.in_proj.weight
    before = weight.detach().clone()
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    values = torch.linalg.svdvals((weight.detach() - before)[:16]) / (0.2 * 16**0.5)
    assert 0.6 < values.min() <= values.max() < 1.3


def test_adamw_updates_the_other_weights(trained):
    m, before, optimizer = trained
    twin = model(n_groups=2)
    adamw = make_optimizer(twin, 0.0, beta2=BETA2["muon"])
    for p, own in zip(twin.parameters(), m.parameters(), strict=True):
        p.grad = own.grad
    for group in adamw.param_groups:
        group["lr"] = 1.0
    with torch.no_grad():
        for p, old in zip(twin.parameters(), before.values(), strict=True):
            p.copy_(old)
    adamw.step()
    for (name, own), theirs in zip(m.named_parameters(), twin.parameters(), strict=True):
        projection = name.endswith("_proj.weight")
        assert torch.equal(own, theirs) is not projection, name
        assert ("momentum" in optimizer.state[own]) is projection, name


def test_momentum_is_the_share_of_earlier_steps():
    m = model()
    weight = m.backbone.layers[0].mixer.in_proj.weight
    optimizer = make_optimizer(m, 0.0, "muon", momentum=0.75)
    make_moments(optimizer)
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum"], weight.grad / 4)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum"], weight.grad * (1 - 0.75**2))


@pytest.mark.parametrize(
    ("kind", "given", "beta2"),
    [("adamw", 0.75, 0.75), ("muon", 0.75, 0.75), ("adamw", None, 0.95), ("muon", None, 0.99)],
)
def test_beta2_is_the_share_of_earlier_squares(kind, given, beta2):
    m = model()
    optimizer = make_optimizer(m, 0.0, kind, beta2=given)
    make_moments(optimizer)
    weight = m.backbone.embeddings.weight
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    for share in (1 - beta2, 1 - beta2**2):
        optimizer.step()
        squares = optimizer.state[weight]["exp_avg_sq"]
        torch.testing.assert_close(squares, share * weight.grad.square())


def test_matrices_that_are_updated_together_get_the_same_update(trained, monkeypatch):
    m, before, _ = trained
    twin = model(n_groups=2)
    together = make_optimizer(twin, 0.0, "muon")
    make_moments(together)
    monkeypatch.setattr(muon, "_stacks", lambda weights: [weights])
    with torch.no_grad():
        for p, own in zip(twin.named_parameters(), m.parameters(), strict=True):
            p[1].copy_(before[p[0]])
            p[1].grad = own.grad
    for group in together.param_groups:
        group["lr"] = 1.0
    together.step()
    for own, theirs in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)


def test_a_restored_state_has_its_steps_on_the_device_of_the_weight():
    def muon_on(device):
        matrix, vector = (
            torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((4, 4), 4)
        )
        groups = [{"params": [matrix], "parts": [4]}, {"params": [vector]}]
        return Muon([group | {"weight_decay": 0.0} for group in groups], (0.9, 0.95), 0.9)

    stored, restored = muon_on("cpu"), muon_on("meta")
    make_moments(stored)
    restored.load_state_dict(stored.state_dict())
    assert {each["step"].device.type for each in restored.state.values()} == {"meta"}
