//! The frames of a migration as bytes: magic, version, kind, length, digest, body; parsed in safe Rust.
//!
//! Owns the format and its limits, knows no machine. A frame that decodes encodes to the same bytes again; everything else
//! is a `FrameError` that names what is wrong. The digest finds flipped bits; who sent a frame is the link's to prove.
//! Called by the binding, which hands `Frame`s to `migrate`.
//!
//! `"KVMV" | version u16 | kind u8 | 0 u8 | body_len u32 | digest [16] of header and body | body`, little-endian.

mod blocks;
mod error;
mod wire;

pub use blocks::{BlocksFrame, DIGEST_LEN, digest};
pub use error::FrameError;
use wire::{Reader, Writer};

use super::migrate::{Choice, MoveId, MoveResult};

const MAGIC: [u8; 4] = *b"KVMV";
/// Raised with every change of the format; engines of different versions do not move requests.
const VERSION: u16 = 1;
const HEADER_LEN: usize = 28;
const CHECKED_LEN: usize = 12;
/// Longest frame: a manifest with a prompt and an output of a million tokens each fits.
pub const MAX_FRAME_LEN: usize = 16 << 20;
/// Choices of a request, far above what a core admits.
const MAX_CHOICES: u32 = 1024;
const MAX_STAGES: u32 = 1024;
const MAX_REASON_LEN: u32 = 512;
const MAX_BODY_LEN: u32 = (MAX_FRAME_LEN - HEADER_LEN) as u32;

/// Names of the kinds; a kind's number is its place.
pub const KINDS: [&str; 15] = [
    "move",
    "prepare",
    "reserved",
    "refused",
    "blocks",
    "ack",
    "tail",
    "abort",
    "claim",
    "granted",
    "denied",
    "reclaim",
    "reclaimed",
    "revoked",
    "done",
];
/// The one kind that is no `Frame`.
pub const BLOCKS: u8 = 4;

/// Everything that machines say to each other; `BlocksFrame` goes beside them, with its payload.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the line of a variant says what its fields are")]
pub enum Frame {
    /// Owner to source: move a request.
    Move { id: MoveId, to: i32, replay: bool },
    /// Source to destination: make room. The manifest is the engines' business.
    Prepare { id: MoveId, replay: bool, manifest: Vec<u8> },
    /// Destination to source: room is made; leading prompt blocks that need not be sent.
    Reserved { id: MoveId, hit_blocks: u32 },
    /// Destination to source: no, or no longer.
    Refused { id: MoveId, reason: String },
    /// Destination to source: the blocks of a stage are stored and match their digests.
    Ack { id: MoveId, stage: u32 },
    /// Source to destination: frozen; blocks sent per stage, the final manifest, and where each choice stands.
    Tail { id: MoveId, stage_blocks: Vec<u32>, manifest: Vec<u8>, choices: Vec<Choice> },
    /// Source to destination: forget it.
    Abort { id: MoveId },
    /// Destination to owner: everything is here, make me the owner.
    Claim { id: MoveId, source: i32, stages: u32, blocks: u32, choices: Vec<Choice> },
    /// Owner to destination: you own it, under the epoch after `id`'s.
    Granted { id: MoveId },
    /// Owner to destination: you do not.
    Denied { id: MoveId },
    /// Source to owner: frozen for too long, give it back.
    Reclaim { id: MoveId },
    /// Owner to source: it is yours, under the epoch after `id`'s.
    Reclaimed { id: MoveId },
    /// Owner to an engine: whatever you have of this request under this epoch or an older one is void.
    Revoked { request: u64, epoch: u32 },
    /// Source to owner: how a move ended that no claim has ended.
    Done { id: MoveId, result: MoveResult, stages: u32, blocks: u32, reason: String },
}

impl Frame {
    /// Index of `KINDS`.
    pub fn kind(&self) -> u8 {
        match self {
            Frame::Move { .. } => 0,
            Frame::Prepare { .. } => 1,
            Frame::Reserved { .. } => 2,
            Frame::Refused { .. } => 3,
            Frame::Ack { .. } => 5,
            Frame::Tail { .. } => 6,
            Frame::Abort { .. } => 7,
            Frame::Claim { .. } => 8,
            Frame::Granted { .. } => 9,
            Frame::Denied { .. } => 10,
            Frame::Reclaim { .. } => 11,
            Frame::Reclaimed { .. } => 12,
            Frame::Revoked { .. } => 13,
            Frame::Done { .. } => 14,
        }
    }

