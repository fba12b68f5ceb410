//! Differentiable building blocks, each with forward and backward.
