//! What the back-end asks on its own channel, and how a front-end answers: as QEMU does, or in any way that a back-end
//! has to survive.

use super::iommu::{READ, WRITE};
use super::message::Message;

/// Request of the back-end: an IOTLB message (`VHOST_USER_BACKEND_IOTLB_MSG`).
pub const BACKEND_IOTLB_MSG: u32 = 1;

/// Type of an IOTLB message: a translation is missing.
pub const MISS: u8 = 1;
/// Type of an IOTLB message: a translation.
pub const UPDATE: u8 = 2;
/// Type of an IOTLB message: a range is no longer translated.
pub const INVALIDATE: u8 = 3;
/// Type of an IOTLB message: an access failed. QEMU answers it with an error.
pub const ACCESS_FAIL: u8 = 4;

/// A translation that the back-end asks for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Miss {
    /// The address.
    pub iova: u64,
    /// What it is wanted for: [`READ`], [`WRITE`] or both.
    pub perm: u8,
    /// Whether an answer on the channel is wanted.
    pub need_reply: bool,
}

impl Miss {
    /// The miss that a request of the back-end is; `None` if it is something else.
    pub fn of(message: &Message) -> Option<Miss> {
        let iova = u64::from_ne_bytes(*message.payload.first_chunk()?);
        let (perm, kind) = (*message.payload.get(24)?, *message.payload.get(25)?);
        (message.request == BACKEND_IOTLB_MSG && kind == MISS).then_some(Miss {
            iova,
            perm,
            need_reply: message.flags & super::message::NEED_REPLY != 0,
        })
    }

    /// Whether exactly one kind of access is asked for: QEMU refuses write access to what the guest mapped for reading,
    /// and the guest sees a DMA fault.
    pub fn is_exact(&self) -> bool {
        self.perm == READ || self.perm == WRITE
    }
}

/// A message that a front-end sends although the back-end waits for something else. An answer is read if there is one:
/// to requests that always have one, and to those with NEED_REPLY.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unrelated {
    /// Request number.
    pub request: u32,
    /// Flags besides the version.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
}

/// How one miss is answered.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Answer {
    /// As QEMU: UPDATE on the main channel, its acknowledgement awaited, then 0 on the channel of the miss. Refused if
    /// nothing is mapped or not for that access.
    #[default]
    AtOnce,
    /// The same, after messages that have nothing to do with it.
    After(Vec<Unrelated>),
    /// The UPDATE, but no answer on the channel.
    WithoutReply,
    /// 0 on the channel, but no UPDATE.
    WithoutUpdate,
    /// 1 on the channel, no UPDATE, whatever is mapped.
    Refuse,
    /// Put aside until `FrontEnd::release_misses`.
    Hold,
    /// Nothing at all.
    Never,
}

/// What became of a miss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is not answered yet.
    Pending,
    /// The UPDATE was acknowledged.
    Mapped,
    /// The back-end refused the UPDATE.
    UpdateRefused,
    /// Refused: nothing is mapped there.
    Unmapped,
    /// Refused: mapped, but not for this access. A guest with a vIOMMU logs a DMA fault.
    Denied,
    /// Refused, because the policy says so.
    Refused,
    /// Answered with 0, without UPDATE.
    Pretended,
    /// Put aside.
    Held,
    /// Left alone.
    Ignored,
}

/// A miss and what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeenMiss {
    /// The miss.
    pub miss: Miss,
    /// Its end.
    pub outcome: Outcome,
}

/// Chooses how each miss is answered.
pub type Policy = Box<dyn FnMut(&Miss) -> Answer + Send>;