    /// The frame as bytes. Errors when it is longer than `MAX_FRAME_LEN` or a list longer than the format allows.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let mut to = begin(self.kind());
        match self {
            Frame::Move { id, to: engine, replay } => {
                put_id(&mut to, id);
                to.i32(*engine);
                to.byte(u8::from(*replay));
            }
            Frame::Prepare { id, replay, manifest } => {
                put_id(&mut to, id);
                to.byte(u8::from(*replay));
                to.bytes(manifest);
            }
            Frame::Reserved { id, hit_blocks: number } | Frame::Ack { id, stage: number } => {
                put_id(&mut to, id);
                to.u32(*number);
            }
            Frame::Refused { id, reason } => {
                put_id(&mut to, id);
                put_reason(&mut to, reason);
            }
            Frame::Tail { id, stage_blocks, manifest, choices } => {
                put_id(&mut to, id);
                at_most("stages", stage_blocks.len(), MAX_STAGES)?;
                to.count(stage_blocks.len());
                stage_blocks.iter().for_each(|&blocks| to.u32(blocks));
                to.bytes(manifest);
                put_choices(&mut to, choices)?;
            }
            Frame::Claim { id, source, stages, blocks, choices } => {
                put_id(&mut to, id);
                to.i32(*source);
                to.u32(*stages);
                to.u32(*blocks);
                put_choices(&mut to, choices)?;
            }
            Frame::Abort { id }
            | Frame::Granted { id }
            | Frame::Denied { id }
            | Frame::Reclaim { id }
            | Frame::Reclaimed { id } => put_id(&mut to, id),
            Frame::Revoked { request, epoch } => {
                to.u64(*request);
                to.u32(*epoch);
            }
            Frame::Done { id, result, stages, blocks, reason } => {
                put_id(&mut to, id);
                to.byte(*result as u8);
                to.u32(*stages);
                to.u32(*blocks);
                put_reason(&mut to, reason);
            }
        }
        seal(to)
    }

    /// Parses a frame; BLOCKS is refused, see `BlocksFrame`.
    pub fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
        let (kind, body) = open(bytes)?;
        let mut from = Reader::new(body);
        let frame = Frame::decode_body(kind, &mut from)?;
        from.finish()?;
        Ok(frame)
    }

    fn decode_body(kind: u8, from: &mut Reader<'_>) -> Result<Frame, FrameError> {
        if kind == 13 {
            return Ok(Frame::Revoked { request: from.u64("request")?, epoch: from.u32("epoch")? });
        }
        if kind == BLOCKS || kind as usize >= KINDS.len() {
            return Err(FrameError::Kind { kind });
        }
        let id = take_id(from)?;
        Ok(match kind {
            0 => Frame::Move { id, to: take_engine(from, "destination")?, replay: from.flag("replay")? },
            1 => Frame::Prepare { id, replay: from.flag("replay")?, manifest: take_manifest(from)? },
            2 => Frame::Reserved { id, hit_blocks: from.u32("hit_blocks")? },
            3 => Frame::Refused { id, reason: take_reason(from)? },
            5 => Frame::Ack { id, stage: from.u32("stage")? },
            6 => {
                let count = from.count(MAX_STAGES, 4, "stages")?;
                let stage_blocks = (0..count).map(|_| from.u32("stage_blocks")).collect::<Result<_, _>>()?;
                Frame::Tail { id, stage_blocks, manifest: take_manifest(from)?, choices: take_choices(from)? }
            }
            7 => Frame::Abort { id },
            8 => Frame::Claim {
                id,
                source: take_engine(from, "source")?,
                stages: from.u32("stages")?,
                blocks: from.u32("blocks")?,
                choices: take_choices(from)?,
            },
            9 => Frame::Granted { id },
            10 => Frame::Denied { id },
            11 => Frame::Reclaim { id },
            12 => Frame::Reclaimed { id },
            _ => Frame::Done {
                id,
                result: take_result(from)?,
                stages: from.u32("stages")?,
                blocks: from.u32("blocks")?,
                reason: take_reason(from)?,
            },
        })
    }
}

/// The kind in a header whose magic, version and length are right; the digest is not looked at.
pub fn kind(bytes: &[u8]) -> Result<u8, FrameError> {
    let (kind, _) = split(bytes)?;
    if (kind as usize) < KINDS.len() { Ok(kind) } else { Err(FrameError::Kind { kind }) }
}

fn begin(kind: u8) -> Writer {
    let mut to = Writer::default();
    to.bytes.extend_from_slice(&MAGIC);
    to.bytes.extend_from_slice(&VERSION.to_le_bytes());
    to.bytes.extend_from_slice(&[kind, 0]);
    to.bytes.resize(HEADER_LEN, 0);
    to
}

fn seal(to: Writer) -> Result<Vec<u8>, FrameError> {
    let mut bytes = to.bytes;
    if bytes.len() > MAX_FRAME_LEN {
        return Err(FrameError::Length { len: bytes.len() });
    }
    let body_len = (bytes.len() - HEADER_LEN) as u32;
    bytes[8..CHECKED_LEN].copy_from_slice(&body_len.to_le_bytes());
    let digest = frame_digest(&bytes);
    bytes[CHECKED_LEN..HEADER_LEN].copy_from_slice(&digest);
    Ok(bytes)
}

