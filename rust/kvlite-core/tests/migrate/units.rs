//! Small cases that a reader can follow: who is refused and why, what waits for bytes, what comes twice.

use kvlite_core::sched::frames::{BlocksFrame, Frame};
use kvlite_core::sched::migrate::{
    Choice, Effect, Limits, MoveId, MoveResult, Mover, NOBODY, OWNER, OrderError, Owner, OwnerEffect,
};

const ID: MoveId = MoveId { request: 7, epoch: 0, attempt: 1 };

fn limits() -> Limits {
    Limits {
        max_moves: 2,
        max_inflight_bytes: 100,
        block_bytes: 10,
        max_stages: 3,
        reserve_ms: 50,
        ack_ms: 20,
        freeze_ms: 30,
        claim_ms: 10,
    }
}

fn choice(ids: &[i32]) -> Choice {
    Choice { position: ids.len() as u32, ids: Some(ids.to_vec()) }
}

fn sent(effects: &[Effect]) -> Vec<&'static str> {
    let frame = |effect: &Effect| match effect {
        Effect::Send { frame, .. } => Some(kvlite_core::sched::frames::KINDS[frame.kind() as usize]),
        _ => None,
    };
    effects.iter().filter_map(frame).collect()
}

/// A source that has its reservation and is asked for stage 0.
fn staging(mover: &mut Mover, id: MoveId) -> Vec<Effect> {
    mover.order(id, 1, false);
    mover.exported(id.request, id.attempt, Some(vec![1]), 1, 0);
    mover.frame(1, Frame::Reserved { id, hit_blocks: 3 }, 0).expect("the destination may answer")
}

fn tailed(mover: &mut Mover) -> Vec<Effect> {
    staging(mover, ID);
    mover.staged(7, 1, 0, 0, 0, 0);
    mover.frozen(7, 1);
    mover.staged(7, 1, 1, 1, 0, 0);
    mover.tail(7, 1, vec![2], vec![choice(&[5])], 0)
}

#[test]
fn a_move_asks_for_stages_until_little_is_left_and_freezes_then() {
    let mut mover = Mover::new(0, limits());
    let first = staging(&mut mover, ID);
    assert_eq!(first, [Effect::Stage { id: ID, to: 1, stage: 0, skip_blocks: 3, last: false }]);
    assert_eq!(mover.staged(7, 1, 0, 40, 5, 0), []);
    let second = mover.frame(1, Frame::Ack { id: ID, stage: 0 }, 0).expect("an answer");
    assert_eq!(second, [Effect::Stage { id: ID, to: 1, stage: 1, skip_blocks: 3, last: false }]);
    mover.staged(7, 1, 1, 5, 1, 0);
    let third = mover.frame(1, Frame::Ack { id: ID, stage: 1 }, 0).expect("an answer");
    assert_eq!(third, [Effect::Freeze { id: ID }], "one block of one choice is left");
    assert_eq!(mover.frozen(7, 1), [Effect::Stage { id: ID, to: 1, stage: 2, skip_blocks: 3, last: true }]);
    assert_eq!(mover.staged(7, 1, 2, 1, 0, 0), [Effect::Tail { id: ID }]);
    assert_eq!(sent(&mover.tail(7, 1, vec![2], vec![choice(&[5])], 0)), ["tail"]);
}

#[test]
fn stages_end_when_decoding_outruns_them_or_there_were_enough() {
    for (stages, expected) in [(&[(40, 39), (39, 41)][..], 2), (&[(40, 30), (30, 20), (20, 10)][..], 3)] {
        let mut mover = Mover::new(0, limits());
        staging(&mut mover, ID);
        for (stage, &(blocks, left)) in stages.iter().enumerate() {
            mover.staged(7, 1, stage as u32, blocks, left, 0);
            let effects = mover.frame(1, Frame::Ack { id: ID, stage: stage as u32 }, 0).expect("an answer");
            let froze = effects == [Effect::Freeze { id: ID }];
            assert_eq!(froze, stage + 1 == expected, "after stage {stage}: {effects:?}");
        }
    }
}

