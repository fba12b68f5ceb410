//! One layer of the decoder, forward and backward.

use candle_core::{Result, Tensor};

use super::{Angles, Attend, ModelConfig, Unrotated};
use crate::ops::{
    Linear, Rows, add_in_place, add_rms_norm, rms_norm, rms_norm_backward, rope_backward, swiglu,
    swiglu_backward,
};

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) q_norm: Option<Tensor>,
    pub(super) k_norm: Option<Tensor>,
    pub(super) post_norm: Tensor,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// The only tokens whose output is wanted of a layer; all others are keys and values to them.
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub rows: Rows,
    /// Of these tokens.
    pub angles: Angles,
}

/// What the gradient of a layer is computed from. Norms and the gated activation are not kept: they cost
/// little to compute again.
#[derive(Debug)]
pub(crate) struct Trace {
    /// `[tokens, hidden]`.
    pub hidden: Tensor,
    /// Queries and keys before their norm, if they have one.
    unnormed: Option<(Tensor, Tensor)>,
    /// What the attention took and gave, each `[.., heads, head_dim]`.
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub attention: Tensor,
    /// Hidden states between the layer's halves.
    middle: Tensor,
    gate: Tensor,
    up: Tensor,
}

/// Takes the gradient of what the attention gave to those of its queries, keys and values; none if nothing
/// before them is learned.
pub(crate) type AttendBackward<'a> =
    &'a mut dyn FnMut(&Trace, &Tensor) -> Result<Option<[Tensor; 3]>>;

impl Layer {
    /// Hidden states `[tokens, hidden]`, of the chosen tokens or of all, and how they came about.
    pub fn forward(
        &self,
        config: &ModelConfig,
        index: usize,
        hidden: &Tensor,
        angles: &Angles,
        chosen: Option<&Chosen>,
        attend: &mut dyn Attend,
    ) -> Result<(Tensor, Trace)> {
        let eps = config.rms_norm_eps;
        let heads = |x: Tensor, heads| x.reshape(((), heads, config.head_dim));
        let pick = |x: &Tensor| chosen.map_or(Ok(x.clone()), |chosen| chosen.rows.pick(x));
        let x = rms_norm(hidden, &self.input_norm, eps)?;
        let k = heads(self.k.forward(&x)?, config.kv_heads)?;
        let v = heads(self.v.forward(&x)?, config.kv_heads)?;
        let q = heads(self.q.forward(&pick(&x)?)?, config.heads)?;
        drop(x);
        let unrotated = Unrotated {
            q: &q,
            k: &k,
            v: &v,
            q_norm: self.q_norm.as_ref(),
            k_norm: self.k_norm.as_ref(),
            eps,
            q_angles: chosen.map_or(angles, |chosen| &chosen.angles),
            k_angles: angles,
        };
        let rotated = attend.rotate(index, &unrotated)?;
        let is_normed = self.q_norm.is_some() || self.k_norm.is_some();
        let unnormed = is_normed.then_some((q, k));
        let (q, k) = rotated;
        let attention = attend.attend(index, &q, &k, &v)?;
        let flat = attention.reshape(((), config.heads * config.head_dim))?;
        let (middle, x) =
            add_rms_norm(self.o.forward(&flat)?, &pick(hidden)?, &self.post_norm, eps)?;
        let (gate, up) = (self.gate.forward(&x)?, self.up.forward(&x)?);
        drop(x);
        let output = add_in_place(self.down.forward(&swiglu(&gate, &up)?)?, &middle)?;
        let hidden = hidden.clone();
        Ok((output, Trace { hidden, unnormed, q, k, v, attention, middle, gate, up }))
    }

    /// From the gradient of the output, whose memory it takes, to that of the input, `[tokens, hidden]`; `None`
    /// if `attend` says that nothing before it is learned.
    pub fn backward(
        &self,
        config: &ModelConfig,
        mut trace: Trace,
        angles: &Angles,
        chosen: Option<&Chosen>,
        grad: Tensor,
        attend: AttendBackward<'_>,
    ) -> Result<Option<Tensor>> {
        let eps = config.rms_norm_eps;
        let (gate, up) = swiglu_backward(&trace.gate, &trace.up, self.down.backward(&grad)?)?;
        let x = self.gate.backward(&gate)?;
        let x = self.up.backward_add(&up, x)?;
        drop((gate, up));
        let grad = rms_norm_backward(&trace.middle, &self.post_norm, eps, &x, Some(grad))?;
        let attention = self.o.backward(&grad)?.reshape(trace.attention.shape())?;
        let Some([q, k, v]) = attend(&trace, &attention)? else {
            return Ok(None);
        };
        drop(attention);
        let q_angles = chosen.map_or(angles, |chosen| &chosen.angles);
        let mut q = rope_backward(q, &q_angles.cos, &q_angles.sin)?;
        let mut k = rope_backward(k, &angles.cos, &angles.sin)?;
        if let Some((q_before, k_before)) = trace.unnormed.take() {
            q = normed_backward(&q_before, self.q_norm.as_ref(), eps, q)?;
            k = normed_backward(&k_before, self.k_norm.as_ref(), eps, k)?;
        }
        let [q, k, v] = [q.flatten_from(1)?, k.flatten_from(1)?, v.flatten_from(1)?];
        let x = self.v.backward_add(&v, self.k.backward(&k)?)?;
        let (x, grad) = match chosen {
            None => (self.q.backward_add(&q, x)?, grad),
            Some(chosen) => {
                (chosen.rows.add(&self.q.backward(&q)?, x)?, chosen.rows.spread(&grad)?)
            }
        };
        rms_norm_backward(&trace.hidden, &self.input_norm, eps, &x, Some(grad)).map(Some)
    }
}

fn normed_backward(
    before: &Tensor,
    weight: Option<&Tensor>,
    eps: f64,
    grad: Tensor,
) -> Result<Tensor> {
    match weight {
        Some(weight) => rms_norm_backward(before, weight, eps, &grad, None),
        None => Ok(grad),
    }
}

impl Chosen {
    /// Of a pass with `angles`: `rows` must ascend.
    pub fn new(rows: Vec<u32>, angles: &Angles) -> Result<Self> {
        let rows = Rows::new(rows, angles.cos.dim(0)?, angles.cos.device())?;
        let angles = Angles { cos: rows.pick(&angles.cos)?, sin: rows.pick(&angles.sin)? };
        Ok(Self { rows, angles })
    }
}
