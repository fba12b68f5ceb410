//! What one micro-step computes: packed sequences and what their rows should predict.

/// Sparse teacher distributions over the vocabulary, entry by entry, in ascending order of `rows`.
///
/// Entry `i` says that the token after row `rows[i]` is `ids[i]` with probability `probs[i]`. The entries of
/// a row need not add up to one: they are the teacher's likeliest tokens only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Targets {
    /// Rows (token indices) whose logits are trained. A target token at index `t` trains row `t - 1`.
    pub rows: Vec<u32>,
    pub ids: Vec<u32>,
    pub probs: Vec<f32>,
}

impl Targets {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows that are trained: those with entries.
    pub fn supervised_rows(&self) -> usize {
        self.rows.chunk_by(|a, b| a == b).count()
    }

    pub fn push(&mut self, row: u32, id: u32, prob: f32) {
        self.rows.push(row);
        self.ids.push(id);
        self.probs.push(prob);
    }
}

/// Sequences laid end to end, without padding. Each sees the cartridge and its own earlier tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Pack {
    pub tokens: Vec<u32>,
    /// Where each sequence begins, and the end of the last: `sequences + 1` ascending numbers from 0.
    pub cu_seqlens: Vec<u32>,
    /// Rows are indices into `tokens`.
    pub targets: Targets,
    /// The dataset row each sequence was made of, for messages about it. Empty when there is none.
    pub dataset_rows: Vec<u32>,
}

impl Pack {
    /// Which sequence token `at` belongs to.
    pub fn sequence_of(&self, at: usize) -> usize {
        self.cu_seqlens.partition_point(|begin| *begin as usize <= at).saturating_sub(1)
    }

    /// Each sequence that has targets, as a pack of its own.
    pub fn sequences(&self) -> impl Iterator<Item = Pack> + '_ {
        let Targets { rows, ids, probs } = &self.targets;
        let ends = self.cu_seqlens.windows(2).enumerate();
        ends.filter_map(move |(sequence, ends)| {
            let entries = rows.partition_point(|row| *row < ends[0])
                ..rows.partition_point(|row| *row < ends[1]);
            (!entries.is_empty()).then(|| Pack {
                tokens: self.tokens[ends[0] as usize..ends[1] as usize].to_vec(),
                cu_seqlens: vec![0, ends[1] - ends[0]],
                targets: Targets {
                    rows: rows[entries.clone()].iter().map(|row| row - ends[0]).collect(),
                    ids: ids[entries.clone()].to_vec(),
                    probs: probs[entries].to_vec(),
                },
                dataset_rows: self.dataset_rows.get(sequence).copied().into_iter().collect(),
            })
        })
    }
}
