//! How the rows of packed sequences are cut into tiles, and tiles into tasks.
//!
//! The cut depends on the shapes only, not on the machine, and each task adds up on its own: so do the
//! bits of the result.

use std::ops::Range;

use candle_core::{Result, bail};

use super::Heads;

/// Query rows (tokens times the heads that share a KV head) per tile, about.
const TILE_ROWS: usize = 128;
/// Tasks to aim for: enough for the processors of one machine, few enough that the tasks' own sums of the
/// prefix's gradient stay small.
const TASKS: usize = 32;

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tile {
    pub tokens: Range<usize>,
    /// Where the sequence begins: the tile's tokens see from here up to themselves.
    pub sequence: usize,
}

/// Consecutive tiles, computed one after the other for one KV head.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    pub tiles: Range<usize>,
    pub tokens: Range<usize>,
    /// Own tokens that any of its rows sees.
    pub seen: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Plan {
    pub tokens: usize,
    pub prefix: usize,
    pub tiles: Vec<Tile>,
    pub groups: Vec<Group>,
}

impl Plan {
    /// `cu_seqlens` must ascend from 0 to `tokens`.
    pub fn new(cu_seqlens: &[u32], tokens: usize, prefix: usize, heads: Heads) -> Result<Self> {
        let covers = cu_seqlens.first() == Some(&0)
            && cu_seqlens.last().is_some_and(|end| *end as usize == tokens)
            && cu_seqlens.is_sorted();
        if !covers {
            bail!("prefix attention: cu_seqlens must ascend from 0 to the {tokens} tokens");
        }
        let step = (TILE_ROWS / (heads.heads / heads.kv_heads)).max(1);
        let mut tiles = Vec::new();
        for ends in cu_seqlens.windows(2) {
            let (start, end) = (ends[0] as usize, ends[1] as usize);
            tiles.extend(
                (start..end)
                    .step_by(step)
                    .map(|first| Tile { tokens: first..end.min(first + step), sequence: start }),
            );
        }
        let groups = grouped(&tiles, prefix, TASKS.div_ceil(heads.kv_heads));
        Ok(Self { tokens, prefix, tiles, groups })
    }

    /// Keys that the rows of a tile see at most.
    pub fn width(&self, tile: &Tile) -> usize {
        self.prefix + tile.tokens.end - tile.sequence
    }
}

/// At most `parts` groups of about the same work.
fn grouped(tiles: &[Tile], prefix: usize, parts: usize) -> Vec<Group> {
    let work = |tile: &Tile| tile.tokens.len() * (prefix + tile.tokens.end - tile.sequence);
    let total = tiles.iter().map(work).sum::<usize>().max(1);
    let mut groups: Vec<Group> = Vec::new();
    let (mut before, mut last_part) = (0, None);
    for (index, tile) in tiles.iter().enumerate() {
        // Where the middle of this tile's work falls.
        let part = (before + work(tile) / 2) * parts / total;
        before += work(tile);
        match groups.last_mut() {
            Some(group) if last_part == Some(part) => {
                group.tiles.end = index + 1;
                group.tokens.end = tile.tokens.end;
                group.seen.end = tile.tokens.end;
            }
            _ => groups.push(Group {
                tiles: index..index + 1,
                tokens: tile.tokens.clone(),
                seen: tile.sequence..tile.tokens.end,
            }),
        }
        last_part = Some(part);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_and_groups_cover_every_token_once_in_order() {
        let heads = Heads { heads: 8, kv_heads: 4, head_dim: 8 };
        for cu_seqlens in [vec![0, 1], vec![0, 700, 701, 701, 900], vec![0], vec![0, 5000]] {
            let tokens = *cu_seqlens.last().unwrap() as usize;
            let plan = Plan::new(&cu_seqlens, tokens, 13, heads).unwrap();
            let mut next = 0;
            for tile in &plan.tiles {
                assert_eq!(tile.tokens.start, next);
                assert!(cu_seqlens.contains(&(tile.sequence as u32)));
                next = tile.tokens.end;
            }
            assert_eq!(next, tokens);
            let (mut next_tile, mut next_token) = (0, 0);
            for group in &plan.groups {
                assert_eq!((group.tiles.start, group.tokens.start), (next_tile, next_token));
                for tile in &plan.tiles[group.tiles.clone()] {
                    assert!(group.seen.start <= tile.sequence && tile.tokens.end <= group.seen.end);
                }
                (next_tile, next_token) = (group.tiles.end, group.tokens.end);
            }
            assert_eq!((next_tile, next_token), (plan.tiles.len(), tokens));
            assert!(plan.groups.len() <= TASKS);
        }
    }

    #[test]
    fn lengths_that_do_not_cover_the_tokens_are_refused() {
        let heads = Heads { heads: 1, kv_heads: 1, head_dim: 8 };
        for cu_seqlens in [&[][..], &[0, 3], &[1, 4], &[0, 5], &[0, 3, 2, 4]] {
            assert!(Plan::new(cu_seqlens, 4, 0, heads).is_err(), "{cu_seqlens:?}");
        }
    }
}
