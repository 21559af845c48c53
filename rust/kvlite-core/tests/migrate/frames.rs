//! Frames: what is encoded comes back, anything else is a named error and never a panic or a large allocation.

use kvlite_core::sched::frames::{BLOCKS, BlocksFrame, Frame, FrameError, KINDS, MAX_FRAME_LEN, digest, kind};
use kvlite_core::sched::migrate::{Choice, MoveId, MoveResult};
use proptest::collection::vec;
use proptest::prelude::*;

fn id() -> impl Strategy<Value = MoveId> {
    any::<(u64, u32, u32)>().prop_map(|(request, epoch, attempt)| MoveId { request, epoch, attempt })
}

fn choices() -> impl Strategy<Value = Vec<Choice>> {
    let live = vec(any::<i32>(), 0..9).prop_map(|ids| Choice { position: ids.len() as u32, ids: Some(ids) });
    let ended = any::<u32>().prop_map(|position| Choice { position, ids: None });
    vec(prop_oneof![live, ended], 0..4)
}

fn frame() -> impl Strategy<Value = Frame> {
    let engine = 0..i32::MAX;
    let result = (0u8..6).prop_map(|code| MoveResult::from_code(code).expect("six results"));
    prop_oneof![
        (id(), engine.clone(), any::<bool>()).prop_map(|(id, to, replay)| Frame::Move { id, to, replay }),
        (id(), any::<bool>(), vec(any::<u8>(), 0..99)).prop_map(|(id, replay, manifest)| Frame::Prepare {
            id,
            replay,
            manifest
        }),
        (id(), any::<u32>()).prop_map(|(id, hit_blocks)| Frame::Reserved { id, hit_blocks }),
        (id(), ".{0,40}").prop_map(|(id, reason)| Frame::Refused { id, reason }),
        (id(), any::<u32>()).prop_map(|(id, stage)| Frame::Ack { id, stage }),
        (id(), vec(any::<u32>(), 0..5), vec(any::<u8>(), 0..99), choices())
            .prop_map(|(id, stage_blocks, manifest, choices)| Frame::Tail { id, stage_blocks, manifest, choices }),
        id().prop_map(|id| Frame::Abort { id }),
        (id(), engine, any::<(u32, u32)>(), choices()).prop_map(|(id, source, (stages, blocks), choices)| {
            Frame::Claim { id, source, stages, blocks, choices }
        }),
        id().prop_map(|id| Frame::Granted { id }),
        id().prop_map(|id| Frame::Denied { id }),
        id().prop_map(|id| Frame::Reclaim { id }),
        id().prop_map(|id| Frame::Reclaimed { id }),
        any::<(u64, u32)>().prop_map(|(request, epoch)| Frame::Revoked { request, epoch }),
        (id(), result, any::<(u32, u32)>(), ".{0,40}")
            .prop_map(|(id, result, (stages, blocks), reason)| { Frame::Done { id, result, stages, blocks, reason } }),
    ]
}

fn blocks() -> impl Strategy<Value = (BlocksFrame, Vec<u8>)> {
    let keys = vec((0..i32::MAX, 0..i32::MAX), 0..5);
    (id(), any::<(u32, u32, bool)>(), keys, 1usize..40, any::<u8>()).prop_map(|(id, place, keys, block_bytes, fill)| {
        let payload: Vec<u8> = (0..keys.len() * block_bytes).map(|at| (at as u8).wrapping_mul(31) ^ fill).collect();
        let digests = payload.chunks_exact(block_bytes).map(digest).collect();
        let ((stage, part, is_last), block_bytes) = (place, block_bytes as u32);
        (BlocksFrame { id, stage, part, is_last, block_bytes, keys, digests }, payload)
    })
}

/// Both decoders on anything; whatever decodes must encode to the same bytes.
fn check_decoders(bytes: &[u8]) {
    if let Ok(frame) = Frame::decode(bytes) {
        assert_eq!(frame.encode().as_deref(), Ok(bytes));
    }
    if let Ok(frame) = BlocksFrame::decode(bytes) {
        assert_eq!(frame.encode().as_deref(), Ok(bytes));
    }
    let _ = kind(bytes);
}

