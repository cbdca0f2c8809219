//! What the muxer's events ask for: dials, the beginning and the end of connections, and the word for each in log and
//! metrics.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info, warn};

use super::Switchboard;
use super::wire;
use crate::config::{self, ProxyProtocol, Target};
use crate::device::flow::HostEnd;
use crate::device::handle::Command;
use crate::device::messages::Messages;
use crate::device::rules::Rule;
use crate::host::HostStream;
use crate::host::dial::{Dial, DialRequest};
use crate::host::listen::Incoming;
use crate::host::proxy_protocol;
use crate::metrics::Direction;
use crate::vsock::{
    CloseReason, ConnectionId, ConnectionKey, Misbehavior, RefuseReason, ShutdownFlags, SocketType, State,
};

impl Switchboard {
    pub(super) fn dial(
        &mut self,
        now: Instant,
        id: ConnectionId,
        key: ConnectionKey,
        socket_type: SocketType,
    ) {
        let port = key.peer_port.0;
        let rules = Arc::clone(&self.rules);
        let Some((outbound, rule)) = rules.route(key.peer_cid, port) else {
            let no_rule = Arc::clone(rules.no_rule());
            let flow = self.new_flow(id, no_rule, key.guest_port.0, port, now, String::new());
            self.flows.insert(flow);
            self.log_no_rule(key);
            self.muxer.refused(id, RefuseReason::NoRule);
            return;
        };
        let place = match self.admission.admit(now, rule) {
            Ok(place) => place,
            Err(reason) => {
                let flow = self.new_flow(id, Arc::clone(rule), key.guest_port.0, port, now, String::new());
                self.flows.insert(flow);
                self.log_bound(now, rule, port, reason);
                self.muxer.refused(id, reason);
                return;
            }
        };
        if let Some(dials) = &rule.metrics().dials {
            dials.inc();
        }
        let kind = match socket_type {
            SocketType::Stream => config::SocketType::Stream,
            SocketType::Seqpacket => config::SocketType::Seqpacket,
        };
        let carried = match &outbound.target {
            Target::Unix { .. } | Target::Guest { .. } => true,
            Target::Tcp { .. } | Target::Vsock { .. } => {
                socket_type == SocketType::Stream || outbound.framing.is_some()
            }
        };
        let mut flow = self.new_flow(id, Arc::clone(rule), key.guest_port.0, port, now, String::new());
        let place = flow.place.insert(place);
        // With the dial's socket, which may be open for longer than the connection that it is for.
        let descriptor = match &outbound.target {
            Target::Guest { .. } => None,
            _ => place.descriptor.take(),
        };
        if socket_type == SocketType::Seqpacket {
            flow.messages = Some(Box::new(Messages::new(wire(outbound.framing))));
        }
        if !carried {
            let target = outbound.target.to_string();
            self.flows.insert(flow);
            self.log_no_boundaries(now, rule, port, &target);
            self.muxer.refused(id, RefuseReason::UnsupportedType);
            return;
        }
        if let Target::Guest { name, port: to } = &outbound.target {
            let offset = port.saturating_sub(*outbound.ports.start());
            let to = to.map_or(port, |first| first.saturating_add(offset));
            self.dial_sibling(now, flow, name, to);
            return;
        }
        let greeting = match outbound.proxy_protocol {
            None => Vec::new(),
            Some(ProxyProtocol::V2) => proxy_protocol::header(proxy_protocol::Origin {
                name: &self.name,
                cid: self.cid,
                guest_port: key.guest_port.0,
                destination_port: port,
            }),
        };
        let handle = self.handle.clone();
        let token = id.token();
        let request = DialRequest {
            target: &outbound.target,
            socket_type: match outbound.framing {
                Some(_) => config::SocketType::Stream,
                None => kind,
            },
            first_port: *outbound.ports.start(),
            guest_port: port,
            cid: self.cid,
            greeting: &greeting,
            timeout: self.dial_timeout,
        };
        let dial = self.dialer.dial(request, descriptor, move |result, took| {
            // A device that is gone needs no answer.
            let _ = handle.send(Command::Dialed { token, result, took });
        });
        match dial {
            Dial::Ended(result, took) => {
                self.flows.insert(flow);
                self.dialed(now, id, result, took);
            }
            Dial::Waits(task) => {
                flow.end = HostEnd::Dialing { _task: Some(task) };
                self.flows.insert(flow);
            }
        }
    }

