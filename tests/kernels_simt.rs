//! The emulation that the kernels are proven on finds the mistakes it is there to find.

mod kernels_support;

use half::{bf16, f16};
use kernels_support::{Arg, Buffer, Elsewhere, Library, Side, launch_elsewhere};

const SEEDS: std::ops::Range<u64> = 0..8;

fn library() -> Library {
    Library::of("tests/kernels_simt/broken.cu")
}

/// Results of a kernel with one output, per seed.
fn outputs(kernel: &str) -> Vec<Vec<i32>> {
    SEEDS
        .map(|seed| {
            let out = Buffer::<i32>::poisoned(64, Side::Back);
            library().launch(kernel, [1; 3], seed, args![&out]);
            out.read()
        })
        .collect()
}

#[track_caller]
fn refused(kernel: &str, args: &[Arg], why: &str) {
    for seed in SEEDS {
        let error = library().try_launch(kernel, [2, 1, 1], seed, args).unwrap_err();
        assert!(error.contains(why), "{kernel}, seed {seed}: {error}");
    }
}

#[test]
fn a_missing_barrier_shows_in_the_results() {
    let rotated: Vec<i32> = (0..64).map(|i| (i + 1) % 64).collect();
    assert!(outputs("race_ok").iter().all(|out| *out == rotated));
    assert!(outputs("race").iter().all(|out| *out != rotated));
}

#[test]
fn blocks_run_in_an_order_that_the_seed_draws() {
    let orders: Vec<Vec<i32>> = SEEDS
        .map(|seed| {
            let next = Buffer::of(&[0], Side::Back);
            let out = Buffer::<i32>::poisoned(24, Side::Back);
            library().launch("tickets", [3, 2, 4], seed, args![&next, &out]);
            out.read()
        })
        .collect();
    let forwards: Vec<i32> = (0..24).collect();
    assert_eq!(orders[0], forwards);
    assert!(orders[1].iter().rev().eq(&forwards));
    for order in &orders[2..] {
        assert!(orders.iter().filter(|other| *other == order).count() == 1);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, forwards);
    }
}

#[test]
fn shared_memory_written_again_too_early_shows_in_the_results() {
    let sums: Vec<i32> = (0..64).map(|i| 100 + 2 * ((i + 33) % 64)).collect();
    assert!(outputs("reused_ok").iter().all(|out| *out == sums));
    assert!(outputs("reused").iter().any(|out| *out != sums));
}

#[test]
fn barriers_that_not_all_threads_meet_are_refused() {
    let out = Buffer::<i32>::poisoned(64, Side::Back);
    for kernel in ["divergent_barrier", "two_barriers"] {
        refused(kernel, args![&out], "__syncthreads");
    }
}

#[test]
fn collectives_without_all_lanes_are_refused() {
    let out = Buffer::<f32>::poisoned(32, Side::Back);
    refused("missing_lane", args![&out], "__shfl_xor_sync");
    refused("different_collectives", args![&out], "while other lanes");
    refused("half_mask", args![&out], "only whole warps");
}

#[test]
fn reads_and_writes_outside_of_buffers_are_found() {
    let values: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let launch = |input: Side, output_len: usize, output: Side, by: i32| {
        let from = Buffer::of(&values, input);
        let to = Buffer::<f32>::poisoned(output_len, output);
        library().try_launch("shifted", [1; 3], 2, args![&from, &to, by]).map(|()| to)
    };
    assert_eq!(launch(Side::Back, 32, Side::Back, 0).unwrap().read(), values);
    for (side, by) in [(Side::Back, 1), (Side::Front, -1)] {
        let error = launch(side, 32, Side::Back, by).err().unwrap();
        assert!(error.contains("outside of every buffer"), "{error}");
    }
    // On the side without a trap one reads poison ...
    assert!(launch(Side::Front, 32, Side::Back, 1).unwrap().read()[31].is_nan());
    // ... and a write is found when the buffer is read.
    let written = launch(Side::Back, 31, Side::Front, 0).unwrap();
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| written.read())).is_err());
    assert!(launch(Side::Back, 28, Side::Back, 0).err().unwrap().contains("outside"));
}