#[test]
fn an_acknowledgement_that_overtakes_the_drivers_word_counts() {
    let mut mover = Mover::new(0, limits());
    staging(&mut mover, ID);
    assert_eq!(mover.frame(1, Frame::Ack { id: ID, stage: 0 }, 0), Ok(vec![]));
    assert_eq!(mover.staged(7, 1, 0, 4, 0, 0), [Effect::Freeze { id: ID }]);
}

#[test]
fn a_stage_waits_until_the_bytes_of_others_have_arrived() {
    let mut mover = Mover::new(0, limits());
    let other = MoveId { request: 8, ..ID };
    staging(&mut mover, ID);
    assert_eq!(staging(&mut mover, other), [], "one stage is being sent");
    assert_eq!(mover.staged(7, 1, 0, 10, 5, 0), [], "100 bytes are in flight");
    let effects = mover.frame(1, Frame::Ack { id: ID, stage: 0 }, 0).expect("an answer");
    assert_eq!(effects, [Effect::Stage { id: ID, to: 1, stage: 1, skip_blocks: 3, last: false }]);
    let effects = mover.staged(7, 1, 1, 9, 4, 0);
    assert_eq!(effects, [Effect::Stage { id: other, to: 1, stage: 0, skip_blocks: 3, last: false }]);
}

#[test]
fn orders_to_itself_of_a_moving_request_or_beyond_the_limit_are_refused() {
    let mut mover = Mover::new(0, limits());
    let refused = |effects: &[Effect]| {
        matches!(effects.last(), Some(Effect::Done { result: MoveResult::Refused, .. })) && sent(effects) == ["done"]
    };
    assert!(refused(&mover.order(ID, 0, false)));
    assert_eq!(mover.order(MoveId { attempt: 2, ..ID }, 1, false).len(), 1);
    assert!(refused(&mover.order(MoveId { attempt: 3, ..ID }, 2, false)));
    mover.order(MoveId { request: 8, ..ID }, 1, false);
    assert!(refused(&mover.order(MoveId { request: 9, ..ID }, 1, false)));
    assert_eq!(mover.order(MoveId { attempt: 2, ..ID }, 1, false), [], "an order that comes twice begins nothing");
}

#[test]
fn before_the_tail_a_source_gives_up_by_itself_and_afterwards_it_asks() {
    let mut mover = Mover::new(0, limits());
    staging(&mut mover, ID);
    mover.staged(7, 1, 0, 4, 0, 0);
    assert_eq!(mover.next_wake_ms(), Some(20));
    let effects = mover.tick(20);
    assert_eq!(sent(&effects), ["abort", "done"]);
    assert!(effects.contains(&Effect::Thaw { request: 7, attempt: 1, epoch: 0 }));
    assert_eq!((mover.moves(), mover.next_wake_ms()), (vec![], None));

    let mut mover = Mover::new(0, limits());
    tailed(&mut mover);
    assert_eq!(sent(&mover.tick(30)), ["reclaim"]);
    assert_eq!(sent(&mover.tick(40)), ["reclaim"], "until somebody answers");
    let effects = mover.frame(OWNER, Frame::Reclaimed { id: ID }, 41).expect("the owner's word");
    assert!(effects.contains(&Effect::Thaw { request: 7, attempt: 1, epoch: 1 }), "under the next epoch: {effects:?}");
}

#[test]
fn a_destination_claims_when_the_tail_and_every_block_that_it_names_are_there() {
    let mut mover = Mover::new(1, limits());
    let prepare = Frame::Prepare { id: ID, replay: false, manifest: vec![9] };
    assert!(matches!(mover.frame(0, prepare, 0).as_deref(), Ok([Effect::Reserve { source: 0, ttl_ms: 50, .. }])));
    assert_eq!(sent(&mover.reserved(7, 1, 0, 0)), ["reserved"]);
    let part = |stage, part, is_last, num: i32| BlocksFrame {
        id: ID,
        stage,
        part,
        is_last,
        block_bytes: 10,
        keys: (0..num).map(|index| (0, index)).collect(),
        digests: Vec::new(),
    };
    assert_eq!(mover.blocks(0, &part(0, 1, true, 2), true, 0), [], "a part is missing");
    assert_eq!(sent(&mover.blocks(0, &part(0, 0, false, 2), true, 0)), ["ack"]);
    let tail = Frame::Tail { id: ID, stage_blocks: vec![4, 0, 1], manifest: vec![3], choices: vec![choice(&[1, 2])] };
    assert_eq!(mover.frame(0, tail, 0), Ok(vec![]), "the last stage is missing");
    assert_eq!(sent(&mover.blocks(0, &part(2, 0, true, 1), true, 0)), ["ack", "claim"]);
    assert_eq!(mover.link_down(0, 0), [], "a claim is the owner's to decide");
    assert_eq!(sent(&mover.tick(10)), ["claim"]);
    let effects = mover.frame(OWNER, Frame::Granted { id: ID }, 11).expect("the owner's word");
    assert_eq!(effects, [Effect::Commit { id: ID, epoch: 1, manifest: vec![3], replay: false }]);
    assert_eq!(mover.frame(OWNER, Frame::Granted { id: ID }, 12), Ok(vec![]), "a grant that comes twice");
    let prepare = Frame::Prepare { id: ID, replay: false, manifest: vec![9] };
    assert_eq!(mover.frame(0, prepare, 13), Ok(vec![]), "a PREPARE that comes late");
}

