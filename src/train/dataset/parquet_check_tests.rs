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
