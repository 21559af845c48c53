//! `place_kv`: the same bits as `rope` and then `store_kv`, on every instruction set; nothing else changes; refusals.

use std::cell::Cell;

use kvlite_cpu::{
    Element, Error, Exec, Isa, KvCacheCells, PlaceKv, PoolMut, Rows, RowsCells, Threads, bf16, f16, place_kv, rope,
    store_kv,
};

use crate::oracle::{Rng, every_isa};

const BLOCKS: usize = 40;
const LAYERS: usize = 3;
const BLOCK_SIZE: usize = 5;
const SHAPES: [(usize, usize, usize); 3] = [(2, 24, 12), (1, 7, 2), (3, 64, 32)]; // KV heads, head dim, half

fn random<E: Element>(len: usize, seed: u64) -> Vec<E> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| E::from_f32(rng.unit())).collect()
}

fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// Rows of one side of one layer, packed.
fn gather<E: Element>(pool: &[E], layer: usize, side: usize, slots: &[i32], [kv_heads, dim]: [usize; 2]) -> Vec<E> {
    let at = |slot: usize, head: usize| {
        let heads = ((slot / BLOCK_SIZE * LAYERS + layer) * 2 + side) * kv_heads + head;
        (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * dim
    };
    let each = slots.iter().flat_map(|&slot| (0..kv_heads).map(move |head| (slot as usize, head)));
    each.flat_map(|(slot, head)| pool[at(slot, head)..][..dim].to_vec()).collect()
}

fn check<E: Element>(rows: usize) {
    for ((kv_heads, dim, half), exec) in SHAPES.into_iter().flat_map(|s| every_isa().into_iter().map(move |e| (s, e))) {
        let width = kv_heads * dim;
        let shape = [BLOCKS, LAYERS, 2, kv_heads, BLOCK_SIZE, dim];
        let mut pool = random::<E>(shape.iter().product(), 1);
        let (cos, sin) = (random::<f32>(30 * half, 2), random::<f32>(30 * half, 3));
        let table = |values| Rows::new("table", values, [30, 1, half], half).expect("fits");
        let source: Vec<i32> = (0..rows as i32).map(|i| i * 7 % 90).collect();
        let target: Vec<i32> = (0..rows as i32).map(|i| 199 - i).collect();
        let positions: Vec<i32> = (0..rows as i32).map(|i| i * 11 % 30).collect();

        let mut expected = pool.clone();
        for layer in 0..LAYERS {
            let mut k = gather(&pool, layer, 0, &source, [kv_heads, dim]);
            let v = gather(&pool, layer, 1, &source, [kv_heads, dim]);
            let cells =
                |values| RowsCells::new("k", Cell::from_mut(values).as_slice_of_cells(), [rows, kv_heads, dim], width);
            let mut none: [E; 0] = [];
            let no_q = RowsCells::new("q", Cell::from_mut(&mut none[..]).as_slice_of_cells(), [rows, 0, dim], 0);
            rope(
                &exec,
                &no_q.expect("fits"),
                &cells(&mut k[..]).expect("fits"),
                &positions,
                &table(&cos),
                &table(&sin),
            )
            .expect("valid");
            let memory = Cell::from_mut(&mut expected[..]).as_slice_of_cells();
            let half_block = BLOCK_SIZE * width;
            let cache = |side: usize| {
                let strides = [LAYERS * 2 * half_block, dim, BLOCK_SIZE * dim];
                let start = (layer * 2 + side) * half_block;
                KvCacheCells::new("cache", &memory[start..], [BLOCKS, BLOCK_SIZE, kv_heads, dim], strides)
                    .expect("fits")
            };
            let packed = |values| Rows::new("rows", values, [rows, kv_heads, dim], width).expect("fits");
            store_kv(&packed(&k), &packed(&v), &cache(0), &cache(1), &target).expect("valid");
        }

        let args = PlaceKv {
            source_slot: &source,
            target_slot: &target,
            positions: &positions,
            cos: table(&cos),
            sin: table(&sin),
        };
        place_kv(&exec, &args, &mut PoolMut::new("kv_pool", &mut pool, shape).expect("fits")).expect("valid");
        assert_eq!(bits(&pool), bits(&expected), "{:?} {shape:?} half {half}", exec.isa);
    }
}

#[test]
fn placed_rows_have_the_bits_of_rope_and_store_kv_and_nothing_else_changes() {
    for rows in [0, 1, 63, 100] {
        check::<f32>(rows);
        check::<bf16>(rows);
        check::<f16>(rows);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let shape = [400, 6, 2, 2, 16, 64];
    let rows = 3000;
    let (source, target): (Vec<i32>, Vec<i32>) = ((0..rows).collect(), (rows..2 * rows).collect());
    let (cos, sin) = (random::<f32>(3000 * 32, 2), random::<f32>(3000 * 32, 3));
    let table = |values| Rows::new("table", values, [3000, 1, 32], 32).expect("fits");
    let args =
        PlaceKv { source_slot: &source, target_slot: &target, positions: &source, cos: table(&cos), sin: table(&sin) };
    let placed = [1, 4].map(|count| {
        let mut pool = random::<f32>(shape.iter().product(), 1);
        let exec = Exec { isa: Isa::detect(), threads: Threads::new(count) };
        place_kv(&exec, &args, &mut PoolMut::new("kv_pool", &mut pool, shape).expect("fits")).expect("valid");
        bits(&pool)
    });
    assert!(placed[0] == placed[1]);
}

fn refused(source: &[i32], target: &[i32], positions: &[i32], half: usize) -> Error {
    let shape = [2, 1, 2, 1, 4, 6];
    let mut pool = vec![f32::NAN; shape.iter().product()];
    let table = vec![0.0f32; 10 * half];
    let table = Rows::new("table", &table, [10, 1, half], half).expect("fits");
    let args = PlaceKv { source_slot: source, target_slot: target, positions, cos: table, sin: table };
    let exec = Exec::detect(1);
    let error =
        place_kv(&exec, &args, &mut PoolMut::new("kv_pool", &mut pool, shape).expect("fits")).expect_err("accepted");
    assert!(pool.iter().all(|x| x.is_nan()), "written before {error}");
    error
}

#[test]
fn what_is_wrong_is_named_and_nothing_is_written() {
    let at = |name, row, slot| Error::RowSlot { name, row, slot, slots: 8 };
    let twice = |name, row, slot| Error::SharedSlot { name, row, slot };
    assert_eq!(refused(&[0, 8], &[4, 5], &[0, 0], 3), at("source_slot", 1, 8));
    assert_eq!(refused(&[0, 1], &[4, -1], &[0, 0], 3), at("target_slot", 1, -1));
    assert_eq!(refused(&[0, 1], &[4, 4], &[0, 0], 3), twice("target_slot", 1, 4));
    assert_eq!(refused(&[0, 4], &[4, 5], &[0, 0], 3), twice("source_slot", 1, 4));
    assert_eq!(refused(&[0], &[0], &[0], 3), twice("source_slot", 0, 0));
    assert_eq!(refused(&[0, 0], &[4, 5], &[0, 10], 3), Error::Position { token: 1, value: 10, positions: 10 });
    assert!(matches!(refused(&[0], &[4, 5], &[0], 3), Error::Shape { name: "length of target_slot", .. }));
    assert!(matches!(refused(&[0], &[4], &[], 3), Error::Shape { name: "length of positions", .. }));
    assert!(matches!(refused(&[0], &[4], &[0], 4), Error::Shape { name: "columns of cos", .. }));
}

#[test]
fn a_pool_of_another_size_is_no_pool() {
    for shape in [[2, 1, 2, 1, 4, 7], [2, 1, 1, 1, 4, 12], [usize::MAX, 2, 2, 1, 4, 6]] {
        assert!(matches!(PoolMut::new("kv_pool", &mut [0.0f32; 96], shape), Err(Error::Extent { .. })));
    }
    assert!(PoolMut::new("kv_pool", &mut [0.0f32; 96], [2, 1, 2, 1, 4, 6]).is_ok());
}
