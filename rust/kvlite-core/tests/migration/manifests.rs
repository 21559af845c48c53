//! Manifests of any origin: cut, flipped and extended ones are refused by their digest; with a digest that fits, whatever
//! they say is refused in a sentence or served, and never stops the core.

use kvlite_core::{CoreConfig, CoreError};
use proptest::prelude::*;

use crate::common::engine::{Engine, small_config};
use crate::common::moving::{asked, turns};
use crate::common::{Asked, Blend};

/// First and final manifest of a request in the middle of its output.
fn manifests(asked: Asked, count: usize) -> [Vec<u8>; 2] {
    let mut engine = Engine::new(small_config());
    let handle = engine.add(asked).unwrap();
    turns(&mut engine, count);
    let first = engine.core.export_begin(handle).unwrap();
    engine.core.freeze(handle).unwrap();
    engine.turn();
    [first, engine.core.export_final(handle).unwrap()]
}

fn samples() -> Vec<[Vec<u8>; 2]> {
    let plain = Asked { n: 2, stop_token_ids: vec![98, 99], deadline_ms: Some(90), ..asked(9, 20) };
    let blend = Blend {
        spans: vec![(2, 8), (12, 4)],
        method_id: 3,
        ratio: 0.5,
        rounds: vec![kvlite_core::Round { scope: kvlite_core::Scope::All, cost: 0.3, ratio: 0.5 }],
        scores: None,
        decode_rows: 0,
    };
    let blended = Asked { blend: Some(blend.clone()), ..asked(18, 20) };
    let repairing = Asked { blend: Some(Blend { decode_rows: 2, ..blend }), ..asked(18, 20) };
    [(plain.clone(), 0), (plain, 6), (blended, 12), (repairing, 12)]
        .map(|(asked, count)| manifests(asked, count))
        .into()
}

fn sign(body: &[u8]) -> Vec<u8> {
    [body, blake3::hash(body).as_bytes()].concat()
}

/// Reserves and commits; whatever happens, the core is whole and empty afterwards.
fn serve(first: &[u8], last: &[u8]) -> bool {
    let mut engine = Engine::new(CoreConfig { num_blocks: 40, ..small_config() });
    let Ok((ticket, hits)) = engine.core.reserve(first, Some(3), None) else { return false };
    for index in hits..16 {
        for choice in 0..2 {
            if engine.core.import_block(ticket, choice, index).is_ok() {
                engine.core.import_filled(ticket, choice, index).unwrap();
            }
        }
    }
    engine.core.audit();
    let served = match engine.core.import_commit(ticket, last, Some(3), 0) {
        Ok(handle) => {
            engine.core.audit();
            engine.core.export_begin(handle).unwrap();
            engine.core.abort(handle)
        }
        Err(_) => !engine.core.import_cancel(ticket),
    };
    let len = engine.core.layout().len();
    let mut arenas = [vec![0; len], vec![0; len]];
    let [a, b] = &mut arenas;
    engine.core.step([a, b], 0, 0).unwrap();
    engine.core.audit();
    served
}

#[test]
fn a_manifest_is_served_whole_and_never_cut_or_flipped() {
    for [first, last] in samples() {
        assert!(serve(&first, &last), "as it was made");
        let mut engine = Engine::new(small_config());
        for len in 0..last.len() {
            let refused = engine.core.reserve(&last[..len], None, None);
            assert!(matches!(refused, Err(CoreError::Manifest { .. })), "{len} bytes: {refused:?}");
        }
        for bit in 0..8 * last.len() {
            let mut flipped = last.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(engine.core.reserve(&flipped, None, None), Err(CoreError::Manifest { .. })), "bit {bit}");
        }
        assert!(engine.core.reserve(&sign(&last), None, None).is_err(), "something follows its end");
        engine.assert_empty();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_forged_manifest_stops_nothing(
        sample in 0usize..4,
        of_last in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut pair = samples().swap_remove(sample);
        let forged = &mut pair[usize::from(of_last)];
        let mut body = forged[..forged.len() - 32].to_vec();
        for (at, byte) in changes {
            let at = 6 + at.index(body.len() - 6);
            body[at] = byte;
        }
        if let Some(cut) = cut {
            body.truncate(6 + cut.index(body.len() - 6));
        }
        *forged = sign(&body);
        serve(&pair[0], &pair[1]);
    }
}