/// The heap, as the memory of a GPU.
struct Heap;

#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Line([u8; 256]);

impl Elsewhere for Heap {
    type Memory = (Box<[Line]>, usize);

    fn put(&self, bytes: &[u8]) -> Result<Self::Memory, String> {
        let mut lines = vec![Line([0; 256]); bytes.len().div_ceil(256)].into_boxed_slice();
        for (line, bytes) in lines.iter_mut().zip(bytes.chunks(256)) {
            line.0[..bytes.len()].copy_from_slice(bytes);
        }
        Ok((lines, bytes.len()))
    }

    fn address(&self, (lines, _): &Self::Memory) -> u64 {
        lines.as_ptr() as u64
    }

    fn get(&self, (lines, len): &Self::Memory) -> Result<Vec<u8>, String> {
        Ok(lines.iter().flat_map(|line| line.0).take(*len).collect())
    }

    fn launch(&self, kernel: &str, grid: [usize; 3], args: &[Arg]) -> Result<(), String> {
        library().run_here(kernel, grid, 0, args)
    }
}

/// As a launch on a GPU has it, where no page traps.
#[test]
fn buffers_are_copied_elsewhere_and_back_with_what_lies_beside_them() {
    let values: Vec<f32> = (0..36).map(|i| i as f32).collect();
    for side in [Side::Front, Side::Back] {
        let from = Buffer::of(&values, side);
        let to = Buffer::<f32>::poisoned(32, side);
        let shifted = |from: Arg, by: i32| {
            launch_elsewhere(&Heap, "shifted", [1; 3], &[from, args![&to][0], Arg::from(by)])
        };
        shifted(args![&from][0], 0).unwrap();
        assert_eq!(to.read(), values[..32]);
        // An address inside of a buffer.
        shifted(args![from.address() as u64 + 16][0], 0).unwrap();
        assert_eq!(to.read(), values[4..]);
        // One buffer twice is one copy.
        launch_elsewhere(&Heap, "shifted", [1; 3], args![&to, &to, 0i32]).unwrap();
        assert_eq!(to.read(), values[4..]);
        // Beside a buffer one reads poison.
        shifted(args![from.address() as u64 + 32][0], 0).unwrap();
        assert!(to.read()[28..].iter().all(|x| x.is_nan()));
        // A write beside a buffer is found here where a page would trap, and by `read` elsewhere.
        let short = Buffer::<f32>::poisoned(28, side);
        let written = launch_elsewhere(&Heap, "shifted", [1; 3], args![&from, &short, 0i32]);
        match side {
            Side::Back => assert!(written.unwrap_err().contains("outside of every buffer")),
            Side::Front => {
                written.unwrap();
                let read = std::panic::AssertUnwindSafe(|| short.read());
                assert!(std::panic::catch_unwind(read).is_err());
            }
        }
    }
}

#[test]
fn shared_memory_is_bounded_and_poisoned() {
    let out = Buffer::<i32>::poisoned(32, Side::Back);
    refused("shared_overrun", args![&out], "outside of every buffer");
    refused("shared_misregistered", args![&out], "registered with");
    let out = Buffer::<f32>::poisoned(32, Side::Back);
    library().launch("uninitialised", [1; 3], 0, args![&out]);
    assert!(out.read().iter().all(|x| x.is_nan()));
}

#[test]
fn asynchronous_copies_land_when_waited_for() {
    let values: Vec<u32> = (0..128).collect();
    let (from, to) = (Buffer::of(&values, Side::Back), Buffer::<u32>::poisoned(128, Side::Back));
    library().launch("unwaited_copy_ok", [1; 3], 0, args![&from, &to]);
    let copied = to.read();
    assert_eq!((&copied[..124], &copied[124..]), (&values[..124], &[0; 4][..])); // the last is absent
    library().launch("unwaited_copy", [1; 3], 0, args![&from, &to]);
    assert_eq!(to.read(), [u32::MAX; 128]);
    // ldmatrix takes rows of eight numbers: register m of lane l is pair l % 4 of row 8 m + l / 4, as they lie.
    library().launch("unseen_copy_ok", [1; 3], 2, args![&from, &to]);
    assert_eq!(to.read(), values);
    refused("unseen_copy", args![&from, &to], "no barrier");
}

