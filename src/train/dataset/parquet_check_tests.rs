use super::*;

/// A footer with version 2 and a schema of nodes that claim these numbers of children.
fn footer(children: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x15, 4, 0x19, 0xFC, children.len() as u8];
    for count in children {
        // name "a", num_children (zigzag), end.
        bytes.extend([0x48, 1, b'a', 0x15, count << 1, 0]);
    }
    bytes.extend([0x16, 0, 0]);
    bytes
}

fn schema(nodes: u64, depth: usize) -> Option<Schema> {
    Some(Schema { nodes, depth })
}

#[test]
fn schemas_are_counted_and_their_children_bounded() {
    assert_eq!(Schema::read(&footer(&[2, 0, 0])), schema(3, 2));
    assert_eq!(Schema::read(&footer(&[2, 1, 1, 0, 1, 0])), schema(6, 4));
    assert_eq!(Schema::read(&footer(&[3, 1, 0, 0, 2, 0, 0])), schema(7, 3));
    // More nodes than are read are counted, not walked.
    let mut many = vec![0x15, 4, 0x19, 0xFC];
    many.extend([0xFF, 0xFF, 0xFF, 0x7F]);
    assert_eq!(Schema::read(&many), schema((1 << 28) - 1, 0));
    assert_eq!(Schema::read(&[0x15, 4, 0]), None);
    assert_eq!(Schema::read(&[]), None);
}

/// A file could make the reader reserve gigabytes by a number in its schema.
#[test]
fn a_node_with_more_children_than_nodes_is_refused() {
    assert_eq!(Schema::read(&footer(&[4, 0, 0])), None);
}

#[test]
fn page_headers_are_read_with_their_length() {
    // type 0, sizes 40 and 20, a data page header: 9 values, encoding 3, levels 3 and 3.
    let header = [0x15, 0, 0x15, 80, 0x15, 40, 0x2C, 0x15, 18, 0x15, 6, 0x15, 6, 0x15, 6, 0, 0];
    let (page, length) = Page::read(&[&header[..], &[7, 7]].concat()).unwrap();
    assert_eq!(length, header.len());
    assert_eq!(page, Page { inflated: 40, stored: 20, values: 9, encodings: vec![3] });
    for cut in 0..header.len() {
        assert_eq!(Page::read(&header[..cut]), None);
    }
    // A negative size.
    assert_eq!(Page::read(&[0x25, 1, 0]), None);
}

#[test]
fn deep_and_endless_values_end_the_walk() {
    let deep = vec![0x1C; 100_000];
    assert_eq!(Page::read(&deep), None);
    // A list of 2^63 bools in two bytes.
    let mut endless = vec![0x19, 0xF1];
    endless.extend([0xFF; 8]);
    endless.push(0x7F);
    assert_eq!(Page::read(&endless), None);
}

/// Pages of some bytes could claim billions of equal values, or gigabytes of room.
#[test]
fn pages_that_claim_too_much_are_refused() {
    use std::io::Write;
    // Sizes 2000 and `stored`, a data page header with 2^21 - 1 values and the given encoding.
    let page = |stored: u8, encoding: u8| {
        let mut page = vec![0x15, 0, 0x15, 0xA0, 0x1F, 0x15, stored * 2];
        page.extend([0x2C, 0x15, 0xFE, 0xFF, 0xFF, 0x01, 0x15, encoding * 2, 0, 0]);
        page.extend(vec![9; stored.into()]);
        page
    };
    let check = |pages: &[Vec<u8>], file_bytes| {
        let bytes = pages.concat();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let mut budget = Budget::new(file_bytes);
        budget.check_chunk(&file, 0, bytes.len() as u64).map(|()| budget.values)
    };
    let good = || page(60, 3);
    let values = (1 << 21) - 1;
    assert_eq!(check(&[good(), good()], 200), Ok(MIN_PARQUET_VALUES + 3200 - 2 * values));
    let e = check(&[good(), good(), good()], 300).unwrap_err();
    assert!(e.contains("far more values"), "{e}");
    let e = check(&[page(20, 3)], 200).unwrap_err();
    assert!(e.contains("damaged page at byte 0"), "{e}");
    let e = check(&[good(), page(60, 5)], 300).unwrap_err();
    assert!(e.contains("page encoding"), "{e}");
    // Column chunks that overlap: together they are longer than the file.
    assert_eq!(check(&[good()], 60), Err(BROKEN.to_owned()));
}
