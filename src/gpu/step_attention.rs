//! Attention of one step of the engine: cartridges shared by sequences, then the sequences' own blocks.
//!
//! Every row of queries gets partial results, one per part of its keys, in *slots* that lie side by side;
//! the merge reads the slots of a row and writes its output. Which row has which slots is the same in all
//! layers, so a step is planned once and its indices are copied to the device once.

use std::collections::BTreeMap;

use candle_core::{DType, Result};

use super::launch::{Arg, Launch};

/// Keys of a part. Short enough that one sequence with a long text occupies many processors, long enough
/// that merging (8 bytes per query value and part) costs little beside reading the keys. The same whatever
/// else runs, so that a row has the same bits in any company.
const PART_TOKENS: usize = 256;
/// Rows (query rows times query heads of a KV head) of a thread block of the attention kernels.
const BLOCK_ROWS: usize = 64;
/// Query heads of a KV head that a thread block of the decode kernel takes.
const DECODE_HEADS: usize = 16;
/// Heads per thread block of the merge.
const MERGE_HEADS: usize = 4;

/// One sequence of a step: `rows` new tokens after `start` stored ones.
#[derive(Debug, Clone, Copy)]
pub struct QuerySequence<'a> {
    /// Numbers of its blocks, in order.
    pub blocks: &'a [u32],
    pub start: usize,
    pub rows: usize,
    /// Its cartridges, as indices into the step's list, each with its number of tokens.
    pub cartridges: &'a [(usize, usize)],
}

/// Heads of a model.
#[derive(Debug, Clone, Copy)]
pub struct StepHeads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Where a layer of a cartridge lies: keys and values `[kv_heads, tokens, head_dim]`, bias
/// `[kv_heads, tokens]` in f32 or 0.
#[derive(Debug, Clone, Copy)]
pub struct CartridgeLayer {
    pub keys: u64,
    pub values: u64,
    pub bias: u64,
}

/// Where the operands of a layer lie.
#[derive(Debug, Clone, Copy)]
pub struct LayerAddresses<'a> {
    /// [`StepAttention::indices`].
    pub indices: u64,
    /// Queries `[rows, heads, head_dim]`.
    pub q: u64,
    /// The layer's cache: keys and values `[blocks, kv_heads, 16, head_dim]`.
    pub keys: u64,
    pub values: u64,
    pub cartridges: &'a [CartridgeLayer],
    /// Room for partial results, `[slots, heads, head_dim]` f32, and their log-sum-exps `[slots, heads]`.
    pub parts: u64,
    pub lse: u64,
    /// Output `[rows, heads, head_dim]`.
    pub out: u64,
}

/// The launches of a step, and the indices they read.
#[derive(Debug)]
pub struct StepAttention {
    heads: StepHeads,
    indices: Vec<i32>,
    rows: usize,
    slots: usize,
    shared: Vec<Shared>,
    decode: Option<Own>,
    prefill: Vec<Own>,
    /// Where `first` of the merge begins in `indices`.
    first: usize,
}

/// One cartridge and all rows that see it.
#[derive(Debug)]
struct Shared {
    cartridge: usize,
    tokens: usize,
    rows: usize,
    row_ids: usize,
    slots: usize,
}

/// The same while it is gathered.
#[derive(Default)]
struct Group {
    tokens: usize,
    row_ids: Vec<i32>,
    slots: Vec<i32>,
}

/// Sequences and their own blocks. For decoding `lengths` are the keys seen, for prefilling the tokens
/// before the first row; `rows_at` are row ids, or `cu_seqlens`. All as positions in `indices`.
#[derive(Debug)]
struct Own {
    sequences: usize,
    longest: usize,
    first_row: usize,
    tables: usize,
    table_stride: usize,
    lengths: usize,
    rows_at: usize,
    slots: usize,
}

