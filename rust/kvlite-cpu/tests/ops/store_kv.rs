//! `store_kv`: rows land in their slots, nothing else changes, nothing is written on an error.

use std::cell::Cell;

use kvlite_cpu::{Error, KvCacheCells, Rows, store_kv};

const BLOCKS: usize = 4;
const BLOCK_SIZE: usize = 3;
const WIDTH: usize = 2 * 5;

fn run(slots: &[i32], pool: &[Cell<f32>]) -> Result<(), Error> {
    let qkv: Vec<f32> = (0..slots.len() * 30).map(|i| i as f32).collect(); // q, k and v side by side
    let k = Rows::new("k", &qkv[10.min(qkv.len())..], [slots.len(), 2, 5], 30)?;
    let v = Rows::new("v", &qkv[20.min(qkv.len())..], [slots.len(), 2, 5], 30)?;
    let half = BLOCK_SIZE * WIDTH;
    let (shape, strides) = ([BLOCKS, BLOCK_SIZE, 2, 5], [2 * half, WIDTH, 5]);
    let k_cache = KvCacheCells::new("k_cache", pool, shape, strides)?;
    let v_cache = KvCacheCells::new("v_cache", &pool[half..], shape, strides)?;
    store_kv(&k, &v, &k_cache, &v_cache, slots)
}

fn poisoned() -> Vec<Cell<f32>> {
    vec![Cell::new(f32::NAN); BLOCKS * 2 * BLOCK_SIZE * WIDTH]
}

#[test]
fn rows_land_in_their_slots_and_nothing_else_changes() {
    let pool = poisoned();
    let slots = [7, -1, 0, 11, -1];
    run(&slots, &pool).expect("valid");
    for (i, cell) in pool.iter().enumerate() {
        let (block, side) = (i / (2 * BLOCK_SIZE * WIDTH), i / (BLOCK_SIZE * WIDTH) % 2);
        let slot = block * BLOCK_SIZE + i / WIDTH % BLOCK_SIZE;
        match slots.iter().position(|&s| s == slot as i32) {
            Some(token) => assert_eq!(cell.get(), (token * 30 + 10 + side * 10 + i % WIDTH) as f32),
            None => assert!(cell.get().is_nan(), "slot {slot} was written"),
        }
    }
}

#[test]
fn a_slot_outside_the_pool_is_refused_before_anything_is_written() {
    for slot in [12, -2, i32::MAX, i32::MIN] {
        let pool = poisoned();
        let error = run(&[3, slot], &pool).expect_err("accepted");
        assert_eq!(error, Error::Slot { token: 1, slot, last: 11 });
        assert!(pool.iter().all(|cell| cell.get().is_nan()));
    }
}

#[test]
fn no_tokens_is_no_work() {
    run(&[], &poisoned()).expect("valid");
}

#[test]
fn views_that_reach_past_their_memory_are_refused() {
    let pool = poisoned();
    let short = KvCacheCells::new("k_cache", &pool, [BLOCKS + 1, BLOCK_SIZE, 2, 5], [60, 10, 5]);
    assert!(matches!(short, Err(Error::Extent { name: "k_cache", len: 240 })));
    let huge = KvCacheCells::new("k_cache", &pool, [usize::MAX, BLOCK_SIZE, 2, 5], [60, 10, 5]);
    assert!(huge.is_err());
    assert!(Rows::new("k", &[0.0f32; 29], [2, 2, 5], 20).is_err());
    assert!(Rows::new("k", &[0.0f32; 30], [2, 2, 5], 20).is_ok());
}
