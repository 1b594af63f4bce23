"""The losses of the recipes: hand values and identities."""

import math

import pytest
import torch

from pixnorm.training.losses import LOSSES, feature_matching, gradient_penalty, kl_divergence

pytestmark = pytest.mark.cpu

REAL, FAKE = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([-0.5, -2.0, 1.0], dtype=torch.float64)
BY_HAND = {
    "hinge": (1.08333333, 0.5),
    "ce": (0.93859139, 1.13808889),
    "lsgan": (1.1875, 1.875),
    "logistic": (0.93859139, 1.13808889),
}


@pytest.mark.parametrize("name", LOSSES)
def test_hand_values(name):
    loss = LOSSES[name]
    discriminator, generator = BY_HAND[name]
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, abs=1e-8)
    assert loss.generator(FAKE).item() == pytest.approx(generator, abs=1e-8)


def test_cross_entropy_is_that_of_probabilities():
    p_real, p_fake = torch.sigmoid(REAL), torch.sigmoid(FAKE)
    loss = LOSSES["ce"]
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(
        -(p_real.log().mean() + (1 - p_fake).log().mean()).item()
    )
    assert loss.generator(FAKE).item() == pytest.approx(-p_fake.log().mean().item())


def test_the_gradient_penalty_of_a_linear_function_is_half_its_squared_slope():
    slope = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(x @ slope, x)
    assert penalty.item() == pytest.approx(7.0)
    (grad,) = torch.autograd.grad(penalty, slope)
    torch.testing.assert_close(grad, slope.detach())


def test_feature_matching_leaves_out_scores_and_the_gradient_of_real_features():
    real = [[torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 1)], [torch.ones(4), torch.zeros(1)]]
    fake = [[torch.full((2, 3), 2.0, requires_grad=True), torch.full((2, 1), 9.0)], [torch.zeros(4), torch.ones(1)]]
    loss = feature_matching(real, fake)
    assert loss.item() == (2 + 1) / 2
    loss.backward()
    assert real[0][0].grad is None and fake[0][0].grad is not None


def test_the_divergence_from_the_standard_normal_distribution():
    assert kl_divergence(torch.zeros(3, 4), torch.zeros(3, 4)).item() == 0
    mu, logvar = torch.tensor([[2.0]]), torch.tensor([[math.log(4.0)]])
    assert kl_divergence(mu, logvar).item() == pytest.approx(0.5 * (4 + 4 - 1) - math.log(2))