    pub(super) fn accepted(&mut self, now: Instant, id: ConnectionId, key: ConnectionKey) {
        // Before the line, which may fail: for the guest the connection exists, and what is closed was opened.
        self.established(now, id);
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        if let Some(asked_by) = flow.asked_by.take() {
            asked_by.accepted();
        }
        if flow.wants_ok {
            let line = format!("OK {}\n", key.peer_port);
            // The first bytes of a fresh socket: one that cannot take so few has lost its client.
            let written = flow
                .stream()
                .map(|stream| stream.write(&[io::IoSlice::new(line.as_bytes())]));
            if !matches!(written, Some(Ok(n)) if n == line.len()) {
                self.muxer.host_failed(id, CloseReason::PeerRst);
            }
        }
    }

    pub(super) fn established(&mut self, now: Instant, id: ConnectionId) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.established = true;
        flow.since = now;
        let metrics = flow.rule.metrics();
        metrics.opened.inc();
        metrics.active.inc();
        debug!(
            guest = %self.name, rule = metrics.name, opened_by = flow.rule.opened_by.label(),
            guest_port = flow.guest_port, host_port = flow.host_port, peer = flow.peer, "connection established"
        );
    }

    pub(super) fn log_no_rule(&mut self, key: ConnectionKey) {
        let port = key.peer_port.0;
        if self.logbook.no_rule(port) {
            warn!(
                guest = %self.name, port, cid = %key.peer_cid, reason = "no_rule",
                "the guest asked for a port that no outbound rule matches"
            );
        } else {
            debug!(guest = %self.name, port, cid = %key.peer_cid, reason = "no_rule", "refused");
        }
    }

    fn log_no_boundaries(&mut self, now: Instant, rule: &Rule, port: u32, target: &str) {
        let reason = RefuseReason::UnsupportedType.label();
        let news = self.logbook.target_failed(now, rule.id);
        let rule = rule.name();
        if news {
            warn!(
                guest = %self.name, rule, port, target, reason,
                "the guest asked for a SEQPACKET connection, and the target's bytes have no message boundaries; \
                 a service that speaks in frames can be given `framing: length-prefixed`"
            );
        } else {
            debug!(guest = %self.name, rule, port, target, reason, "refused");
        }
    }

    pub(super) fn limit_reached(&mut self, now: Instant, key: ConnectionKey) {
        let port = key.peer_port.0;
        let rules = Arc::clone(&self.rules);
        let refused = |rule: &Rule, reason: RefuseReason| rule.metrics().refused[reason as usize].inc();
        let Some((_, rule)) = rules.route(key.peer_cid, port) else {
            // No limit would have let it through, so nobody should be told to raise one.
            refused(rules.no_rule(), RefuseReason::NoRule);
            self.log_no_rule(key);
            return;
        };
        refused(rule, RefuseReason::Limit);
        self.log_bound(now, rule, port, RefuseReason::Limit);
    }

    pub(super) fn refuse_incoming(&mut self, rule: &Rule, incoming: Incoming, reason: RefuseReason) {
        let metrics = rule.metrics();
        metrics.refused[reason as usize].inc();
        debug!(
            guest = %self.name, rule = metrics.name, port = incoming.port, peer = incoming.peer,
            reason = reason.label(), "inbound connection refused"
        );
        incoming.stream.abort();
    }

    pub(super) fn forget_refused(&mut self, id: ConnectionId, reason: RefuseReason) {
        let Some(mut flow) = self.flows.remove(id) else {
            return;
        };
        if let Some(asked_by) = flow.asked_by.take() {
            asked_by.refused(reason);
        }
        let metrics = flow.rule.metrics();
        metrics.refused[reason as usize].inc();
        debug!(
            guest = %self.name, rule = metrics.name, guest_port = flow.guest_port, host_port = flow.host_port,
            peer = flow.peer, reason = reason.label(), "connection refused"
        );
        if let HostEnd::Connected(stream) = flow.end {
            stream.abort();
        }
    }

    pub(super) fn shutdown_host(&mut self, now: Instant, id: ConnectionId, flags: ShutdownFlags) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        // Empty messages hold no credit, so that the law does not know of them.
        if flags.contains(ShutdownFlags::SEND)
            && let Some(messages) = &mut flow.messages
            && messages.outbox.has_whole()
        {
            messages.outbox.shutdown_due = true;
            return;
        }
        let draining =
            (self.muxer.connection(id)).is_some_and(|connection| connection.state() == State::Draining);
        let Some(stream) = flow.stream() else { return };
        // ENOTCONN: the peer was faster; its reset is read in the usual way.
        let result = if flags.contains(ShutdownFlags::SEND) {
            stream.shutdown_write()
        } else if let Some(ears) = &flow.ears {
            ears.close();
            // What the other device has filled to the brim would never be writable again, and so wake nobody.
            stream.shutdown_read().map(|()| discard(stream))
        } else if draining {
            // EPIPE would keep a service from the rest of what the guest has sent, and the guest is gone anyway.
            Ok(())
        } else {
            stream.shutdown_read()
        };
        if let Err(error) = result {
            debug!(guest = %self.name, %error, ?flags, "shutdown of a host socket");
        }
        self.end_if_deaf(now, id);
    }

    pub(super) fn close(&mut self, now: Instant, id: ConnectionId, reason: CloseReason, abort: bool) {
        let Some(mut flow) = self.flows.remove(id) else {
            return;
        };
        // Ahead of the socket, whose end wakes the other guest's device.
        drop(flow.ears.take());
        let metrics = flow.rule.metrics();
        metrics.active.dec();
        metrics.closed[reason as usize].inc();
        let lasted = now.saturating_duration_since(flow.since);
        self.metrics.duration[flow.rule.opened_by as usize].observe(lasted.as_secs_f64());
        self.metrics.buffered_bytes[Direction::GuestToHost as usize].sub(flow.spill.len() as i64);
        info!(
            guest = %self.name,
            rule = metrics.name,
            opened_by = flow.rule.opened_by.label(),
            guest_port = flow.guest_port,
            host_port = flow.host_port,
            peer = flow.peer,
            bytes_from_guest = flow.bytes_from_guest,
            bytes_to_guest = flow.bytes_to_guest,
            duration_ms = lasted.as_millis() as u64,
            reason = reason.label(),
            "connection ended"
        );
        let cut_off = flow.holds_back();
        let HostEnd::Connected(stream) = flow.end else {
            return;
        };
        // Its only descriptor is closed below, which takes it out of the poll as well.
        // What was cut off must not look complete: the time was up while bytes of the guest were still here.
        if abort || cut_off {
            stream.abort();
        } else if flow.eof || !stream.is_tcp() {
            stream.forget_packets();
        } else {
            self.lingering.add(now, stream, &self.registry);
        }
    }

    pub(super) fn misbehaved(&mut self, kind: Misbehavior, key: ConnectionKey) {
        if let Some(counter) = self.metrics.misbehavior.get(kind as usize) {
            counter.inc();
        }
        if self.logbook.misbehavior(kind) {
            warn!(
                guest = %self.name, kind = kind.label(), guest_port = %key.guest_port, cid = %key.peer_cid,
                port = %key.peer_port, "the guest broke the vsock protocol (further ones are counted and logged at debug)"
            );
        } else {
            debug!(guest = %self.name, kind = kind.label(), guest_port = %key.guest_port, "misbehavior");
        }
    }
}

/// Throws away what a socket has that is shut down for reading: no more can come, so this ends.
fn discard(stream: &HostStream) {
    let mut bin = [0; 16 * 1024];
    while matches!(stream.read(&mut bin), Ok(n) if n > 0) {}
}
