//! A teacher's likeliest tokens at each position of a message, as parallel arrays.

/// Log-probabilities at or below this are filler for a position with fewer than K entries (Gen-2 writes
/// -1000, others minus infinity).
const FILLER_LOGPROB: f32 = -1000.0;
/// A log-probability may be this much above 0: teachers round in half precision.
const ROUNDING: f32 = 1e-2;

/// Ragged top-k log-probabilities: entry `i` says that at position `positions()[i]` of the message the token
/// `ids()[i]` had the log-probability `logprobs()[i]`. In order of position, likeliest first within one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopLogprobs {
    positions: Vec<u32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    tokens: u32,
    width: u32,
}

/// Which of a position's entries are kept: the likeliest, until their probabilities add up to
/// `min_prob_mass`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MassCut {
    /// From 0 to 1.
    pub min_prob_mass: f64,
    /// When all entries together stay below: keep only the likeliest, as the first Gen-2 data was made,
    /// instead of all of them.
    pub top1_when_short: bool,
}

impl Default for MassCut {
    fn default() -> Self {
        Self { min_prob_mass: 0.99, top1_when_short: false }
    }
}

impl TopLogprobs {
    /// From the arrays of `FlatTopLogprobs`. `shape` is [tokens of the message, K]; without it both are
    /// taken from the entries. Fillers (id -1, or a log-probability of at most -1000) are left out.
    ///
    /// # Errors
    /// What contradicts itself, as the end of a sentence that begins with the name of the field.
    pub fn flat(
        positions: &[i64],
        ids: &[i64],
        logprobs: &[f32],
        shape: Option<&[i64]>,
    ) -> Result<Self, String> {
        if positions.len() != ids.len() || ids.len() != logprobs.len() {
            return Err(format!(
                "has {} token_idx, {} token_id and {} logprobs; all three must be as long",
                positions.len(),
                ids.len(),
                logprobs.len()
            ));
        }
        let found = positions.iter().max().map_or(0, |last| last.saturating_add(1));
        let (tokens, width) = match shape {
            None => (found, 0),
            Some(&[tokens, width]) => (tokens, width),
            Some(other) => {
                return Err(format!("has the shape {other:?}; it should be [tokens, k]"));
            }
        };
        let number = |n: i64| u32::try_from(n).map_err(|_| format!("has {n} in its shape"));
        let (tokens, width) = (number(tokens)?, number(width)?);
        let mut entries = Vec::with_capacity(ids.len());
        for ((&position, &id), &logprob) in positions.iter().zip(ids).zip(logprobs) {
            let position =
                u32::try_from(position).ok().filter(|p| *p < tokens).ok_or_else(|| {
                    format!("has token_idx {position} in a message of {tokens} tokens")
                })?;
            entries.extend(entry(position, id, logprob)?);
        }
        Ok(Self::from_entries(entries, tokens, width))
    }

    /// From two lists of lists [tokens of the message][k], which may be ragged.
    ///
    /// # Errors
    /// As [`Self::flat`].
    pub fn dense(ids: &[Vec<i64>], logprobs: &[Vec<f32>]) -> Result<Self, String> {
        if ids.len() != logprobs.len() {
            return Err(format!(
                "has ids of {} tokens and logprobs of {}",
                ids.len(),
                logprobs.len()
            ));
        }
        let tokens = u32::try_from(ids.len()).map_err(|_| "is too long".to_owned())?;
        let mut entries = Vec::new();
        for (position, (ids, logprobs)) in (0..).zip(ids.iter().zip(logprobs)) {
            if ids.len() != logprobs.len() {
                let (ids, logprobs) = (ids.len(), logprobs.len());
                return Err(format!("has {ids} ids and {logprobs} logprobs at token {position}"));
            }
            for (&id, &logprob) in ids.iter().zip(logprobs) {
                entries.extend(entry(position, id, logprob)?);
            }
        }
        let width = ids.iter().map(Vec::len).max().unwrap_or(0);
        Ok(Self::from_entries(entries, tokens, u32::try_from(width).unwrap_or(u32::MAX)))
    }

    fn from_entries(mut entries: Vec<(u32, u32, f32)>, tokens: u32, width: u32) -> Self {
        // Teachers write them in this order, so that sorting (stable) is one pass.
        entries.sort_by(|a, b| a.0.cmp(&b.0).then(b.2.total_cmp(&a.2)));
        let widest = entries.chunk_by(|a, b| a.0 == b.0).map(<[_]>::len).max().unwrap_or(0);
        Self {
            positions: entries.iter().map(|e| e.0).collect(),
            ids: entries.iter().map(|e| e.1).collect(),
            logprobs: entries.iter().map(|e| e.2).collect(),
            tokens,
            width: width.max(u32::try_from(widest).unwrap_or(u32::MAX)),
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Token indices within the message, ascending.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub fn logprobs(&self) -> &[f32] {
        &self.logprobs
    }

    /// Tokens of the message they belong to.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The most entries a position can have.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Position, token id and log-probability of every entry.
    pub fn entries(&self) -> impl Iterator<Item = (u32, u32, f32)> {
        let ids = self.ids.iter().zip(&self.logprobs);
        self.positions.iter().zip(ids).map(|(&position, (&id, &logprob))| (position, id, logprob))
    }

    /// Leaves out the unlikely entries of each position. Cutting again with the same arguments changes
    /// nothing.
    #[must_use]
    pub fn cut(&self, cut: MassCut) -> Self {
        let entries: Vec<_> = self.entries().collect();
        let kept = entries
            .chunk_by(|a, b| a.0 == b.0)
            .flat_map(|position| &position[..kept(position, cut)])
            .copied()
            .collect();
        Self::from_entries(kept, self.tokens, self.width)
    }
}

/// How many of a position's entries, likeliest first, are kept.
fn kept(position: &[(u32, u32, f32)], cut: MassCut) -> usize {
    // Data that was cut before has a last entry with which its writer's f32 sum just came to the mass.
    let wanted = cut.min_prob_mass - 1e-6;
    let mut mass = 0.0;
    for (count, &(_, _, logprob)) in (1..).zip(position) {
        mass += f64::from(logprob).exp();
        if mass >= wanted {
            return count;
        }
    }
    if cut.top1_when_short { position.len().min(1) } else { position.len() }
}

/// An entry, or nothing for a filler.
fn entry(position: u32, id: i64, logprob: f32) -> Result<Option<(u32, u32, f32)>, String> {
    if id == -1 || logprob <= FILLER_LOGPROB {
        return Ok(None);
    }
    if logprob.is_nan() || logprob > ROUNDING {
        return Err(format!(
            "has the log-probability {logprob} at token {position}; it must be at most 0"
        ));
    }
    let id = u32::try_from(id).map_err(|_| format!("has the token id {id} at token {position}"))?;
    Ok(Some((position, id, logprob.min(0.0))))
}

#[cfg(test)]
#[path = "top_logprobs_tests.rs"]
mod tests;
