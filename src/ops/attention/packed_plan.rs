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

/// Consecutive queries of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tile {
    pub queries: Range<usize>,
    /// Tokens that the last of them sees: from the start of the sequence up to itself.
    pub seen: Range<usize>,
}

/// Consecutive tiles, computed one after the other for one KV head.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    pub tiles: Range<usize>,
    pub queries: Range<usize>,
    /// Own tokens that any of its queries sees.
    pub seen: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Plan {
    pub tokens: usize,
    /// The token of each query.
    pub positions: Vec<usize>,
    pub tiles: Vec<Tile>,
    pub groups: Vec<Group>,
}

impl Plan {
    /// `cu_seqlens` must ascend from 0, and `queries` strictly within its last.
    pub fn new(cu_seqlens: &[u32], queries: &[u32], heads: Heads) -> Result<Self> {
        if cu_seqlens.first() != Some(&0) || !cu_seqlens.is_sorted() {
            bail!("prefix attention: cu_seqlens must ascend from 0");
        }
        let tokens = cu_seqlens.last().map_or(0, |end| *end as usize);
        let positions: Vec<usize> = queries.iter().map(|token| *token as usize).collect();
        if !positions.is_sorted_by(|a, b| a < b) || positions.last().is_some_and(|t| *t >= tokens) {
            bail!("prefix attention: queries must ascend within the {tokens} tokens");
        }
        let step = (TILE_ROWS / (heads.heads / heads.kv_heads)).max(1);
        let mut tiles = Vec::new();
        let mut next = 0;
        for ends in cu_seqlens.windows(2) {
            let end = next + positions[next..].partition_point(|token| *token < ends[1] as usize);
            tiles.extend((next..end).step_by(step).map(|first| {
                let queries = first..end.min(first + step);
                Tile { seen: ends[0] as usize..positions[queries.end - 1] + 1, queries }
            }));
            next = end;
        }
        let groups = grouped(&tiles, TASKS.div_ceil(heads.kv_heads));
        Ok(Self { tokens, positions, tiles, groups })
    }

    /// Own tokens that query `query` of `tile` sees.
    pub fn visible(&self, tile: &Tile, query: usize) -> usize {
        self.positions[query] + 1 - tile.seen.start
    }
}

/// At most `parts` groups of about the same work.
fn grouped(tiles: &[Tile], parts: usize) -> Vec<Group> {
    /// What a row costs besides the products with its own tokens, as so many more of them.
    const ROW: usize = 64;
    let work = |tile: &Tile| tile.queries.len() * (ROW + tile.seen.len());
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
                group.queries.end = tile.queries.end;
                group.seen.end = tile.seen.end;
            }
            _ => groups.push(Group {
                tiles: index..index + 1,
                queries: tile.queries.clone(),
                seen: tile.seen.clone(),
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
    fn tiles_and_groups_cover_every_query_once_in_order() {
        let heads = Heads { heads: 8, kv_heads: 4, head_dim: 8 };
        for (cu_seqlens, step) in [
            (vec![0, 1], 1),
            (vec![0, 700, 701, 701, 900], 1),
            (vec![0, 700, 701, 701, 900], 7),
            (vec![0], 1),
            (vec![0, 5000], 1),
            (vec![0, 500, 5000], 601),
        ] {
            let queries: Vec<u32> = (0..*cu_seqlens.last().unwrap()).step_by(step).collect();
            let plan = Plan::new(&cu_seqlens, &queries, heads).unwrap();
            let mut next = 0;
            for tile in &plan.tiles {
                assert_eq!(tile.queries.start, next);
                next = tile.queries.end;
                for query in tile.queries.clone() {
                    let token = queries[query];
                    let start = cu_seqlens.iter().filter(|start| **start <= token).max().unwrap();
                    assert_eq!(tile.seen.start, *start as usize);
                    assert_eq!(plan.visible(tile, query), (token - start) as usize + 1);
                    assert!(plan.visible(tile, query) <= tile.seen.len());
                }
            }
            assert_eq!(next, queries.len());
            let (mut next_tile, mut next_query) = (0, 0);
            for group in &plan.groups {
                assert_eq!((group.tiles.start, group.queries.start), (next_tile, next_query));
                for tile in &plan.tiles[group.tiles.clone()] {
                    assert!(group.seen.start <= tile.seen.start && tile.seen.end <= group.seen.end);
                }
                (next_tile, next_query) = (group.tiles.end, group.queries.end);
            }
            assert_eq!((next_tile, next_query), (plan.tiles.len(), queries.len()));
            assert!(plan.groups.len() <= TASKS);
        }
    }

    #[test]
    fn sequences_and_queries_that_do_not_fit_are_refused() {
        let heads = Heads { heads: 1, kv_heads: 1, head_dim: 8 };
        for (cu_seqlens, queries) in [
            (&[][..], &[][..]),
            (&[1, 4], &[]),
            (&[0, 3, 2, 4], &[]),
            (&[0, 3], &[3]),
            (&[0, 3], &[1, 1]),
            (&[0, 3], &[2, 1]),
        ] {
            assert!(Plan::new(cu_seqlens, queries, heads).is_err(), "{cu_seqlens:?} {queries:?}");
        }
    }
}