#[test]
fn wrong_launches_are_refused() {
    let out = Buffer::<i32>::poisoned(64, Side::Back);
    let input = Buffer::of(&[0f32; 8], Side::Back);
    refused("misaligned", args![&input, &out], "multiple of 16");
    refused("race_ok", args![&out, 1i32], "takes 1 arguments, not 2");
    refused("race_ok", args![1i32], "argument 0 has 8 bytes, not 4");
    let error = library().try_launch("race_ok", [0, 1, 1], 0, args![&out]).unwrap_err();
    assert!(error.contains("grid"), "{error}");
}

#[test]
fn fragments_have_the_documented_layout() {
    let number = |i: usize| bf16::from_f32(((i * 37) % 19) as f32 - 9.0);
    let (a, b): (Vec<_>, Vec<_>) = ((0..256).map(number).collect(), (0..128).map(number).collect());
    let mut want = vec![0f32; 128];
    for (i, want) in want.iter_mut().enumerate() {
        *want = (0..16).map(|k| a[i / 8 * 16 + k].to_f32() * b[k * 8 + i % 8].to_f32()).sum();
    }
    let (a, b) = (Buffer::of(&a, Side::Back), Buffer::of(&b, Side::Back));
    for kernel in ["product", "product_ldmatrix"] {
        for seed in SEEDS {
            let out = Buffer::<f32>::poisoned(128, Side::Back);
            library().launch(kernel, [1; 3], seed, args![&a, &b, &out]);
            assert_eq!(out.read(), want, "{kernel}");
        }
    }
}

/// Every bit pattern, and what lies half way to the next one, against the crate `half`.
#[test]
fn small_floats_round_to_nearest_even() {
    let library = Library::of("tests/kernels_simt/numbers.cpp");
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let widened = |function: &str| {
        let (from, to) =
            (Buffer::of(&all, Side::Back), Buffer::<f32>::poisoned(1 << 16, Side::Back));
        library.call(function, args![&from, &to, 1i32 << 16]);
        to.read()
    };
    let narrowed = |function: &str, values: &[f32]| {
        let from = Buffer::of(values, Side::Back);
        let to = Buffer::<u16>::poisoned(values.len(), Side::Back);
        library.call(function, args![&from, &to, values.len() as i32]);
        to.read()
    };
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    let (of_bf16, of_f16) = (widened("widen_bf16"), widened("widen_f16"));
    for bits in 0..=u16::MAX {
        let at = usize::from(bits);
        assert!(same(of_bf16[at], bf16::from_bits(bits).to_f32()), "bf16 {bits:x}");
        assert!(same(of_f16[at], f16::from_bits(bits).to_f32()), "f16 {bits:x}");
    }
    let mut near = Vec::new();
    for x in of_bf16.into_iter().chain(of_f16) {
        let half_way = [1u32 << 12, 1 << 15].map(|bit| f32::from_bits(x.to_bits() ^ bit));
        near.extend([x, half_way[0], half_way[1], half_way[0].next_up(), half_way[1].next_down()]);
    }
    let (to_bf16, to_f16) = (narrowed("narrow_bf16", &near), narrowed("narrow_f16", &near));
    for (x, (b, h)) in near.into_iter().zip(to_bf16.into_iter().zip(to_f16)) {
        assert!(same(bf16::from_bits(b).to_f32(), bf16::from_f32(x).to_f32()), "bf16 of {x:e}");
        assert!(same(f16::from_bits(h).to_f32(), f16::from_f32(x).to_f32()), "f16 of {x:e}");
    }
}