/// Puts the right length and digest into a frame whose body was changed, so that the parser behind them is reached.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() >= 28 {
        let body_len = (bytes.len() - 28) as u32;
        bytes[8..12].copy_from_slice(&body_len.to_le_bytes());
        let mut checked = bytes[..12].to_vec();
        checked.extend_from_slice(&bytes[28..]);
        bytes[12..28].copy_from_slice(&digest(&checked)[..16]);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_frame_comes_back_as_it_was(frame in frame()) {
        let bytes = frame.encode().expect("a short frame");
        prop_assert_eq!(kind(&bytes), Ok(frame.kind()));
        prop_assert!(BlocksFrame::decode(&bytes).is_err());
        prop_assert_eq!(Frame::decode(&bytes), Ok(frame));
    }

    #[test]
    fn a_flipped_bit_or_a_cut_is_an_error(frame in frame(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let bytes = frame.encode().expect("a short frame");
        let mut flipped = bytes.clone();
        flipped[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(Frame::decode(&flipped).is_err());
        prop_assert!(Frame::decode(&bytes[..at.index(bytes.len())]).is_err());
        let longer = [bytes.as_slice(), &[0]].concat();
        prop_assert!(Frame::decode(&longer).is_err());
    }

    #[test]
    fn a_wrong_body_behind_a_right_digest_never_panics(
        frame in frame(), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = frame.encode().expect("a short frame");
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        check_decoders(&resealed(bytes.clone()));
        bytes.truncate(28 + keep.index(bytes.len() - 27));
        check_decoders(&resealed(bytes));
    }

    #[test]
    fn noise_never_panics(noise in vec(any::<u8>(), 0..200), kind in 0u8..20) {
        check_decoders(&noise);
        let header = [b"KVMV".as_slice(), &[1, 0, kind, 0], &[0; 20]].concat();
        check_decoders(&resealed([header, noise].concat()));
    }

    #[test]
    fn blocks_come_back_and_only_their_own_payload_passes((frame, payload) in blocks(), at in any::<prop::sample::Index>()) {
        let bytes = frame.encode().expect("few keys");
        prop_assert_eq!(kind(&bytes), Ok(BLOCKS));
        prop_assert_eq!(Frame::decode(&bytes), Err(FrameError::Kind { kind: BLOCKS }));
        prop_assert_eq!(BlocksFrame::decode(&bytes), Ok(frame.clone()));
        prop_assert!(frame.verify(&payload));
        prop_assert!(!frame.verify(&[payload.as_slice(), &[0]].concat()));
        if !payload.is_empty() {
            let mut flipped = payload.clone();
            flipped[at.index(payload.len())] ^= 1;
            prop_assert!(!frame.verify(&flipped));
            prop_assert!(!frame.verify(&payload[1..]));
        }
        let mut changed = bytes;
        let at = 28 + at.index(changed.len() - 28);
        changed[at] ^= 0x80;
        check_decoders(&resealed(changed));
    }
}

#[test]
fn a_frame_of_another_version_or_magic_is_named() {
    let bytes = Frame::Granted { id: MoveId { request: 1, epoch: 2, attempt: 3 } }.encode().expect("a short frame");
    let with = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        Frame::decode(&resealed(bytes))
    };
    assert_eq!(with(4, 2), Err(FrameError::Version { version: 2 }));
    assert_eq!(with(0, b'X'), Err(FrameError::Magic { magic: *b"XVMV" }));
    assert_eq!(with(6, 15), Err(FrameError::Kind { kind: 15 }));
    assert_eq!(Frame::decode(&[]), Err(FrameError::Length { len: 0 }));
}

#[test]
fn a_count_that_the_frame_cannot_hold_is_refused_before_anything_is_allocated() {
    let id = MoveId { request: 1, epoch: 0, attempt: 1 };
    let choices = vec![Choice { position: 1, ids: Some(vec![7]) }];
    let frame = Frame::Claim { id, source: 0, stages: 1, blocks: 1, choices };
    let mut bytes = frame.encode().expect("a short frame");
    let ids_at = bytes.len() - 8;
    bytes[ids_at..ids_at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Frame::decode(&resealed(bytes)), Err(FrameError::Value { .. } | FrameError::Cut { .. })));
}

#[test]
fn what_is_longer_than_a_frame_may_be_is_not_encoded() {
    let id = MoveId { request: 1, epoch: 0, attempt: 1 };
    let frame = Frame::Prepare { id, replay: false, manifest: vec![0; MAX_FRAME_LEN] };
    assert!(matches!(frame.encode(), Err(FrameError::Length { .. })));
    let choices = vec![Choice { position: 0, ids: None }; 2_000];
    let frame = Frame::Claim { id, source: 0, stages: 0, blocks: 0, choices };
    assert!(matches!(frame.encode(), Err(FrameError::Value { what: "choices", .. })));
    let refused = Frame::Refused { id, reason: "ü".repeat(300) };
    let Ok(Frame::Refused { reason, .. }) = Frame::decode(&refused.encode().expect("its reason is cut")) else {
        panic!("a refusal comes back as one");
    };
    assert_eq!(reason, "ü".repeat(256));
}

#[test]
fn every_kind_has_a_name() {
    assert_eq!(KINDS[BLOCKS as usize], "blocks");
    let id = MoveId { request: 0, epoch: 0, attempt: 0 };
    assert_eq!(KINDS[Frame::Reclaimed { id }.kind() as usize], "reclaimed");
    assert_eq!(KINDS[Frame::Revoked { request: 0, epoch: 0 }.kind() as usize], "revoked");
}
