//! What an export, an import or a replay refuses, each with a sentence that says what would be right; nothing changes then.

use kvlite_core::{CoreConfig, CoreError};

use crate::common::Asked;
use crate::common::engine::{Engine, small_config};
use crate::common::moving::{Move, asked, move_now, prompt, turns};

fn running(config: CoreConfig, asked: Asked) -> (Engine, i32) {
    let mut engine = Engine::new(config);
    let handle = engine.add(asked).unwrap();
    turns(&mut engine, 4);
    (engine, handle)
}

#[test]
fn every_call_out_of_order_is_refused_by_name() {
    let (mut a, handle) = running(small_config(), asked(9, 20));
    let unknown = CoreError::UnknownHandle { handle: 99 };
    assert_eq!(a.core.export_begin(99), Err(unknown.clone()));
    assert_eq!(a.core.freeze(99), Err(unknown));
    assert_eq!(a.core.export_stage(handle, 0), Err(CoreError::NotExported { handle }));
    a.core.export_begin(handle).unwrap();
    assert_eq!(a.core.export_begin(handle), Err(CoreError::AlreadyExported { handle }));
    assert_eq!(a.core.export_final(handle), Err(CoreError::NotFrozen { handle }));
    assert_eq!(a.core.export_commit(handle), Err(CoreError::NotFrozen { handle }));
    let (hold, _) = a.core.export_stage(handle, 0).unwrap();
    a.core.transfer_done(hold).unwrap();
    assert_eq!(a.core.transfer_done(hold), Err(CoreError::UnknownHold { hold }));
    assert!(a.core.export_abort(handle) && !a.core.export_abort(99));
    let segment = a.core.add_segment(&[1, 2, 3, 4], 0, false, None, 0).unwrap();
    assert_eq!(a.core.export_begin(segment), Err(CoreError::MakesSegment { handle: segment }));
}

#[test]
fn reservations_know_their_blocks_and_nobody_elses() {
    let (mut a, handle) = running(small_config(), Asked { n: 2, ..asked(9, 20) });
    let mut b = Engine::new(small_config());
    let manifest = a.core.export_begin(handle).unwrap();
    let (ticket, hits) = b.core.reserve(&manifest, None, None).unwrap();
    assert_eq!(hits, 0);
    for (choice, index) in [(1, 0), (2, 3), (0, 7), (0, u32::MAX)] {
        let refused = Err(CoreError::NotAwaited { ticket, choice, index });
        assert_eq!(b.core.import_block(ticket, choice, index), refused);
    }
    let block = b.core.import_block(ticket, 0, 0).unwrap();
    assert_eq!(b.core.import_block(ticket, 0, 0), Ok(block), "asked for twice");
    b.core.import_filled(ticket, 0, 0).unwrap();
    assert_eq!(b.core.import_filled(ticket, 0, 0), Err(CoreError::NotAwaited { ticket, choice: 0, index: 0 }));
    assert_eq!(b.core.import_block(ticket + 1, 0, 0), Err(CoreError::UnknownTicket { ticket: ticket + 1 }));
    a.core.freeze(handle).unwrap();
    a.turn();
    let last = a.core.export_final(handle).unwrap();
    let refused = b.core.import_commit(ticket, &last, None, 0);
    assert_eq!(refused, Err(CoreError::NotFilled { choice: 0, index: 1 }), "the second block of the prompt is missing");
    assert!(matches!(b.core.import_commit(ticket, &manifest, None, 0), Err(CoreError::Manifest { .. })), "not final");
    b.core.audit();
    assert!(b.core.import_cancel(ticket));
    b.assert_empty();
}

#[test]
fn a_manifest_of_another_request_is_refused_and_the_reservation_stays() {
    let (mut a, handle) = running(small_config(), asked(9, 20));
    let other = a.add(Asked { max_tokens: 19, ..asked(9, 20) }).unwrap();
    let mut b = Engine::new(small_config());
    let (ticket, _) = b.core.reserve(&a.core.export_begin(handle).unwrap(), None, None).unwrap();
    a.core.freeze(other).unwrap();
    a.turn();
    let last = a.core.export_final(other).unwrap();
    assert!(matches!(b.core.import_commit(ticket, &last, None, 0), Err(CoreError::Manifest { .. })));
    assert!(b.core.import_cancel(ticket));
    b.assert_empty();
}

