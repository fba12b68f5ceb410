use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::demo;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::from_bytes(demo::model_file("tokenizer.json").unwrap()).unwrap()
    });
    &TOKENIZER
}

fn chunks<'a>(
    document: &'a str,
    tokenizer: &'a Tokenizer,
    min: usize,
    max: usize,
    seed: u64,
) -> Chunks<'a> {
    Chunks::new(document, tokenizer, ChunkSizes { min, max }, seed).unwrap()
}

#[test]
fn a_short_document_is_one_chunk() {
    let tokenizer = tokenizer();
    let text = "Ondar\nVelby";
    let chunk = chunks(text, tokenizer, 100, 200, 1).chunk(3).unwrap();
    assert_eq!(chunk.bytes, 0..text.len());
    assert_eq!(chunks("", tokenizer, 1, 2, 1).chunk(0).unwrap().bytes, 0..0);
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    let tokenizer = tokenizer();
    for (min, max) in [(0, 5), (6, 5)] {
        let error = Chunks::new("text", tokenizer, ChunkSizes { min, max }, 1).unwrap_err();
        assert!(matches!(error, SelfStudyError::ChunkSizes { .. }), "{error}");
    }
}

/// Documents with lines get chunks of whole lines, all over the document, evenly.
#[test]
fn chunks_are_lines_from_everywhere() {
    let tokenizer = tokenizer();
    let document = demo::DOCUMENTS[0].text;
    let chunks = chunks(document, tokenizer, 60, 120, 9);
    let mut covered = vec![0_usize; document.len()];
    for index in 0..200 {
        let Chunk { bytes, tokens } = chunks.chunk(index).unwrap();
        assert!((60..=120).contains(&tokens), "{tokens}");
        let text = &document[bytes.clone()];
        assert!(bytes.start == 0 || document[..bytes.start].ends_with('\n'), "{text:?}");
        assert!(bytes.end == document.len() || text.ends_with('\n'), "{text:?}");
        covered[bytes].iter_mut().for_each(|times| *times += 1);
    }
    let (least, most) = (covered.iter().min().unwrap(), covered.iter().max().unwrap());
    assert!(*least >= 6 && *most <= 6 * least, "a byte is in {least} to {most} chunks");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Of any text: within the bounds, at chars, the same again.
    #[test]
    fn chunks_keep_their_bounds(
        text in "([a-zé漢😀 .]{0,30}\n?){0,40}",
        min in 1_usize..40,
        more in 0_usize..40,
        seed in any::<u64>(),
        index in 0_usize..100_000,
    ) {
        let tokenizer = tokenizer();
        let chunks = chunks(&text, tokenizer, min, min + more, seed);
        let chunk = chunks.chunk(index).unwrap();
        let part = text.get(chunk.bytes.clone());
        prop_assert!(part.is_some(), "{:?}", chunk);
        let whole = tokenizer.encode(&text, false).unwrap().len();
        // A char of several tokens cannot be cut: such a chunk may be shorter.
        let slack = 4;
        prop_assert!(chunk.tokens + slack >= min.min(whole), "{:?} of {}", chunk, whole);
        prop_assert!(chunk.tokens <= min + more || part.is_some_and(|p| p.chars().count() <= 1));
        prop_assert_eq!(&chunk, &chunks.chunk(index).unwrap());
    }
}