#[test]
fn a_frame_from_who_may_not_send_it_changes_nothing() {
    let mut mover = Mover::new(0, limits());
    tailed(&mut mover);
    let before = mover.clone();
    assert!(mover.frame(1, Frame::Reclaimed { id: ID }, 0).is_err(), "only the owner gives back");
    assert!(mover.frame(1, Frame::Revoked { request: 7, epoch: 9 }, 0).is_err());
    assert!(mover.frame(OWNER, Frame::Ack { id: ID, stage: 0 }, 0).is_err());
    assert!(mover.frame(OWNER, Frame::Reclaim { id: ID }, 0).is_err());
    assert_eq!(mover.frame(2, Frame::Refused { id: ID, reason: String::new() }, 0), Ok(vec![]), "not its destination");
    assert_eq!(mover, before);
}

/// An owner whose request 7 is on engine 0 and ordered to engine 1.
fn ordered(num_choices: usize, wants_logprobs: bool) -> Owner {
    let mut owner = Owner::default();
    owner.add(7, 0, num_choices, wants_logprobs).expect("new");
    owner.order(7, 1, false, 0).expect("it can move");
    owner
}

fn claim(choices: Vec<Choice>) -> Frame {
    Frame::Claim { id: ID, source: 0, stages: 2, blocks: 3, choices }
}

#[test]
fn a_claim_delivers_what_is_still_in_flight_and_switches() {
    let mut owner = ordered(1, false);
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 1), Ok((0, 1)));
    let effects = owner.frame(1, claim(vec![choice(&[11, 12, 13])])).expect("a claim");
    let (stages, blocks, reason) = (2, 3, String::new());
    let expected = [
        OwnerEffect::Deliver { request: 7, choice: 0, position: 1, ids: vec![12, 13] },
        OwnerEffect::Send { engine: 1, frame: Frame::Granted { id: ID } },
        OwnerEffect::Send { engine: 0, frame: Frame::Revoked { request: 7, epoch: 0 } },
        OwnerEffect::Switch { request: 7, engine: 1, epoch: 1 },
        OwnerEffect::Moved { request: 7, result: MoveResult::Moved, to: 1, stages, blocks, reason },
    ];
    assert_eq!(effects, expected);
    assert_eq!(owner.tokens(7, 0, 0, 0, 1, 2), Ok((0, 0)), "late tokens of the old owner");
    assert_eq!(owner.fence(7, 0, 0).len(), 1, "who is told so");
    assert_eq!(owner.tokens(7, 1, 1, 0, 3, 1), Ok((0, 1)));
    let again = owner.frame(1, claim(vec![choice(&[11, 12, 13])])).expect("a claim");
    assert_eq!(again, [OwnerEffect::Send { engine: 1, frame: Frame::Granted { id: ID } }]);
}

#[test]
fn a_claim_waits_for_tokens_with_log_probabilities_and_is_denied_when_they_are_lost() {
    let mut owner = ordered(1, true);
    assert_eq!(owner.frame(1, claim(vec![choice(&[11, 12])])), Ok(vec![]));
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 2), Ok((0, 2)));
    assert!(matches!(owner.due()[..], [OwnerEffect::Send { engine: 1, frame: Frame::Granted { .. } }, ..]));

    let mut owner = ordered(1, true);
    owner.frame(1, claim(vec![choice(&[11, 12])])).expect("a claim");
    let denied = OwnerEffect::Send { engine: 1, frame: Frame::Denied { id: ID } };
    assert_eq!(owner.engine_down(0), [denied, OwnerEffect::Replay { request: 7, preferred: 1 }]);
    assert_eq!(owner.replay(7, 1), Ok(1));
}

