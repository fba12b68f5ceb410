//! Packed attention against plain tensor operations in f64, sequence by sequence.

use candle_core::{D, DType, Device, Var};

use super::*;
use crate::ops::attention::{KvRun, SequenceQueries, segment_attention};
use crate::ops::tests::assert_close;

#[derive(Clone)]
struct Case {
    heads: Heads,
    prefix: usize,
    cu_seqlens: Vec<u32>,
}

fn cases() -> Vec<Case> {
    let heads = |heads, kv_heads, head_dim| Heads { heads, kv_heads, head_dim };
    vec![
        Case { heads: heads(1, 1, 2), prefix: 1, cu_seqlens: vec![0, 1] },
        Case { heads: heads(4, 2, 8), prefix: 7, cu_seqlens: vec![0, 5, 6, 19] },
        Case { heads: heads(6, 2, 10), prefix: 131, cu_seqlens: vec![0, 150, 151, 151, 160] },
        Case { heads: heads(3, 3, 16), prefix: 33, cu_seqlens: vec![0, 300] },
    ]
}

impl Case {
    fn tokens(&self) -> usize {
        *self.cu_seqlens.last().unwrap() as usize
    }

    fn var(&self, shape: (usize, usize, usize)) -> Result<Var> {
        Var::from_tensor(&Tensor::randn(0f32, 1.2f32, shape, &Device::Cpu)?)
    }

    /// q, k, v, prefix keys, prefix values.
    fn vars(&self) -> Result<[Var; 5]> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let (tokens, prefix) = (self.tokens(), self.prefix);
        Ok([
            self.var((tokens, heads, head_dim))?,
            self.var((tokens, kv_heads, head_dim))?,
            self.var((tokens, kv_heads, head_dim))?,
            self.var((kv_heads, prefix, head_dim))?,
            self.var((kv_heads, prefix, head_dim))?,
        ])
    }

    fn queries(&self) -> Vec<u32> {
        (0..self.tokens() as u32).collect()
    }

    /// Of the given queries, and the gradients for `up`.
    fn attention(
        &self,
        [q, k, v, keys, values]: [&Tensor; 5],
        queries: &[u32],
        scale: f32,
        up: Option<&Tensor>,
    ) -> Result<(Tensor, Option<PackedGradients>)> {
        let device = q.device();
        let packed = PackedAttention::new(&self.cu_seqlens, queries, self.heads, scale, device)?;
        let q = q.index_select(&Tensor::new(queries, q.device())?, 0)?;
        let kv = PackedKv { k, v, prefix: Some((keys, values)) };
        let (out, log_sums) = packed.forward(&q, kv)?;
        let back = |up: &Tensor| packed.backward(&q, kv, (&out, &log_sums), up, true);
        let gradients = up.map(back).transpose()?;
        Ok((out, gradients))
    }

    fn forward(&self, vars: &[Var; 5], scale: f32) -> Result<Tensor> {
        let vars = vars.each_ref().map(Var::as_tensor);
        Ok(self.attention(vars, &self.queries(), scale, None)?.0)
    }

    /// Each sequence alone, in f64.
    fn naive(&self, vars: &[Var; 5], scale: f32) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let wide = |t: &Var| t.to_dtype(DType::F64);
        let [q, k, v, keys, values] = vars;
        let (q, k, v, keys, values) = (wide(q)?, wide(k)?, wide(v)?, wide(keys)?, wide(values)?);
        let mut outputs = Vec::new();
        for ends in self.cu_seqlens.windows(2) {
            let (start, len) = (ends[0] as usize, (ends[1] - ends[0]) as usize);
            if len == 0 {
                continue;
            }
            let all = self.prefix + len;
            let join = |prefix: &Tensor, own: &Tensor| {
                Tensor::cat(&[prefix, &own.narrow(0, start, len)?.transpose(0, 1)?], 1)?
                    .unsqueeze(1)?
                    .broadcast_as((kv_heads, heads / kv_heads, all, head_dim))?
                    .reshape((heads, all, head_dim))
            };
            let mask: Vec<f64> = (0..len)
                .flat_map(|row| (0..all).map(move |key| (row, key)))
                .map(|(row, key)| if key <= self.prefix + row { 0.0 } else { f64::NEG_INFINITY })
                .collect();
            let mask = Tensor::from_vec(mask, (1, len, all), &Device::Cpu)?;
            let q = q.narrow(0, start, len)?.transpose(0, 1)?.contiguous()?;
            let scores = (q.matmul(&join(&keys, &k)?.t()?)? * f64::from(scale))?;
            let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            outputs.push(weights.matmul(&join(&values, &v)?)?.transpose(0, 1)?);
        }
        Tensor::cat(&outputs, 0)
    }
}

