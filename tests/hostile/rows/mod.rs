//! The rows, by kind.

pub mod buffers;
pub mod chains;
pub mod credit;
pub mod headers;
pub mod inbound;
pub mod life;
pub mod messages;
pub mod rings;
pub mod vmm;

use vsock_sidecar::vsock::Header;
use vsock_sidecar::vsock::Op;

use crate::raw::{Raw, header};
use crate::stage::ECHO;

/// Sends a bare RW on a flow that does not exist, changed.
fn stray(raw: &mut Raw<'_>, change: impl FnOnce(&mut Header)) {
    let mut head = header(Op::Rw as u16, raw.port(), ECHO);
    change(&mut head);
    raw.send_as_it_is(head, &[]);
}

/// Opens a connection to the echo service and sends one RW on it, changed.
fn on_open(raw: &mut Raw<'_>, payload: &[u8], change: impl FnOnce(&mut Header)) {
    let flow = raw.open(ECHO);
    let mut head = flow.header(Op::Rw);
    head.len = payload.len() as u32;
    change(&mut head);
    raw.send_as_it_is(head, payload);
}
