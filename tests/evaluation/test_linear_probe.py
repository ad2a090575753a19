"""The linear probe against scikit-learn's logistic regression."""

import numpy as np
import pytest

from jaxcl.evaluation.linear_probe import choose_strength, fit_probe

# By scikit-learn 1.9.1 on `features_and_labels(0)`, with `StandardScaler` where standardised:
# LogisticRegression(C=C, tol=1e-10, max_iter=10000): standardised, C -> the objective, the norm of
# the weights, the weights of the first feature.
SKLEARN = {
    (False, 0.01): (1.0264427190, 0.6486960436, [-0.01556, -0.12328, -0.07061, 0.20944]),
    (False, 1.0): (0.4764494709, 3.0890860292, [-0.15223, -0.55725, -0.45155, 1.16103]),
    (False, 100.0): (0.4263742227, 4.0556928356, [-0.23819, -0.73674, -0.55425, 1.52918]),
    (True, 0.01): (1.1815376288, 0.5734789849, [-0.01481, -0.12043, -0.05536, 0.19061]),
    (True, 1.0): (0.5278175571, 4.0734464678, [-0.15689, -0.66732, -0.55352, 1.37773]),
    (True, 100.0): (0.4274627453, 6.4914416967, [-0.33421, -1.03494, -0.78128, 2.15043]),
}


def features_and_labels(seed, num_rows=120):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 8))
    labels = rng.integers(4, size=num_rows)
    return centres[labels] + 1.5 * rng.normal(size=(num_rows, 8)), labels


@pytest.mark.parametrize(("standardise", "strength"), SKLEARN)
def test_the_probe_is_logistic_regression(standardise, strength):
    features, labels = features_and_labels(0)
    probe = fit_probe(features, labels, num_classes=4, strength=strength, standardise=standardise)
    least, norm, first = SKLEARN[standardise, strength]
    np.testing.assert_allclose(probe.objective, least, rtol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(probe.weights), norm, rtol=1e-3)
    np.testing.assert_allclose(probe.weights[0], first, rtol=2e-3, atol=2e-4)


def test_the_objective_is_the_penalised_cross_entropy():
    """With one feature of one row per class, W is symmetric and b is 0: one number w is left."""
    features, labels = np.array([[1.0], [-1.0]]), np.array([0, 1])
    probe = fit_probe(features, labels, num_classes=2, strength=0.5, standardise=False)
    w = probe.weights[0, 0]
    np.testing.assert_allclose(probe.weights, [[w, -w]], atol=1e-6)
    np.testing.assert_allclose(probe.bias, 0, atol=1e-6)
    entropy = np.log(1 + np.exp(-2 * w))
    np.testing.assert_allclose(probe.objective, entropy + (w**2 + w**2) / (2 * 0.5 * 2))
    slope = -2 * np.exp(-2 * w) / (1 + np.exp(-2 * w)) + 2 * w
    np.testing.assert_allclose(slope, 0, atol=1e-4)


def test_another_start_finds_the_same_probe():
    features, labels = features_and_labels(0)
    weak = fit_probe(features, labels, num_classes=4, strength=100.0)
    fitted = fit_probe(features, labels, num_classes=4, strength=0.1)
    restarted = fit_probe(features, labels, num_classes=4, strength=0.1, start=weak)
    np.testing.assert_allclose(restarted.weights, fitted.weights, atol=1e-3)
    assert not np.allclose(weak.weights, fitted.weights, atol=1e-2)


def test_constant_and_scaled_features_do_not_change_the_scores():
    features, labels = features_and_labels(1)
    scaled = np.concatenate([features * 1e-3 + 5, np.full((len(features), 1), 0.3)], axis=1)
    one, other = (
        fit_probe(rows, labels, num_classes=4, strength=1.0).scores(rows)
        for rows in (features, scaled)
    )
    np.testing.assert_allclose(one, other, atol=2e-3)


def test_the_validation_part_chooses_the_strength():
    features, labels = features_and_labels(3, num_rows=24)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(features), 200))
    rows = np.concatenate([features, noise], axis=1)
    same = choose_strength(rows, labels, rows, labels, num_classes=4, strengths=(1e-4, 1.0))
    assert same == 1.0  # the training rows themselves prefer less regularisation
    constant = np.zeros_like(rows)  # all strengths are equal here, so the smallest is chosen
    arguments = (constant, labels, constant, labels)
    assert choose_strength(*arguments, num_classes=4, strengths=(10.0, 0.1, 1.0)) == 0.1


def test_invalid_arguments_are_named():
    features, labels = features_and_labels(0)
    with pytest.raises(ValueError, match="there are no labelled rows"):
        fit_probe(features[:0], labels[:0], num_classes=4, strength=1.0)
    with pytest.raises(ValueError, match="from 0 to 3, but there are 3 classes"):
        fit_probe(features, labels, num_classes=3, strength=1.0)
    for strength in (0.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            fit_probe(features, labels, num_classes=4, strength=strength)
    features[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 of .* rows of features contain NaN.* first is row 3"):
        fit_probe(features, labels, num_classes=4, strength=1.0)
