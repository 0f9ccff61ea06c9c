"""Derives the polynomials of `hope_jax.ops.orthogonal` and prints them: run it, compare."""

import numpy as np

STEPS = 5
SMALLEST = 6.5e-4  # singular values from here to 1 are to end inside TARGET
MARGIN = 0.01  # rounding (tf32 products) may widen an interval by this share in every step
TARGET = 0.7, 1.2


def nearest_one(low: float, high: float) -> tuple[np.ndarray, float]:
    """The odd quintic with the smallest largest distance from 1 on [low, high], and that distance.

    Remez: the error of the best polynomial `a x + b x^3 + c x^5` takes its largest size with
    alternating sign at both ends and at the two extrema between them.
    """
    points = np.array([low, low + 0.35 * (high - low), low + 0.8 * (high - low), high])
    for _ in range(200):
        rows = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(rows, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt(sorted(((-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c))))
        moved = np.array([low, *inner, high])
        if np.allclose(moved, points, rtol=1e-13, atol=0):
            break
        points = moved
    return np.array([a, b, c]), abs(error)


def derive() -> tuple[np.ndarray, tuple[float, float]]:
    """Composes the best polynomial for the interval that the ones before it leave.

    Choosing each step for itself is the best that a composition can do (Amsel et al., "The Polar
    Express", 2025). The last one is scaled so that the interval sits in the middle of TARGET.
    """
    low, high = SMALLEST, 1 + MARGIN
    found = []
    for step in range(STEPS):
        polynomial, error = nearest_one(low, high)
        found.append(polynomial)
        widen = MARGIN if step < STEPS - 1 else 0.0
        low, high = (1 - error) * (1 - widen), (1 + error) * (1 + widen)
    scale = np.sqrt(TARGET[0] * TARGET[1] / (low * high))
    found[-1] = found[-1] * scale
    return np.array(found), (low * scale, high * scale)


def image(polynomials: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What singular values `x` become."""
    for a, b, c in polynomials:
        x = a * x + b * x**3 + c * x**5
    return x


if __name__ == "__main__":
    polynomials, (low, high) = derive()
    for row in polynomials:
        print("(" + ", ".join(f"{number:.6f}" for number in row) + "),")
    ends = image(np.round(polynomials, 6), np.geomspace(SMALLEST, 1, 1_000_001))
    print(f"[{SMALLEST}, 1] goes to [{low:.4f}, {high:.4f}] by the bounds,")
    print(f"and with the printed digits to [{ends.min():.4f}, {ends.max():.4f}]")
