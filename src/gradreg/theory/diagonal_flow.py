"""The right-hand side and the Jacobian of the diagonal network's regularized gradient flow, in n + d coordinates instead of 2d.

ln u = ln α₀ − s + Xᵀν and ln v = ln α₀ − s − Xᵀν, because A lies in the row space of X: A = Xᵀa. Then ν̇ = −a and ṡ = γ g∘g′.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from gradreg.theory.sparse_regression import Array


class DiagonalFlow:
    """The flow of one problem; a state is (ν, s), shape (n + d,).

    Args:
        X: shape (n, d).
        y: shape (n,).
        log_scale: ln α₀, shape (d,).
        gamma: strength γ ≥ 0.
        epsilon: ε; > 0 forward, < 0 backward, 0 exact.
    """

    def __init__(self, X: Array, y: Array, log_scale: Array, gamma: float, epsilon: float) -> None:
        self.X: Array = X
        self.y: Array = y
        self.log_scale: Array = log_scale
        self.gamma: float = gamma
        self.epsilon: float = epsilon
        n, d = X.shape
        self.sparse: bool = d > 4 * n and n + d > 300
        """Whether the Jacobian's (s, s) block is left out, so that a sparse factorization costs n²d. BDF's Newton iteration only needs
        an approximate Jacobian, and that block is of the order of the gradient, which is smallest where the steps are longest."""

    def start(self) -> Array:
        """The state at t = 0."""
        return np.zeros(sum(self.X.shape))

    def log_weights(self, state: Array) -> tuple[Array, Array]:
        """ln u and ln v."""
        n = self.X.shape[0]
        both, apart = self.log_scale - state[n:], self.X.T @ state[:n]
        return both + apart, both - apart

    def loss(self, beta: Array) -> float:
        """L = ‖Xβ − y‖² / 4n."""
        residual = self.X @ beta - self.y
        return float(residual @ residual) / (4 * residual.size)

    def rate(self, time: float, state: Array) -> Array:
        """d(ν, s)/dt; not finite after a trial step that went too far, on which the solver shortens the step."""
        X, n, gamma, epsilon = self.X, self.X.shape[0], self.gamma, self.epsilon
        with np.errstate(over="ignore", invalid="ignore"):
            log_u, log_v = self.log_weights(state)
            u, v = np.exp(log_u), np.exp(log_v)
            residual = X @ (u * u - v * v) - self.y
            g = X.T @ residual / n
            if gamma == 0.0:
                return np.concatenate([-residual / n, np.zeros_like(g)])
            if epsilon == 0.0:
                moved_g = g
                a = (residual + gamma * (X @ (2 * g * (u * u + v * v)))) / n
            else:
                moved = X @ ((u * (1 + epsilon * g)) ** 2 - (v * (1 - epsilon * g)) ** 2) - self.y
                moved_g = X.T @ moved / n
                a = ((1 - gamma / epsilon) * residual + (gamma / epsilon) * moved) / n
            return np.concatenate([-a, gamma * g * moved_g])

    def jacobian(self, time: float, state: Array) -> Array | sparse.csc_matrix:
        """∂(rate)/∂(ν, s), shape (n + d, n + d); sparse, without its (s, s) block, where ``self.sparse``."""
        X, n, gamma, epsilon = self.X, self.X.shape[0], self.gamma, self.epsilon
        log_u, log_v = self.log_weights(state)
        with np.errstate(over="ignore", invalid="ignore"):
            b, c = np.exp(2 * log_u) - np.exp(2 * log_v), np.exp(2 * log_u) + np.exp(2 * log_v)
        residual = X @ b - self.y
        g = X.T @ residual / n
        # ∂β = 2c∘Xᵀ∂ν − 2b∘∂s and ∂c = 2b∘Xᵀ∂ν − 2c∘∂s, hence the residual's derivatives:
        by_nu, by_s = (X * (2 * c)) @ X.T, X * (-2 * b)
        if epsilon == 0.0:
            through_g = (X * (2 * c)) @ X.T / n
            moved_g, moved_by_nu, moved_by_s = g, by_nu, by_s
            a_nu = (by_nu + gamma * (through_g @ by_nu + (X * (4 * g * b)) @ X.T)) / n
            a_s = (by_s + gamma * (through_g @ by_s - X * (4 * g * c))) / n
        else:
            # β′ = u′∘u′ − v′∘v′ = b∘(1 + ε²g²) + 2εg∘c
            of_b, of_c, of_g = 1 + (epsilon * g) ** 2, 2 * epsilon * g, 2 * epsilon * (epsilon * g * b + c)
            moved_g = X.T @ (X @ (of_b * b + of_c * c) - self.y) / n
            through_g = (X * of_g) @ X.T / n
            moved_by_nu = (X * (2 * (of_b * c + of_c * b))) @ X.T + through_g @ by_nu
            moved_by_s = X * (-2 * (of_b * b + of_c * c)) + through_g @ by_s
            a_nu = ((1 - gamma / epsilon) * by_nu + (gamma / epsilon) * moved_by_nu) / n
            a_s = ((1 - gamma / epsilon) * by_s + (gamma / epsilon) * moved_by_s) / n
        s_nu = gamma * (g[:, None] * (X.T @ moved_by_nu) + moved_g[:, None] * (X.T @ by_nu)) / n
        if self.sparse:
            return sparse.csc_matrix(sparse.bmat([[-a_nu, -a_s], [s_nu, None]]))
        s_s = gamma * (g[:, None] * (X.T @ moved_by_s) + moved_g[:, None] * (X.T @ by_s)) / n
        return np.block([[-a_nu, -a_s], [s_nu, s_s]])
