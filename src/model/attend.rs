//! The seam between the decoder and what its queries attend to.

use candle_core::{Result, Tensor};

use crate::ops::{apply_rope, rms_norm};

/// Rotary angles of tokens: cosines and sines, each `[tokens, head_dim / 2]` f32.
#[derive(Debug, Clone)]
pub struct Angles {
    pub cos: Tensor,
    pub sin: Tensor,
}

/// Queries, keys and values of a layer as its products give them, `[.., heads, head_dim]`, and what queries
/// and keys go through before attention.
#[derive(Debug, Clone, Copy)]
pub struct Unrotated<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    /// Weights of the norm of every head, before the rotation (Qwen3).
    pub q_norm: Option<&'a Tensor>,
    pub k_norm: Option<&'a Tensor>,
    pub eps: f64,
    pub q_angles: &'a Angles,
    pub k_angles: &'a Angles,
}

impl Unrotated<'_> {
    /// Queries and keys after norm and rotation.
    pub fn rotated(&self) -> Result<(Tensor, Tensor)> {
        let rotate = |x: &Tensor, norm: Option<&Tensor>, angles: &Angles| match norm {
            Some(norm) => apply_rope(&rms_norm(x, norm, self.eps)?, &angles.cos, &angles.sin),
            None => apply_rope(x, &angles.cos, &angles.sin),
        };
        let q = rotate(self.q, self.q_norm, self.q_angles)?;
        Ok((q, rotate(self.k, self.k_norm, self.k_angles)?))
    }
}

/// What the decoder's queries attend to. A layer calls [`Self::rotate`], then [`Self::attend`].
pub trait Attend {
    /// Queries and keys of `layer` after norm and rotation. A cache may store keys and values on the way; any
    /// other does so in [`Self::attend`].
    fn rotate(&mut self, _layer: usize, unrotated: &Unrotated<'_>) -> Result<(Tensor, Tensor)> {
        unrotated.rotated()
    }

    /// Attention output `[tokens, heads, head_dim]` for `layer`, given this pass's queries
    /// `[tokens, heads, head_dim]` and keys and values `[tokens, kv_heads, head_dim]`, all after
    /// [`Self::rotate`].
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}