#[test]
fn a_claim_waits_for_the_end_of_a_choice_and_the_last_end_denies_it() {
    let mut owner = ordered(2, false);
    let ended = Choice { position: 1, ids: None };
    assert_eq!(owner.frame(1, claim(vec![ended, choice(&[5])])), Ok(vec![]));
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 1), Ok((0, 1)));
    assert_eq!(owner.due(), []);
    let mut other = owner.clone();
    assert!(owner.finish(7, 0, 0, 0));
    assert!(matches!(owner.due()[..], [OwnerEffect::Deliver { choice: 1, .. }, ..]));

    assert!(other.finish(7, 0, 0, 1), "the stream's owner cuts the other choice first");
    assert_eq!(other.due(), []);
    assert!(other.finish(7, 0, 0, 0));
    assert_eq!(other.due(), [OwnerEffect::Send { engine: 1, frame: Frame::Denied { id: ID } }]);
}

#[test]
fn after_a_reclaim_older_claims_are_denied_and_tokens_of_either_epoch_count() {
    let mut owner = ordered(1, false);
    let effects = owner.frame(0, Frame::Reclaim { id: ID }).expect("the source may ask");
    assert_eq!(effects[0], OwnerEffect::Send { engine: 0, frame: Frame::Reclaimed { id: ID } });
    assert_eq!(owner.owner(7), Some((0, 1)));
    assert_eq!(owner.frame(0, Frame::Reclaim { id: ID }), Ok(vec![effects[0].clone()]), "asked twice");
    let denied = OwnerEffect::Send { engine: 1, frame: Frame::Denied { id: ID } };
    assert_eq!(owner.frame(1, claim(vec![choice(&[1])])), Ok(vec![denied]));
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 1), Ok((0, 1)), "sent before the reclaim, received after it");
    assert_eq!(owner.tokens(7, 0, 1, 0, 1, 1), Ok((0, 1)));
    assert_eq!(owner.tokens(7, 1, 1, 0, 2, 1), Ok((0, 0)), "the destination never owned it");
}

#[test]
fn a_claim_that_nobody_ordered_or_that_loses_tokens_is_denied() {
    let denied = |owner: &mut Owner, engine, frame| {
        matches!(owner.frame(engine, frame).as_deref(), Ok([OwnerEffect::Send { frame: Frame::Denied { .. }, .. }]))
    };
    let mut owner = ordered(1, false);
    owner.tokens(7, 0, 0, 0, 0, 2).expect("two tokens");
    assert!(denied(&mut owner, 1, claim(vec![choice(&[1])])), "two were delivered");
    assert!(denied(&mut owner, 2, claim(vec![choice(&[1, 2])])), "engine 2 has no order");
    assert!(denied(&mut owner, 1, claim(vec![choice(&[1, 2]), choice(&[])])), "it has one choice");
    let frame = Frame::Claim { id: ID, source: 2, stages: 0, blocks: 0, choices: vec![choice(&[1, 2])] };
    assert!(denied(&mut owner, 1, frame), "engine 2 does not own it");
    for id in [MoveId { attempt: 2, ..ID }, MoveId { epoch: 1, ..ID }] {
        let choices = vec![choice(&[1, 2])];
        assert!(denied(&mut owner, 1, Frame::Claim { id, source: 0, stages: 0, blocks: 0, choices }));
    }
    owner.remove(7);
    assert!(denied(&mut owner, 1, claim(vec![choice(&[1, 2])])), "it has ended");
}