#[test]
fn value_and_gradients_are_those_of_the_naive_form() -> Result<()> {
    for (case, step) in cases().into_iter().flat_map(|case| [(case.clone(), 1), (case, 3)]) {
        let vars = case.vars()?;
        let queries: Vec<u32> = case.queries().into_iter().step_by(step).collect();
        let index = Tensor::new(queries.as_slice(), &Device::Cpu)?;
        let theirs = case.naive(&vars, 0.7)?.contiguous()?.index_select(&index, 0)?;
        let up = Tensor::randn(0f32, 1f32, theirs.shape(), &Device::Cpu)?;
        let tensors = vars.each_ref().map(Var::as_tensor);
        let (ours, gradients) = case.attention(tensors, &queries, 0.7, Some(&up))?;
        assert_close(&ours, &theirs.to_dtype(DType::F32)?, 1e-5);
        let theirs = (theirs * up.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
        let PackedGradients { prefix, own } = gradients.unwrap();
        let ((prefix_keys, prefix_values), [dq, dk, dv]) = (prefix.unwrap(), own.unwrap());
        for (var, ours) in vars.iter().zip([dq, dk, dv, prefix_keys, prefix_values]) {
            let mut theirs = theirs.get(var).unwrap().contiguous()?;
            if ours.elem_count() < theirs.elem_count() {
                theirs = theirs.index_select(&index, 0)?; // that of other queries is 0
            }
            let largest = theirs.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
            assert_close(&ours, &theirs, 1e-5 * largest.max(1.0));
        }
    }
    Ok(())
}

#[test]
fn equals_what_serving_computes() -> Result<()> {
    // Serving reads values in whole vectors, past the width of a head that is none.
    for case in cases().into_iter().filter(|case| case.heads.head_dim % 16 == 0) {
        let vars = case.vars()?;
        let [q, k, v, keys, values] = &vars;
        let flat = |t: &Tensor| t.contiguous()?.flatten_all()?.to_vec1::<f32>();
        let head_dim = case.heads.head_dim;
        // Runs are read in whole vectors, so each is padded to one.
        let run = |keys: &Tensor, values: &Tensor, len: usize| -> Result<_> {
            let padded = len.next_multiple_of(16);
            let pad = |t: &Tensor| t.pad_with_zeros(1, 0, padded - len);
            Ok((flat(&pad(keys)?.transpose(1, 2)?)?, flat(&pad(values)?)?, len, padded))
        };
        let parts = case.cu_seqlens.windows(2).map(|ends| {
            let (start, len) = (ends[0] as usize, (ends[1] - ends[0]) as usize);
            let own = |t: &Var| t.narrow(0, start, len)?.transpose(0, 1);
            match len {
                0 => Ok(None),
                _ => Ok(Some((start, run(&own(k)?, &own(v)?, len)?))),
            }
        });
        let parts: Vec<_> = parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let shared = run(keys, values, case.prefix)?;
        fn as_run<'a>(
            (keys, values, len, padded): &'a (Vec<f32>, Vec<f32>, usize, usize),
            head_dim: usize,
        ) -> KvRun<'a> {
            KvRun {
                keys,
                key_head_stride: head_dim * padded,
                key_stride: *padded,
                values,
                value_head_stride: padded * head_dim,
                len: *len,
                bias: None,
            }
        }
        let sequences: Vec<_> = parts
            .iter()
            .map(|(start, part)| SequenceQueries {
                first_row: *start,
                rows: part.2,
                shared: vec![as_run(&shared, head_dim)],
                own: vec![as_run(part, head_dim)],
                own_before: 0,
            })
            .collect();
        let serving = segment_attention(&flat(q)?, case.heads, 0.3, &sequences, 1);
        let serving = Tensor::from_vec(serving, q.shape(), &Device::Cpu)?;
        assert_close(&case.forward(&vars, 0.3)?, &serving, 1e-5);
    }
    Ok(())
}

#[test]
fn without_a_prefix_it_is_causal_attention() -> Result<()> {
    let case = Case {
        heads: Heads { heads: 4, kv_heads: 2, head_dim: 8 },
        prefix: 0,
        cu_seqlens: vec![0, 70, 75],
    };
    let [q, k, v, ..] = case.vars_without_prefix()?;
    let attend = |cu_seqlens: &[u32], q: &Tensor, kv: PackedKv<'_>| -> Result<Tensor> {
        let queries: Vec<u32> = (0..q.dim(0)? as u32).collect();
        let device = q.device();
        Ok(PackedAttention::new(cu_seqlens, &queries, case.heads, 0.5, device)?.forward(q, kv)?.0)
    };
    let ours = attend(&case.cu_seqlens, &q, PackedKv { k: &k, v: &v, prefix: None })?;
    // The first row of a sequence sees itself only.
    for row in [0, 70] {
        let values = v.narrow(0, row, 1)?.unsqueeze(2)?.broadcast_as((1, 2, 2, 8))?;
        assert_close(&ours.narrow(0, row, 1)?, &values.reshape((1, 4, 8))?, 1e-6);
    }
    // A prefix that is the sequence's beginning changes nothing for its rest.
    let beginning = |t: &Tensor| t.narrow(0, 0, 30)?.transpose(0, 1)?.contiguous();
    let rest = |t: &Tensor| t.narrow(0, 30, 40)?.contiguous();
    let (keys, values) = (beginning(&k)?, beginning(&v)?);
    let kv = PackedKv { k: &rest(&k)?, v: &rest(&v)?, prefix: Some((&keys, &values)) };
    let after = attend(&[0, 40], &rest(&q)?, kv)?;
    assert_close(&after, &rest(&ours)?, 1e-5);
    Ok(())
}

impl Case {
    fn vars_without_prefix(&self) -> Result<[Tensor; 3]> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let random = |h| Tensor::randn(0f32, 1f32, (self.tokens(), h, head_dim), &Device::Cpu);
        Ok([random(heads)?, random(kv_heads)?, random(kv_heads)?])
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let case = &cases()[2];
    let vars = case.vars()?;
    let run = |threads| -> Result<Vec<Vec<f32>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let tensors = vars.each_ref().map(Var::as_tensor);
            let (out, gradients) =
                case.attention(tensors, &case.queries(), 0.7, Some(tensors[0]))?;
            let PackedGradients { prefix, own } = gradients.unwrap();
            let (keys, values) = prefix.unwrap();
            let all = [out, keys, values].into_iter().chain(own.unwrap());
            all.map(|tensor| tensor.flatten_all()?.to_vec1()).collect()
        })
    };
    assert_eq!(run(1)?, run(3)?);
    Ok(())
}