impl StepAttention {
    /// Plans a step whose rows are those of `sequences`, one after the other.
    pub fn new(heads: StepHeads, sequences: &[QuerySequence<'_>]) -> Self {
        let mut plan = Self {
            heads,
            indices: Vec::new(),
            rows: sequences.iter().map(|sequence| sequence.rows).sum(),
            slots: 0,
            shared: Vec::new(),
            decode: None,
            prefill: Vec::new(),
            first: 0,
        };
        let own_slots = plan.assign_slots(sequences);
        let mut first_row = 0;
        let (mut decoding, mut prefilling): (Vec<_>, Vec<Vec<_>>) = Default::default();
        for (sequence, slot) in sequences.iter().zip(own_slots) {
            let own = OwnRows { sequence: *sequence, first_row, slots: slot };
            first_row += sequence.rows;
            match sequence.rows {
                0 => {}
                1 => decoding.push(own),
                // The kernel takes sequences that lie side by side.
                _ => match prefilling.last_mut() {
                    Some(run)
                        if run
                            .last()
                            .is_some_and(|last: &OwnRows<'_>| last.end() == own.first_row) =>
                    {
                        run.push(own)
                    }
                    _ => prefilling.push(vec![own]),
                },
            }
        }
        if !decoding.is_empty() {
            plan.decode = Some(plan.own(&decoding, true));
        }
        for run in &prefilling {
            let run = plan.own(run, false);
            plan.prefill.push(run);
        }
        plan
    }

    /// Gives every row its slots: the parts of its cartridges, in their order, then its own. Returns the own
    /// slots of the rows of each sequence.
    fn assign_slots(&mut self, sequences: &[QuerySequence<'_>]) -> Vec<Vec<i32>> {
        // A sequence that names a cartridge twice is in its rows twice.
        let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
        let mut first = Vec::with_capacity(self.rows + 1);
        let mut own = Vec::with_capacity(sequences.len());
        let mut row = 0;
        for sequence in sequences {
            let mut of_rows = Vec::with_capacity(sequence.rows);
            for _ in 0..sequence.rows {
                first.push(self.slots as i32);
                for (cartridge, tokens) in sequence.cartridges {
                    let group = groups.entry(*cartridge).or_default();
                    group.tokens = *tokens;
                    group.row_ids.push(row);
                    group.slots.push(self.slots as i32);
                    self.slots += parts(*tokens);
                }
                of_rows.push(self.slots as i32);
                self.slots += match sequence.rows {
                    1 => parts(sequence.start + 1),
                    _ => 1,
                };
                row += 1;
            }
            own.push(of_rows);
        }
        first.push(self.slots as i32);
        self.first = self.add(first);
        for (cartridge, Group { tokens, row_ids, slots }) in groups {
            let rows = row_ids.len();
            let (row_ids, slots) = (self.add(row_ids), self.add(slots));
            self.shared.push(Shared { cartridge, tokens, rows, row_ids, slots });
        }
        own
    }

    fn own(&mut self, sequences: &[OwnRows<'_>], decode: bool) -> Own {
        let stride = sequences.iter().map(|own| own.sequence.blocks.len()).max().unwrap_or(0);
        let mut tables = Vec::with_capacity(stride * sequences.len());
        for own in sequences {
            tables.extend(own.sequence.blocks.iter().map(|block| *block as i32));
            tables.resize(tables.len().next_multiple_of(stride.max(1)), 0);
        }
        let first_row = sequences.first().map_or(0, |own| own.first_row);
        let (lengths, longest, rows_at);
        if decode {
            lengths = sequences.iter().map(|own| own.sequence.start as i32 + 1).collect();
            longest = sequences.iter().map(|own| own.sequence.start + 1).max();
            rows_at = sequences.iter().map(|own| own.first_row as i32).collect();
        } else {
            lengths = sequences.iter().map(|own| own.sequence.start as i32).collect::<Vec<_>>();
            longest = sequences.iter().map(|own| own.sequence.rows).max();
            let ends = sequences.iter().map(|own| (own.end() - first_row) as i32);
            rows_at = std::iter::once(0).chain(ends).collect();
        }
        Own {
            sequences: sequences.len(),
            longest: longest.unwrap_or(0),
            first_row,
            tables: self.add(tables),
            table_stride: stride,
            lengths: self.add(lengths),
            rows_at: self.add(rows_at),
            slots: self.add(sequences.iter().flat_map(|own| own.slots.iter().copied()).collect()),
        }
    }

    /// Appends indices; where they begin.
    fn add(&mut self, values: Vec<i32>) -> usize {
        let at = self.indices.len();
        self.indices.extend(values);
        at
    }

    /// All indices the launches read, to be copied to the device.
    pub fn indices(&self) -> &[i32] {
        &self.indices
    }

    /// Partial results a layer writes.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Runs the attention of a layer. The rows' own keys and values are in the cache already.
    ///
    /// # Safety
    /// All addresses must be what [`LayerAddresses`] says, of elements of `dtype`, on the machine of `gpu`.
    ///
    /// # Errors
    /// A type or head size without a kernel.
    pub unsafe fn launch(
        &self,
        gpu: &dyn Launch,
        dtype: DType,
        at: &LayerAddresses<'_>,
        scale: f32,
    ) -> Result<()> {
        let StepHeads { heads, kv_heads, head_dim } = self.heads;
        let shared_by = heads / kv_heads;
        let of_head = |name: &str| format!("attention_{name}_{}_d{head_dim}", dtype.as_str());
        let index = |position: usize| Arg::from(at.indices + 4 * position as u64);
        let int = |value: usize| Arg::from(value as i32);
        for pass in &self.shared {
            let layer = &at.cartridges[pass.cartridge];
            let grid = [parts(pass.tokens), (pass.rows * shared_by).div_ceil(BLOCK_ROWS), kv_heads];
            let args = [
                Arg::from(at.q),
                layer.keys.into(),
                layer.values.into(),
                layer.bias.into(),
                index(pass.row_ids),
                index(pass.slots),
                at.parts.into(),
                at.lse.into(),
                int(pass.rows),
                int(heads),
                int(kv_heads),
                int(pass.tokens),
                Arg::from((pass.tokens * head_dim) as i64),
                int(PART_TOKENS),
                scale.into(),
            ];
            // SAFETY: the arguments of the kernel; the rest is the caller's promise.
            unsafe { gpu.launch(&of_head("prefix"), grid, &args)? };
        }
        if let Some(pass) = &self.decode {
            let grid =
                [parts(pass.longest), pass.sequences, kv_heads * shared_by.div_ceil(DECODE_HEADS)];
            let args = [
                Arg::from(at.q),
                at.keys.into(),
                at.values.into(),
                index(pass.tables),
                index(pass.lengths),
                index(pass.rows_at),
                index(pass.slots),
                at.parts.into(),
                at.lse.into(),
                int(heads),
                int(kv_heads),
                int(pass.table_stride),
                int(PART_TOKENS),
                scale.into(),
            ];
            // SAFETY: as above.
            unsafe { gpu.launch(&of_head("decode"), grid, &args)? };
        }
        for pass in &self.prefill {
            let grid = [(pass.longest * shared_by).div_ceil(BLOCK_ROWS), kv_heads, pass.sequences];
            let q = at.q + (pass.first_row * heads * head_dim * dtype.size_in_bytes()) as u64;
            let args = [
                Arg::from(q),
                at.keys.into(),
                at.values.into(),
                index(pass.tables),
                index(pass.rows_at),
                index(pass.lengths),
                index(pass.slots),
                at.parts.into(),
                at.lse.into(),
                int(heads),
                int(kv_heads),
                int(pass.table_stride),
                scale.into(),
            ];
            // SAFETY: as above.
            unsafe { gpu.launch(&of_head("prefill"), grid, &args)? };
        }
        let merge = format!("attention_merge_{}", dtype.as_str());
        let args = [
            Arg::from(at.parts),
            at.lse.into(),
            index(self.first),
            0u64.into(),
            at.out.into(),
            0u64.into(),
            int(heads),
            int(head_dim),
        ];
        // SAFETY: as above.
        unsafe { gpu.launch(&merge, [self.rows, heads.div_ceil(MERGE_HEADS), 1], &args) }
    }
}

/// A sequence with the place of its rows and their own slots.
struct OwnRows<'a> {
    sequence: QuerySequence<'a>,
    first_row: usize,
    slots: Vec<i32>,
}

impl OwnRows<'_> {
    /// The row after its last.
    fn end(&self) -> usize {
        self.first_row + self.sequence.rows
    }
}

/// Parts that `tokens` keys are cut into; one where there are none.
fn parts(tokens: usize) -> usize {
    tokens.div_ceil(PART_TOKENS).max(1)
}