#[test]
fn when_the_source_dies_a_late_claim_still_completes_until_the_replay() {
    let mut owner = ordered(1, false);
    assert_eq!(owner.engine_down(0), [OwnerEffect::Replay { request: 7, preferred: 1 }]);
    assert_eq!(owner.owner(7), Some((NOBODY, 0)));
    let mut late = owner.clone();
    let effects = late.frame(1, claim(vec![choice(&[3])])).expect("a claim");
    assert!(effects.contains(&OwnerEffect::Switch { request: 7, engine: 1, epoch: 1 }));
    assert_eq!(late.replay(7, 0), Err(OrderError::Owned { request: 7, engine: 1 }));

    assert_eq!(owner.replay(7, 2), Ok(1));
    assert!(matches!(owner.due()[..], [OwnerEffect::Moved { result: MoveResult::Failed, .. }]));
    let denied = OwnerEffect::Send { engine: 1, frame: Frame::Denied { id: ID } };
    assert_eq!(owner.frame(1, claim(vec![choice(&[3])])), Ok(vec![denied]));
}

#[test]
fn a_reclaim_of_an_epoch_long_gone_takes_nothing_back() {
    let mut owner = ordered(1, false);
    owner.frame(1, claim(vec![choice(&[])])).expect("a claim");
    owner.order(7, 0, false, 0).expect("back again");
    let id = MoveId { request: 7, epoch: 1, attempt: 2 };
    let frame = Frame::Claim { id, source: 1, stages: 0, blocks: 0, choices: vec![choice(&[])] };
    owner.frame(0, frame).expect("a claim");
    assert_eq!(owner.owner(7), Some((0, 2)));
    let revoked = OwnerEffect::Send { engine: 0, frame: Frame::Revoked { request: 7, epoch: 0 } };
    assert_eq!(owner.frame(0, Frame::Reclaim { id: ID }), Ok(vec![revoked]));
    assert_eq!(owner.owner(7), Some((0, 2)));
    let mut mover = Mover::new(0, limits());
    mover.order(MoveId { request: 7, epoch: 2, attempt: 3 }, 1, false);
    assert_eq!(mover.frame(OWNER, Frame::Revoked { request: 7, epoch: 0 }, 0), Ok(vec![]), "it has epoch 2 now");
    assert_eq!(mover.moves().len(), 1);
}

#[test]
fn wrong_orders_are_refused_by_name() {
    let mut owner = ordered(1, false);
    assert_eq!(owner.order(7, 2, false, 0), Err(OrderError::Moving { request: 7, to: 1 }));
    assert_eq!(owner.order(7, 0, false, 0), Err(OrderError::Itself { request: 7, engine: 0 }));
    assert_eq!(owner.order(8, 0, false, 0), Err(OrderError::Unknown { request: 8 }));
    assert_eq!(owner.order(7, -1, false, 0), Err(OrderError::Engine { engine: -1 }));
    assert_eq!(owner.add(7, 0, 1, false), Err(OrderError::Exists { request: 7 }));
    assert_eq!(owner.add(9, 0, 0, false), Err(OrderError::NoChoices));
    assert_eq!(owner.replay(7, 2), Err(OrderError::Owned { request: 7, engine: 0 }));
    owner.engine_down(0);
    assert_eq!(owner.order(7, 1, false, 0), Err(OrderError::NoEngine { request: 7 }));
    assert!(owner.tokens(7, 0, 0, 9, 0, 1).is_ok(), "nobody owns it: stale before it is wrong");
}

#[test]
fn an_order_that_nobody_answers_may_be_given_again_after_a_minute() {
    let mut owner = ordered(1, false);
    let effects = owner.order(7, 2, false, 60_000).expect("a minute is over");
    assert!(matches!(effects[0], OwnerEffect::Moved { result: MoveResult::Failed, to: 1, .. }), "{effects:?}");
    let id = MoveId { attempt: 2, ..ID };
    let frame = Frame::Move { id, to: 2, replay: false };
    assert_eq!(effects[1..], [OwnerEffect::Send { engine: 0, frame }]);
}

#[test]
fn tokens_that_leave_a_gap_or_name_no_choice_are_errors() {
    let mut owner = ordered(1, false);
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 3), Ok((0, 3)));
    assert_eq!(owner.tokens(7, 0, 0, 0, 1, 4), Ok((2, 2)), "two of four are new");
    assert_eq!(owner.tokens(7, 0, 0, 0, 0, 5), Ok((0, 0)));
    assert!(owner.tokens(7, 0, 0, 0, 6, 1).is_err());
    assert!(owner.tokens(7, 0, 0, 1, 0, 1).is_err());
    assert_eq!(owner.positions(7), Some(&[5][..]));
}