fn frame_digest(bytes: &[u8]) -> [u8; HEADER_LEN - CHECKED_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..CHECKED_LEN]).update(&bytes[HEADER_LEN..]);
    let mut digest = [0; HEADER_LEN - CHECKED_LEN];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..HEADER_LEN - CHECKED_LEN]);
    digest
}

fn split(bytes: &[u8]) -> Result<(u8, &[u8]), FrameError> {
    if bytes.len() < HEADER_LEN || bytes.len() > MAX_FRAME_LEN {
        return Err(FrameError::Length { len: bytes.len() });
    }
    let mut from = Reader::new(&bytes[..CHECKED_LEN]);
    let magic = from.take(4, "magic")?;
    if magic != MAGIC {
        return Err(FrameError::Magic { magic: [magic[0], magic[1], magic[2], magic[3]] });
    }
    let version = u16::from_le_bytes([from.byte("version")?, from.byte("version")?]);
    if version != VERSION {
        return Err(FrameError::Version { version });
    }
    let kind = from.byte("kind")?;
    let zero = from.byte("reserved byte")?;
    if zero != 0 {
        return Err(FrameError::Value { what: "reserved byte", value: zero.into() });
    }
    let (said, body) = (from.u32("length")?, &bytes[HEADER_LEN..]);
    if said as usize != body.len() {
        return Err(FrameError::BodyLength { said, len: body.len() });
    }
    Ok((kind, body))
}

fn open(bytes: &[u8]) -> Result<(u8, &[u8]), FrameError> {
    let opened = split(bytes)?;
    if frame_digest(bytes) != bytes[CHECKED_LEN..HEADER_LEN] {
        return Err(FrameError::Digest);
    }
    Ok(opened)
}

fn at_most(what: &'static str, len: usize, max: u32) -> Result<(), FrameError> {
    if len > max as usize { Err(FrameError::Value { what, value: len as i64 }) } else { Ok(()) }
}

fn put_id(to: &mut Writer, id: &MoveId) {
    to.u64(id.request);
    to.u32(id.epoch);
    to.u32(id.attempt);
}

fn take_id(from: &mut Reader<'_>) -> Result<MoveId, FrameError> {
    Ok(MoveId { request: from.u64("request")?, epoch: from.u32("epoch")?, attempt: from.u32("attempt")? })
}

fn take_engine(from: &mut Reader<'_>, what: &'static str) -> Result<i32, FrameError> {
    let engine = from.i32(what)?;
    if engine < 0 { Err(FrameError::Value { what, value: engine.into() }) } else { Ok(engine) }
}

fn take_manifest(from: &mut Reader<'_>) -> Result<Vec<u8>, FrameError> {
    Ok(from.bytes(MAX_BODY_LEN, "manifest")?.to_vec())
}

/// Reasons are for logs; a long one is cut at a character.
fn put_reason(to: &mut Writer, reason: &str) {
    let mut len = reason.len().min(MAX_REASON_LEN as usize);
    while !reason.is_char_boundary(len) {
        len -= 1;
    }
    to.bytes(&reason.as_bytes()[..len]);
}

fn take_reason(from: &mut Reader<'_>) -> Result<String, FrameError> {
    let bytes = from.bytes(MAX_REASON_LEN, "reason")?;
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FrameError::Text)
}

fn take_result(from: &mut Reader<'_>) -> Result<MoveResult, FrameError> {
    let code = from.byte("result")?;
    MoveResult::from_code(code).ok_or(FrameError::Value { what: "result", value: code.into() })
}

fn put_choices(to: &mut Writer, choices: &[Choice]) -> Result<(), FrameError> {
    at_most("choices", choices.len(), MAX_CHOICES)?;
    to.count(choices.len());
    for choice in choices {
        to.u32(choice.position);
        to.byte(u8::from(choice.ids.is_some()));
        if let Some(ids) = &choice.ids {
            to.count(ids.len());
            ids.iter().for_each(|&id| to.i32(id));
        }
    }
    Ok(())
}

fn take_choices(from: &mut Reader<'_>) -> Result<Vec<Choice>, FrameError> {
    let count = from.count(MAX_CHOICES, 5, "choices")?;
    let choice = |from: &mut Reader<'_>| {
        let position = from.u32("position")?;
        if !from.flag("whether a choice lives")? {
            return Ok(Choice { position, ids: None });
        }
        let count = from.count(MAX_BODY_LEN, 4, "ids")?;
        if count != position as usize {
            return Err(FrameError::Value { what: "number of ids", value: count as i64 });
        }
        let ids = (0..count).map(|_| from.i32("ids")).collect::<Result<_, _>>()?;
        Ok(Choice { position, ids: Some(ids) })
    };
    (0..count).map(|_| choice(from)).collect()
}
