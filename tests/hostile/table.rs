//! What a row is.

use std::ops::RangeInclusive;

use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{DriverOptions, Profile};

use crate::raw::Raw;

/// One trick. What is in it is all that is expected; the judge compares.
pub struct Row {
    /// What is done, in a few words.
    pub trick: &'static str,
    /// Where it comes from: a section of the standard, or the peer whose fault it was.
    pub source: &'static str,
    /// What guest and VMM are like.
    pub boot: fn() -> (Profile, DriverOptions),
    /// Does it.
    pub play: fn(&mut Raw<'_>),
    /// What the guest hears, credit left aside.
    pub answer: Answer,
    /// What the books say afterwards that they did not say before, and nothing else: family and label values, how often.
    pub counted: &'static [(&'static str, RangeInclusive<u32>)],
    /// The same in the other guest's books, where the trick is played on that guest.
    pub neighbour: &'static [(&'static str, RangeInclusive<u32>)],
    /// Who lives on.
    pub survives: Survives,
}

impl Row {
    /// What most rows have in common.
    pub const USUAL: Row = Row {
        trick: "",
        source: "virtio 1.2, 5.10.6",
        boot: linux,
        play: |_| {},
        answer: Answer::Silence,
        counted: &[],
        neighbour: &[],
        survives: Survives::Connection,
    };
}

/// How often something is counted as a rule.
pub const ONCE: RangeInclusive<u32> = 1..=1;

/// What the guest hears on flows other than the good one. CREDIT_UPDATE and CREDIT_REQUEST may come at any time.
pub enum Answer {
    /// Nothing.
    Silence,
    /// One RST and nothing else.
    Rst,
    /// So many RSTs and nothing else.
    Rsts(RangeInclusive<u32>),
    /// One RESPONSE and nothing else.
    Response,
    /// This, which the trick has seen to itself.
    Seen(&'static str),
}

/// The smallest thing that the trick costs its guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survives {
    /// Everything lives on.
    Connection,
    /// The connection is lost, if there was one; the guest's others live on.
    Others,
    /// The ring rests until the guest restarts it. Other guests do not notice.
    Restart,
    /// The session ends; the next one is served. Other guests do not notice.
    Reconnect,
}

impl Survives {
    /// For the page.
    pub fn text(self) -> &'static str {
        match self {
            Survives::Connection => "everything",
            Survives::Others => "the guest's other connections",
            Survives::Restart => "the session, once the guest restarts its rings",
            Survives::Reconnect => "the VMM's next session",
        }
    }
}

/// Linux under QEMU, with a few descriptors that its driver never uses ([`crate::raw::SPARE`]).
pub fn linux() -> (Profile, DriverOptions) {
    let options = DriverOptions {
        tx_slots: 32,
        ..DriverOptions::default()
    };
    (Profile::qemu(), options)
}

/// The same with few receive buffers: what is posted by hand has its turn soon.
pub fn few_buffers() -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    let options = DriverOptions {
        rx_buffers: 16,
        ..options
    };
    (profile, options)
}

/// A driver that knows neither event indices nor tables.
pub fn plain() -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    (
        profile.without(feature::EVENT_IDX | feature::INDIRECT_DESC),
        options,
    )
}