#[test]
fn engines_that_differ_in_what_kv_means_exchange_nothing() {
    let (mut a, handle) = running(small_config(), asked(9, 20));
    let manifest = a.core.export_begin(handle).unwrap();
    let others = [
        (CoreConfig { model_digest: 1, ..small_config() }, "the manifest's model_digest is 0, this engine has 1"),
        (CoreConfig { block_size: 8, ..small_config() }, "the manifest's block_size is 4, this engine has 8"),
        (CoreConfig { vocab_size: 99, ..small_config() }, "the manifest's vocab_size is 100, this engine has 99"),
    ];
    for (config, text) in others {
        let mut b = Engine::new(config);
        assert_eq!(b.core.reserve(&manifest, None, None).unwrap_err().to_string(), text);
    }
    let mut b = Engine::new(CoreConfig { canonical_prefix: vec![1], ..small_config() });
    let text = b.core.reserve(&manifest, None, None).unwrap_err().to_string();
    assert!(text.starts_with("the manifest's canonical_prefix digest is "), "{text}");
}

#[test]
fn a_destination_without_room_refuses_and_the_source_goes_on() {
    let (mut a, handle) = running(small_config(), asked(21, 20));
    let mut small = Engine::new(CoreConfig { num_blocks: 8, ..small_config() });
    assert_eq!(move_now(&mut a, &mut small, handle), Err(CoreError::NeverFits { needed: 10, total: 8 }));
    let (mut b, _) =
        running(CoreConfig { num_blocks: 14, ..small_config() }, Asked { prompt: prompt(30, 50), ..asked(30, 20) });
    let refused = move_now(&mut a, &mut b, handle).unwrap_err();
    assert!(refused.is_capacity() && matches!(refused, CoreError::NoBlocks { .. }), "{refused}");
    let (mut b, _) = running(CoreConfig { max_num_seqs: 1, ..small_config() }, asked(5, 20));
    assert_eq!(move_now(&mut a, &mut b, handle), Err(CoreError::NoRows { needed: 1, free: 0 }));
    a.drain(40);
    b.drain(40);
}

#[test]
fn reservations_count_as_requests_where_the_queue_is_bounded() {
    let config = CoreConfig { max_num_waiting: 1, max_num_seqs: 2, ..small_config() };
    let mut a = Engine::new(small_config());
    let handles: Vec<i32> = (0..3).map(|at| a.add(asked(5 + at, 4)).unwrap()).collect();
    let mut b = Engine::new(config);
    let first = Move::begin(&mut a, &mut b, handles[0], None).unwrap();
    let full = Move::begin(&mut a, &mut b, handles[1], None).err();
    assert!(matches!(full, Some(CoreError::QueueFull { .. })), "{full:?}");
    assert!(matches!(b.add(asked(4, 4)), Err(CoreError::QueueFull { .. })));
    assert!(first.abort(&mut a, &mut b));
    b.add(asked(4, 4)).unwrap();
    a.drain(30);
}

#[test]
fn a_replay_says_what_every_choice_has_and_leaves_somebody_alive() {
    let mut engine = Engine::new(small_config());
    let asked = Asked { n: 2, ..asked(5, 4) };
    let request = asked.request();
    let add = |engine: &mut Engine, outputs: &[Option<&[i32]>]| engine.core.add_with_outputs(&request, outputs, 0);
    assert_eq!(add(&mut engine, &[Some(&[1])]), Err(CoreError::Outputs { count: 1, n: 2 }));
    assert_eq!(add(&mut engine, &[None, None]), Err(CoreError::Outputs { count: 2, n: 2 }));
    let long = Err(CoreError::OutputTooLong { choice: 1, len: 4, max_tokens: 4 });
    assert_eq!(add(&mut engine, &[None, Some(&[1, 2, 3, 4])]), long);
    let outside = add(&mut engine, &[Some(&[100]), None]);
    assert!(matches!(outside, Err(CoreError::OutsideVocabulary { index: 0, token: 100, .. })));
    engine.core.audit();
    assert_eq!(engine.core.stats().num_requests, 0);
}
